"""K4, K5: norm, gate and up, activation, down and residual as one op."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch.nn import functional

from pyruntime.ops import _native
from pyruntime.ops.attrs import Shape, linear_flops, linear_shapes, norm_shapes
from pyruntime.ops.linear import project
from pyruntime.ops.norm import norm_of
from pyruntime.ops.step import View
from pyruntime.spec import MLP, Activation, Norm, NormKind

_ACTIVATIONS: Final[Mapping[Activation, Callable[[torch.Tensor], torch.Tensor]]] = {
    Activation.SILU: functional.silu,
    Activation.GELU: functional.gelu,
    Activation.GELU_TANH: lambda x: functional.gelu(x, approximate="tanh"),
    Activation.RELU: functional.relu,
    Activation.RELU2: lambda x: functional.relu(x).square(),
}


@dataclass(frozen=True, slots=True)
class MlpAttrs:
    """down(act(gate x) * up x), with the pre-norm and the residual add once they were fused in."""

    mlp: MLP
    norm: Norm | None = None
    residual: bool = False

    def weight_shapes(self) -> dict[str, Shape]:
        """Norm, gate, up, sub-norm and down."""
        mlp = self.mlp
        shapes = norm_shapes("norm", self.norm) | linear_shapes("gate", mlp.gate) | linear_shapes("up", mlp.up)
        return shapes | norm_shapes("sub", mlp.sub) | linear_shapes("down", mlp.down)

    def in_widths(self) -> tuple[int, ...]:
        """x, then the residual."""
        residual = (self.mlp.out_size,) if self.residual else ()
        return (self.mlp.in_size, *residual)

    def out_widths(self) -> tuple[int, ...]:
        """The output of down."""
        return (self.mlp.out_size,)

    def flops_per_row(self) -> int:
        """Three products, or two without a gate."""
        return linear_flops(self.mlp.gate, self.mlp.up, self.mlp.down)


def reference(
    attrs: MlpAttrs, weights: Mapping[str, torch.Tensor], inputs: Sequence[torch.Tensor], view: View
) -> tuple[torch.Tensor, ...]:
    """[rows, hidden]."""
    y = forward(attrs, weights, inputs[0])
    return (inputs[1] + y if attrs.residual else y,)


def on_cpu(
    attrs: MlpAttrs, weights: Mapping[str, torch.Tensor], inputs: Sequence[torch.Tensor], view: View
) -> tuple[torch.Tensor, ...]:
    """[rows, hidden], by the C++ kernel; see `refused_by_cpu` for what it takes."""
    x = inputs[0].contiguous()
    residual = inputs[1].contiguous() if attrs.residual else torch.zeros_like(x)
    assert attrs.norm is not None
    names = ("gate.weight", "up.weight", "down.weight")
    gate, up, down = (weights[name] for name in names)
    return (_native.mlp_float32(x, weights["norm.weight"], attrs.norm.eps, gate, up, down, residual),)


def refused_by_cpu(attrs: MlpAttrs, dtype: torch.dtype) -> str | None:
    """Why the C++ kernel cannot run these attributes, or None."""
    mlp, norm = attrs.mlp, attrs.norm
    if dtype is not torch.float32:
        return f"dtype {dtype} is not float32"
    if norm is None or norm.kind is not NormKind.RMS or not norm.weight or norm.bias:
        return "it needs an RMSNorm with gain fused in"
    if mlp.gate is None or mlp.activation is not Activation.SILU or mlp.sub is not None:
        return "it needs a gated SiLU MLP without a norm inside"
    if mlp.gate.bias or mlp.up.bias or mlp.down.bias:
        return "it has no biases"
    return None if mlp.in_size == mlp.out_size else "its output must be as wide as its input"


def forward(attrs: MlpAttrs, weights: Mapping[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """The MLP of `x` [rows, hidden], norm included, residual not."""
    mlp = attrs.mlp
    activation = _ACTIVATIONS[mlp.activation]
    x = norm_of(attrs.norm, "norm", weights, x)
    up = project("up", weights, x)
    hidden = activation(up) if mlp.gate is None else activation(project("gate", weights, x)) * up
    return project("down", weights, norm_of(mlp.sub, "sub", weights, hidden))
