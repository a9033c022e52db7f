"""K6: a run of MLPs whose attentions between them are gone; the stream stays in place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from pyruntime.ops import mlp
from pyruntime.ops.attrs import Shape
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
