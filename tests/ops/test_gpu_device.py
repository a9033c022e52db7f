"""Which GPUs target cuda takes, told from what torch says of them."""

from __future__ import annotations

import importlib.metadata
from types import SimpleNamespace

import pytest
import torch

from pyruntime.errors import UsageError
from pyruntime.ops.gpu.device import gpu_info, has_gpu

CUDA = torch.device("cuda:0")


def pretend(monkeypatch: pytest.MonkeyPatch, major: int, minor: int, triton: str = "3.7.1") -> None:
    """Let torch see a GPU of this compute capability, and Triton have this version."""
    properties = SimpleNamespace(name="Some GPU", major=major, minor=minor, multi_processor_count=40)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (major, minor))
    monkeypatch.setattr(importlib.metadata, "version", lambda name: triton)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def test_a_gpu_that_is_too_old_is_refused_and_not_taken_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, 7, 5)
    assert not has_gpu()
    with pytest.raises(UsageError, match=r"capability 7.5; target cuda needs 8.0"):
        gpu_info(CUDA)


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (10, 0), (12, 0)])
def test_newer_gpus_are_taken(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    pretend(monkeypatch, *capability)
    assert has_gpu()
    assert gpu_info(CUDA).capability == 10 * capability[0] + capability[1]


def test_a_triton_that_cannot_compile_for_a_gpu_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, 10, 0, triton="3.6.0")
    with pytest.raises(
        UsageError, match=r"Triton 3.6.0 does not compile every kernel for Some GPU .*install Triton 3.7"
    ):
        gpu_info(CUDA)
    pretend(monkeypatch, 9, 0, triton="3.6.0")
    assert gpu_info(CUDA).capability == 90


def test_the_cpu_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(UsageError, match="needs an NVIDIA GPU"):
        gpu_info(torch.device("cpu"))
