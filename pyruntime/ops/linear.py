"""K3: a linear map with its norm before and its residual add behind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from pyruntime.ops.attrs import Shape, linear_flops, linear_shapes, norm_shapes
from pyruntime.ops.layout import Layout, matrix_layouts, norm_layouts, unpacked
from pyruntime.ops.native_step import NativeNode, NativeStep
from pyruntime.ops.norm import norm_of
from pyruntime.ops.step import View
from pyruntime.spec import Linear, Norm


@dataclass(frozen=True, slots=True)
class LinearAttrs:
    """W norm(x) + b (+ residual)."""

    linear: Linear
    norm: Norm | None = None
    residual: bool = False

    def weight_shapes(self) -> dict[str, Shape]:
        """The map's and the norm's."""
        return {**norm_shapes("norm", self.norm), **linear_shapes("linear", self.linear)}

    def in_widths(self) -> tuple[int, ...]:
        """x, then the residual."""
        residual = (self.linear.out_features,) if self.residual else ()
        return (self.linear.in_features, *residual)

    def out_widths(self) -> tuple[int, ...]:
        """The map's output."""
        return (self.linear.out_features,)

    def flops_per_row(self) -> int:
        """One matrix-vector product."""
        return linear_flops(self.linear)


def reference(
    attrs: LinearAttrs, weights: Mapping[str, torch.Tensor], inputs: Sequence[torch.Tensor], view: View
) -> tuple[torch.Tensor, ...]:
    """[rows, out_features]."""
    y = project("linear", weights, norm_of(attrs.norm, "norm", weights, inputs[0]))
    return (inputs[1] + y if attrs.residual else y,)


def layouts(attrs: LinearAttrs) -> dict[str, Layout]:
    """Norm and matrix."""
    return norm_layouts("norm", attrs.norm) | matrix_layouts("matrix", {"linear": attrs.linear})


def on_cpu(attrs: LinearAttrs, node: NativeNode) -> list[NativeStep]:
    """One step."""
    matrix = node.matrix("matrix", attrs.linear.in_features, attrs.linear.out_features)
    norm, residual = node.norm("norm", attrs.norm), node.residual(attrs.residual)
    return [node.step("linear", norm=norm, matrix=matrix, input=node.inputs[0], residual=residual, out=node.outputs[0])]


def project(role: str, weights: Mapping[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """`x` through the map under `role`, or `x` itself where the map is absent.

    The product takes `x` rounded to the weights' dtype; the result comes back in the dtype of `x`.
    """
    weight = weights.get(f"{role}.weight")
    if weight is None:
        return x
    matrix = unpacked(weight)
    return torch.nn.functional.linear(x.to(weight.dtype), matrix, weights.get(f"{role}.bias")).to(x.dtype)
