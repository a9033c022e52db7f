"""What a model launches on a GPU, recorded without one: its tensors are on the meta device, its launches are kept."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final
from unittest import mock

import torch
from torch import Tensor

from pyruntime.checkpoint import Model, Weight
from pyruntime.graph import build, fuse
from pyruntime.ops.cache import KvCache
from pyruntime.ops.gpu.batch import GREEDY
from pyruntime.ops.gpu.device import GpuInfo
from pyruntime.ops.step import SequenceSlice, make_step
from pyruntime.plan import Plan, lower
from pyruntime.plan.lower_gpu import GpuTarget
from pyruntime.spec import weight_shapes
from tests.kernels.models import PROMPT, Case

PAGE_SIZE: Final = 16
# the devices that stand for their architecture: A100, H200, B200
DEVICES: Final = {80: GpuInfo("sm_80", 80, 108), 90: GpuInfo("sm_90", 90, 132), 100: GpuInfo("sm_100", 100, 148)}


@dataclass(frozen=True, slots=True)
class Recorded:
    """One launch as frame.launch was asked for it, and the model and step that it is of."""

    kernel: Any
    arguments: Sequence[Any]
    constants: Mapping[str, Any]
    num_warps: int
    num_stages: int
    early: bool
    place: str


@dataclass(frozen=True, slots=True)
class ShapeOnly:
    """A weight without values."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Bytes that it would have."""
        return math.prod(self.shape) * self.dtype.itemsize

    def refs(self) -> Iterator[Weight]:
        """Itself."""
        yield self

    def read(self) -> Tensor:
        """On the meta device."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta")


class Recorder:
    """A launcher that keeps what it is given."""

    def __init__(self) -> None:
        self.launches: list[Recorded] = []
        self.place = ""

    def __call__(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        arguments: Sequence[Any],
        constants: Mapping[str, Any],
        num_warps: int,
        num_stages: int,
        early: bool,
    ) -> None:
        """One launch."""
        assert all(0 < size < 2**31 for size in grid), f"{self.place}: {kernel.__name__} has the grid {grid}"
        assert all(size < 2**16 for size in grid[1:]), f"{self.place}: {kernel.__name__} has the grid {grid}"
        self.launches.append(Recorded(kernel, arguments, constants, num_warps, num_stages, early, self.place))


def record(case: Case, info: GpuInfo) -> list[Recorded]:
    """Every Triton kernel that decode steps, with sampling, and a prompt launch on a device like `info`."""
    recorder = Recorder()
    plan = plan_of(case, info)
    assert plan.gpu is not None
    # the runner's own: it has no other door
    plan.gpu.launcher = recorder
    pages_each = PROMPT // PAGE_SIZE
    cache = plan.new_cache(1 + pages_each * max(case.buckets), PAGE_SIZE)
    for count in case.buckets:
        recorder.place = f"{case.name}, decode {count}"
        pages = [tuple(range(i * pages_each, (i + 1) * pages_each)) for i in range(count)]
        slices = [SequenceSlice((0,), PROMPT - 1, own, (0,)) for own in pages]
        plan.gpu.decode(slices, [GREEDY] * count, cache)
    recorder.place = f"{case.name}, prefill {PROMPT}"
    plan.gpu.run(make_step([prompt(cache)], cache, "meta"))
    return recorder.launches


def prompt(cache: KvCache) -> SequenceSlice:
    """One sequence of PROMPT tokens, of which the last one's logits are wanted."""
    return SequenceSlice((0,) * PROMPT, 0, tuple(range(PROMPT // cache.page_size)), (PROMPT - 1,))


def plan_of(case: Case, info: GpuInfo) -> Plan:
    """The plan for such a device. No node of a real model is left to PyTorch."""
    weights: dict[str, Weight] = {
        name: ShapeOnly(shape, case.dtype) for name, shape in weight_shapes(case.spec).items()
    }
    dtype = str(case.dtype).removeprefix("torch.")
    model = Model(spec=case.spec, dense_spec=case.spec, weights=weights, dtype=dtype)
    # without the compiled module, whose kernels have their own lock, and without what was measured on any machine
    target = GpuTarget(info, torch.device("meta"), case.dtype, kernels=case.kernels)
    with mock.patch.object(GpuTarget, "of", return_value=target):
        plan = lower(fuse(build(case.spec)), model, target="cuda", dtype=dtype, device="meta")
    assert plan.gpu is not None
    refused = {
        f"{step.node.name}: {step.reason}"
        for step in (*plan.gpu.steps.prefill, *plan.gpu.steps.decode)
        if step.launch is None
    }
    assert not refused, f"{case.name} on {info.name}: PyTorch runs {'; '.join(sorted(refused))}"
    return plan
