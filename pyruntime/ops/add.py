"""A residual add that no op took in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from pyruntime.ops.attrs import Shape
from pyruntime.ops.native_step import NativeNode, NativeStep
from pyruntime.ops.step import View


@dataclass(frozen=True, slots=True)
class AddAttrs:
    """stream + x, `width` values a row."""

    width: int

    def weight_shapes(self) -> dict[str, Shape]:
        """None."""
        return {}

    def in_widths(self) -> tuple[int, ...]:
        """The stream, then x."""
        return (self.width, self.width)

    def out_widths(self) -> tuple[int, ...]:
        """The stream."""
        return (self.width,)

    def flops_per_row(self) -> int:
        """No matrix product."""
        return 0


def reference(
    attrs: AddAttrs, weights: Mapping[str, torch.Tensor], inputs: Sequence[torch.Tensor], view: View
) -> tuple[torch.Tensor, ...]:
    """[rows, width]."""
    return (inputs[0] + inputs[1],)


def on_cpu(attrs: AddAttrs, node: NativeNode) -> list[NativeStep]:
    """One step."""
    stream, other = node.inputs
    return [node.step("add", width=attrs.width, input=stream, other=other, out=node.outputs[0])]
