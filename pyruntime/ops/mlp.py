"""K4, K5: norm, gate and up, activation, down and residual as one op."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch.nn import functional

from pyruntime.ops.attrs import Shape, linear_flops, linear_shapes, norm_shapes
from pyruntime.ops.layout import Layout, matrix_layouts, norm_layouts
from pyruntime.ops.linear import project
from pyruntime.ops.native_step import NativeNode, NativeStep, padded
from pyruntime.ops.norm import norm_of
from pyruntime.ops.step import View
from pyruntime.spec import MLP, Activation, Norm

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


def layouts(attrs: MlpAttrs) -> dict[str, Layout]:
    """Norms, gate and up as one matrix, and down."""
    mlp = attrs.mlp
    gated = mlp.gate is not None
    inner = {"gate": mlp.gate, "up": mlp.up}
    found = norm_layouts("norm", attrs.norm) | matrix_layouts("gate_up", inner, gated=gated)
    return found | norm_layouts("sub", mlp.sub) | matrix_layouts("down", {"down": mlp.down})


def on_cpu(attrs: MlpAttrs, node: NativeNode) -> list[NativeStep]:
    """One step."""
    return [native_step(attrs, node, "", node.inputs[0], node.residual(attrs.residual), node.outputs[0])]


def native_step(
    attrs: MlpAttrs, node: NativeNode, prefix: str, stream: int, residual: int | None, out: int
) -> NativeStep:
    """The step of one MLP whose weights were arranged under `prefix`, between the places given."""
    mlp = attrs.mlp
    hidden = mlp.up.out_features
    gated = mlp.gate is not None
    return node.step(
        "mlp",
        norm=node.norm(f"{prefix}norm", attrs.norm),
        sub=node.norm(f"{prefix}sub", mlp.sub),
        gate_up=node.matrix(f"{prefix}gate_up", mlp.in_size, 2 * padded(hidden) if gated else hidden),
        down=node.matrix(f"{prefix}down", hidden, mlp.out_size),
        gated=gated,
        activation=str(mlp.activation),
        input=stream,
        residual=residual,
        out=out,
    )


def forward(attrs: MlpAttrs, weights: Mapping[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """The MLP of `x` [rows, hidden], norm included, residual not."""
    mlp = attrs.mlp
    activation = _ACTIVATIONS[mlp.activation]
    x = norm_of(attrs.norm, "norm", weights, x)
    up = project("up", weights, x)
    hidden = activation(up) if mlp.gate is None else activation(project("gate", weights, x)) * up
    return project("down", weights, norm_of(mlp.sub, "sub", weights, hidden))
