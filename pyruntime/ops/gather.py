"""The wanted rows of a buffer that holds all rows: where the tail begins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from pyruntime.ops.attrs import Shape
from pyruntime.ops.native_step import NativeNode, NativeStep
from pyruntime.ops.step import View


@dataclass(frozen=True, slots=True)
class GatherAttrs:
    """Rows of `width` values."""

    width: int

    def weight_shapes(self) -> dict[str, Shape]:
        """None."""
        return {}

    def in_widths(self) -> tuple[int, ...]:
        """A buffer with all rows."""
        return (self.width,)

    def out_widths(self) -> tuple[int, ...]:
        """The wanted ones."""
        return (self.width,)

    def flops_per_row(self) -> int:
        """A copy."""
        return 0


def reference(
    attrs: GatherAttrs, weights: Mapping[str, torch.Tensor], inputs: Sequence[torch.Tensor], view: View
) -> tuple[torch.Tensor, ...]:
    """[wanted rows, width]."""
    return (inputs[0].index_select(0, view.index),)


def on_cpu(attrs: GatherAttrs, node: NativeNode) -> list[NativeStep]:
    """One step."""
    return [node.step("gather", width=attrs.width, input=node.inputs[0], out=node.outputs[0])]
