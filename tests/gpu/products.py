"""One step of a node that is made of matrix products, on poisoned memory, with everything that it may have touched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pyruntime.ops.gpu.choose import Backend
from pyruntime.ops.gpu.frame import launch_kernel
from pyruntime.ops.layout import arrange
from pyruntime.spec import Linear, Norm, NormKind
from tests.gpu.helpers import Guarded, frame_of, guarded, node_of, random, view_of
from tests.naive import Array

SPLITS = "SPLITS"


def lin(inputs: int, outputs: int, bias: bool = False) -> Linear:
    return Linear(in_features=inputs, out_features=outputs, bias=bias)


def norm_of(size: int, kind: NormKind = NormKind.RMS, *, weight: bool = True, bias: bool = False) -> Norm:
    # a large epsilon shows where it is forgotten
    return Norm(kind=kind, size=size, eps=0.1, weight=weight, bias=bias)


@dataclass(frozen=True)
class Step:
    """`found` [rows, width]; `intact`: neither memory beside it nor counters were changed; constants by launch."""

    found: Tensor
    intact: bool
    launched: Sequence[tuple[str, Mapping[str, Any]]]

    @property
    def kernels(self) -> list[str]:
        return [name for name, _ in self.launched]

    @property
    def splits(self) -> list[int]:
        """Of each product, how many programs share a tile."""
        return [constants[SPLITS] for _, constants in self.launched if SPLITS in constants]


def weights_of(attrs: Any, dtype: torch.dtype) -> dict[str, Tensor]:
    """As a checkpoint stores them; outputs of matrices are about as large as their inputs."""
    shapes = attrs.weight_shapes()
    return {
        role: random(*shape, dtype=dtype, seed=i, scale=shape[-1] ** -0.5 if len(shape) > 1 else 0.5)
        for i, (role, shape) in enumerate(shapes.items())
    }


def exact(weights: Mapping[str, Tensor]) -> dict[str, Array]:
    """For tests.naive."""
    return {role: each.double().cpu().numpy() for role, each in weights.items()}


def run(
    gpu: Any,
    attrs: Any,
    weights: Mapping[str, Tensor],
    inputs: Sequence[Tensor],
    dtype: torch.dtype,
    backend: Backend | None = None,
    out: Tensor | None = None,
) -> Step:
    """One step of the node; `out`: memory for its output, that of an input perhaps."""
    arranged = {
        name: guarded(arrange(layout, [None if role is None else weights[role] for role in layout.sources]))
        for name, layout in gpu.layouts(attrs).items()
    }
    rows = inputs[0].shape[0]
    made = Guarded((rows, attrs.out_widths()[0]), torch.float32)
    target = made.inside if out is None else out
    launched: list[tuple[str, Mapping[str, Any]]] = []

    def launcher(kernel: Any, grid: Any, arguments: Any, constants: Mapping[str, Any], *options: Any) -> None:
        launched.append((kernel.fn.__name__, constants))
        launch_kernel(kernel, grid, arguments, constants, *options)

    frame = frame_of(view_of([1] * rows, [1] * rows, [[0]] * rows, decode=True), inputs, (target,))
    # all bits set: NaN in every dtype
    frame.scratch((1 << 19,), torch.uint8).fill_(255)
    frame.workspace.begin()
    gpu.on_gpu(attrs, node_of(arranged, dtype, backend))(replace(frame, launcher=launcher))
    return Step(target, made.intact and not frame.counters(4096).any(), launched)
