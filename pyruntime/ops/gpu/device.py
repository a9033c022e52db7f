"""The GPU that a plan is made for."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from dataclasses import dataclass
from typing import Final

import torch

from pyruntime.errors import UsageError

# few, so that the interpreter has little to do and work is still split
_INTERPRETED_SMS: Final = 4
# what the kernels are compiled for: bfloat16 tensor cores and asynchronous copies
_LEAST_CAPABILITY: Final = 80
# there the pipeliner of Triton 3.6 fails on loops with two products
_BLACKWELL: Final = 100
_TRITON_FOR_BLACKWELL: Final = (3, 7)


@dataclass(frozen=True, slots=True)
class GpuInfo:
    """A device. `capability` is 80, 90, ...; 0 is Triton's interpreter, which works on the CPU's memory."""

    name: str
    capability: int
    num_sms: int

    @property
    def interpreted(self) -> bool:
        """Whether kernels are interpreted, for tests."""
        return self.capability == 0

    @property
    def has_dependent_launch(self) -> bool:
        """Whether a kernel may start before the one in front of it has ended (programmatic dependent launch)."""
        return self.capability >= 90


def interpreted() -> bool:
    """Whether Triton's interpreter was asked for, as Triton asks."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def has_gpu(device: torch.device | None = None) -> bool:
    """Whether target cuda can run on `device`, or on the current GPU: it is new enough, and Triton is there."""
    if interpreted() or not torch.cuda.is_available() or importlib.util.find_spec("triton") is None:
        return False
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor >= _LEAST_CAPABILITY


def gpu_info(device: torch.device) -> GpuInfo:
    """What `device` is. Raises UsageError TARGET for one that target cuda cannot run on.

    The CPU stands for a GPU where Triton's interpreter runs, for tests of the kernels without one.
    """
    if importlib.util.find_spec("triton") is None:
        raise UsageError(
            "TARGET", "target cuda needs Triton, which is not installed here; install it, or choose target cpu"
        )
    if device.type == "cpu" and interpreted():
        return GpuInfo("interpreter", 0, _INTERPRETED_SMS)
    if device.type != "cuda":
        raise UsageError(
            "TARGET",
            f"target cuda needs an NVIDIA GPU, and a torch built for it; found device {device}: choose device cuda "
            "where there is one, or target cpu",
        )
    properties = torch.cuda.get_device_properties(device)
    capability = 10 * properties.major + properties.minor
    if capability < _LEAST_CAPABILITY:
        raise UsageError(
            "TARGET",
            f"{properties.name} has compute capability {properties.major}.{properties.minor}; target cuda needs 8.0 or "
            "more: choose target reference",
        )
    triton = importlib.metadata.version("triton")
    if capability >= _BLACKWELL and tuple(map(int, triton.split(".")[:2])) < _TRITON_FOR_BLACKWELL:
        raise UsageError(
            "TARGET",
            f"Triton {triton} does not compile every kernel for {properties.name} (compute capability "
            f"{properties.major}.{properties.minor}); install Triton 3.7 or newer, or choose target reference",
        )
    return GpuInfo(properties.name, capability, properties.multi_processor_count)


def refused_dtype(attrs: object, dtype: torch.dtype) -> str | None:
    """Why no kernel here runs a dtype, or None."""
    return "float64 is not computed on a GPU" if dtype is torch.float64 else None
