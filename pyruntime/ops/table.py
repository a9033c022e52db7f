"""The one list of ops and implementations that plans choose from, and that tests and benchmarks iterate over."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch

from pyruntime.ops import add, attention, embed, gather, head, linear, mlp, mlp_chain, moe, norm, qkv_rope
from pyruntime.ops.gpu.frame import GpuNode, Launch
from pyruntime.ops.layout import Layout, stored
from pyruntime.ops.native_step import NativeNode, NativeStep, refused_dtype
from pyruntime.ops.step import View

# (attrs, weights by role, input buffers, rows) -> output buffers
Run = Callable[[Any, Mapping[str, torch.Tensor], Sequence[torch.Tensor], View], tuple[torch.Tensor, ...]]


# (attrs, node) -> steps of the executor
Emit = Callable[[Any, NativeNode], list[NativeStep]]


# (attrs, node) -> what a step launches
OnGpu = Callable[[Any, GpuNode], Launch]


def _as_stored(attrs: Any) -> dict[str, Layout]:
    return {role: stored(role) for role in attrs.weight_shapes()}


def _runs_everything(attrs: Any, dtype: torch.dtype) -> str | None:
    return None


@dataclass(frozen=True, slots=True)
class Implementation:
    """One way to run an op. `refuses` gives the reason why some attributes or dtype cannot be run, or None.

    Exactly one of `run` (in Python, with weights as stored), `emit` (as steps of the C++ executor) and `on_gpu` (as
    launches of GPU kernels) is there; the last two want weights arranged as `layouts` says.
    """

    target: str
    run: Run | None = None
    emit: Emit | None = None
    on_gpu: OnGpu | None = None
    layouts: Callable[[Any], dict[str, Layout]] = _as_stored
    refuses: Callable[[Any, torch.dtype], str | None] = _runs_everything


def _cpu(module: Any) -> Implementation:
    layouts, refuses = getattr(module, "layouts", _as_stored), getattr(module, "refuses", refused_dtype)
    return Implementation("cpu", emit=module.on_cpu, layouts=layouts, refuses=refuses)


def _gpu(stem: str) -> Implementation:
    def module() -> Any:
        # loaded when a plan for GPUs is made: Triton takes a second that nobody else should wait for
        return importlib.import_module(f"pyruntime.ops.gpu.{stem}")

    return Implementation(
        "cuda",
        on_gpu=lambda attrs, node: module().on_gpu(attrs, node),
        layouts=lambda attrs: module().layouts(attrs),
        refuses=lambda attrs, dtype: module().refuses(attrs, dtype),
    )


_STEMS: Final = (embed, norm, qkv_rope, attention, linear, mlp, mlp_chain, add, gather, head)

OPS: Final[dict[str, tuple[Implementation, ...]]] = {
    stem: (Implementation("reference", run=module.reference), _cpu(module), _gpu(stem))
    for module in _STEMS
    for stem in (module.__name__.rpartition(".")[2],)
} | {"moe": (Implementation("reference", run=moe.reference),)}
