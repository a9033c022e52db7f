"""RMSNorm and LayerNorm, with the residual add behind a post-norm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from pyruntime.ops.attrs import Shape, norm_shapes
from pyruntime.ops.layout import Layout, norm_layouts
from pyruntime.ops.native_step import NativeNode, NativeStep
from pyruntime.ops.step import View
from pyruntime.spec import Norm, NormKind


@dataclass(frozen=True, slots=True)
class NormAttrs:
    """norm(x), or residual + norm(x)."""

    norm: Norm
    residual: bool = False

    def weight_shapes(self) -> dict[str, Shape]:
        """Gain and bias."""
        return {role.removeprefix("norm."): shape for role, shape in norm_shapes("norm", self.norm).items()}

    def in_widths(self) -> tuple[int, ...]:
        """x, then the residual."""
        return (self.norm.size,) * (2 if self.residual else 1)

    def out_widths(self) -> tuple[int, ...]:
        """As wide as x."""
        return (self.norm.size,)

    def flops_per_row(self) -> int:
        """No matrix product."""
        return 0


def reference(
    attrs: NormAttrs, weights: Mapping[str, torch.Tensor], inputs: Sequence[torch.Tensor], view: View
) -> tuple[torch.Tensor, ...]:
    """[rows, size]."""
    y = normalize(attrs.norm, inputs[0], weights.get("weight"), weights.get("bias"))
    return (inputs[1] + y if attrs.residual else y,)


def layouts(attrs: NormAttrs) -> dict[str, Layout]:
    """Gain and bias, whose roles have no prefix here."""
    return {
        name: replace(layout, sources=tuple(str(role).removeprefix("norm.") for role in layout.sources))
        for name, layout in norm_layouts("norm", attrs.norm).items()
    }


def on_cpu(attrs: NormAttrs, node: NativeNode) -> list[NativeStep]:
    """One step."""
    norm, residual = node.norm("norm", attrs.norm), node.residual(attrs.residual)
    return [node.step("norm", norm=norm, input=node.inputs[0], residual=residual, out=node.outputs[0])]


def normalize(
    norm: Norm | None, x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None
) -> torch.Tensor:
    """`x` [..., norm.size] normed over its last values; `x` itself where `norm` is None.

    RMS: x / sqrt(mean(x^2) + eps) (Zhang & Sennrich 2019); LayerNorm subtracts the mean first (Ba et al. 2016).
    """
    if norm is None:
        return x
    if norm.kind in (NormKind.LAYER, NormKind.LAYER_ONE_PLUS):
        x = x - x.mean(dim=-1, keepdim=True)
    y = x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + norm.eps)
    if weight is not None:
        gain = weight.to(y.dtype)
        y = y * (1 + gain if norm.kind in (NormKind.RMS_ONE_PLUS, NormKind.LAYER_ONE_PLUS) else gain)
    return y if bias is None else y + bias.to(y.dtype)


def norm_of(norm: Norm | None, role: str, weights: Mapping[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """`x` through the norm whose weights stand under `role`."""
    return normalize(norm, x, weights.get(f"{role}.weight"), weights.get(f"{role}.bias"))
