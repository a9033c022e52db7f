"""K7: final norm and the map to the vocabulary, on the wanted rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from pyruntime.ops.attrs import Shape, linear_flops, linear_shapes, norm_shapes
from pyruntime.ops.layout import Layout, matrix_layouts, norm_layouts
from pyruntime.ops.linear import project
from pyruntime.ops.native_step import NativeNode, NativeStep
from pyruntime.ops.norm import norm_of
from pyruntime.ops.step import View
from pyruntime.spec import Head, Norm


@dataclass(frozen=True, slots=True)
class HeadAttrs:
    """Stream to logits; `norm` is the final norm once it was fused in."""

    head: Head
    norm: Norm | None = None

    def weight_shapes(self) -> dict[str, Shape]:
        """The norm's and the map's."""
        return norm_shapes("norm", self.norm) | linear_shapes("linear", self.head.linear)

    def in_widths(self) -> tuple[int, ...]:
        """The stream."""
        return (self.head.linear.in_features,)

    def out_widths(self) -> tuple[int, ...]:
        """One logit per token of the vocabulary."""
        return (self.head.linear.out_features,)

    def flops_per_row(self) -> int:
        """One product."""
        return linear_flops(self.head.linear)


def reference(
    attrs: HeadAttrs, weights: Mapping[str, torch.Tensor], inputs: Sequence[torch.Tensor], view: View
) -> tuple[torch.Tensor, ...]:
    """Logits [rows, vocab]."""
    logits = project("linear", weights, norm_of(attrs.norm, "norm", weights, inputs[0]))
    softcap = attrs.head.softcap
    return (logits if softcap is None else softcap * torch.tanh(logits / softcap),)


def layouts(attrs: HeadAttrs) -> dict[str, Layout]:
    """Norm and matrix."""
    return norm_layouts("norm", attrs.norm) | matrix_layouts("matrix", {"linear": attrs.head.linear})


def on_cpu(attrs: HeadAttrs, node: NativeNode) -> list[NativeStep]:
    """One step."""
    linear = attrs.head.linear
    matrix = node.matrix("matrix", linear.in_features, linear.out_features)
    norm, softcap = node.norm("norm", attrs.norm), attrs.head.softcap or 0.0
    return [node.step("head", norm=norm, matrix=matrix, softcap=softcap, input=node.inputs[0], out=node.outputs[0])]
