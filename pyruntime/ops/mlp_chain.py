"""K6: a run of MLPs whose attentions between them are gone; the stream stays in place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from pyruntime.ops import mlp
from pyruntime.ops.attrs import Shape
from pyruntime.ops.layout import Layout
from pyruntime.ops.native_step import NativeNode, NativeStep
from pyruntime.ops.step import View


@dataclass(frozen=True, slots=True)
class MlpChainAttrs:
    """x + mlp0(x), then mlp1 of that, and so on; each part has its norm and its residual."""

    parts: tuple[mlp.MlpAttrs, ...]

    def weight_shapes(self) -> dict[str, Shape]:
        """Those of part i under "i."."""
        return {
            f"{i}.{role}": shape for i, part in enumerate(self.parts) for role, shape in part.weight_shapes().items()
        }

    def in_widths(self) -> tuple[int, ...]:
        """The stream."""
        return (self.parts[0].mlp.in_size,)

    def out_widths(self) -> tuple[int, ...]:
        """The stream."""
        return (self.parts[-1].mlp.out_size,)

    def flops_per_row(self) -> int:
        """Those of all parts."""
        return sum(part.flops_per_row() for part in self.parts)


def reference(
    attrs: MlpChainAttrs, weights: Mapping[str, torch.Tensor], inputs: Sequence[torch.Tensor], view: View
) -> tuple[torch.Tensor, ...]:
    """[rows, hidden]."""
    x = inputs[0]
    for i, part in enumerate(attrs.parts):
        own = {role: weights[f"{i}.{role}"] for role in part.weight_shapes()}
        x = x + mlp.forward(part, own, x)
    return (x,)


def layouts(attrs: MlpChainAttrs) -> dict[str, Layout]:
    """Those of part i under "i."."""
    return {
        f"{i}.{name}": replace(layout, sources=tuple(role and f"{i}.{role}" for role in layout.sources))
        for i, part in enumerate(attrs.parts)
        for name, layout in mlp.layouts(part).items()
    }


def on_cpu(attrs: MlpChainAttrs, node: NativeNode) -> list[NativeStep]:
    """A step for each MLP; from the second on, the stream stays in its place."""
    out = node.outputs[0]
    streams = [node.inputs[0], *(out for _ in attrs.parts[1:])]
    return [
        mlp.native_step(part, node, f"{i}.", stream, stream, out)
        for i, (part, stream) in enumerate(zip(attrs.parts, streams, strict=True))
    ]
