"""What this machine can run plans with, and why not with the rest."""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass, field
from typing import Any

import torch

from pyruntime.bench.machine import extensions
from pyruntime.errors import UsageError
from pyruntime.ops import _native
from pyruntime.ops.gpu import trust
from pyruntime.ops.gpu.device import gpu_info, interpreted


@dataclass(frozen=True, slots=True)
class Backend:
    """A target: the devices it can run on here, facts about it, and why it is missing where it has none."""

    target: str
    devices: tuple[torch.device, ...]
    facts: dict[str, Any] = field(default_factory=dict)
    missing: str | None = None


def backends() -> tuple[Backend, ...]:
    """reference, cpu and cuda on this machine."""
    reference = Backend(
        "reference", (torch.device("cpu"),), {"torch": torch.__version__, "threads": torch.get_num_threads()}
    )
    return (reference, _cpu(), _cuda())


def _cpu() -> Backend:
    try:
        native = _native.load()
    except UsageError as error:
        return Backend("cpu", (), missing=str(error))
    facts = {"path": native.isa, "available": native.module.isa_available(), "threads": native.num_threads}
    return Backend("cpu", (torch.device("cpu"),), facts)


def _cuda() -> Backend:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    found = [torch.device("cuda", i) for i in range(count)]
    facts: dict[str, Any] = {
        "driver": trust.driver_version(),
        "torch's CUDA": torch.version.cuda,
        "Triton": _triton(),
        "CUDA C++ kernels": extensions()["_C_cuda"],
        "GPUs": [torch.cuda.get_device_name(each) for each in found],
        "interpreter": interpreted(),
    }
    if facts["Triton"] is None:
        return Backend("cuda", (), facts, "Triton is not installed; install triton")
    if interpreted():
        return Backend("cuda", (torch.device("cpu"),), facts)
    # cards of one name are alike
    alike = {torch.cuda.get_device_name(each): each for each in reversed(found)}
    usable, refused = [], []
    for device in reversed(alike.values()):
        try:
            gpu_info(device)
            usable.append(device)
        except UsageError as error:
            refused.append(str(error))
    missing = None if usable else "; ".join(refused) or _why_no_gpu(facts)
    return Backend("cuda", tuple(usable), facts, missing)


def _why_no_gpu(facts: dict[str, Any]) -> str:
    if facts["driver"] is None:
        return "there is no NVIDIA driver on this machine"
    if facts["torch's CUDA"] is None:
        return f"torch {torch.__version__} is built without CUDA; install a build with it"
    return f"torch sees no GPU, though driver {facts['driver']} is there; look at CUDA_VISIBLE_DEVICES and nvidia-smi"


def _triton() -> str | None:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return None
