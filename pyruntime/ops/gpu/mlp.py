"""K4, K5 on a GPU: gate and up with their activation, then down with the residual add."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pyruntime.ops.gpu.device import refused_dtype as refuses
from pyruntime.ops.gpu.frame import Frame, GpuNode, Launch
from pyruntime.ops.gpu.product import Product, product_on_gpu
from pyruntime.ops.layout import Layout, norm_layouts, row_layouts
from pyruntime.ops.mlp import MlpAttrs

__all__ = ["layouts", "on_gpu", "part_on_gpu", "refuses"]


def layouts(attrs: MlpAttrs) -> dict[str, Layout]:
    """Norms, gate above up as one matrix, and down."""
    mlp = attrs.mlp
    inner = row_layouts("gate_up", {"gate": mlp.gate, "up": mlp.up})
    outer = row_layouts("down", {"down": mlp.down})
    return norm_layouts("norm", attrs.norm) | inner | norm_layouts("sub", mlp.sub) | outer


def on_gpu(attrs: MlpAttrs, node: GpuNode) -> Launch:
    """Two products, between them the hidden values in scratch memory."""
    part = part_on_gpu(attrs, node)

    def launch(frame: Frame) -> None:
        part(frame, frame.inputs[0], frame.outputs[0], frame.inputs[1] if attrs.residual else None)

    return launch


def part_on_gpu(attrs: MlpAttrs, node: GpuNode) -> Callable[[Frame, Tensor, Tensor, Tensor | None], None]:
    """The launches of one MLP from x to out (+ residual), which may be the same memory."""
    mlp = attrs.mlp
    size = mlp.up.out_features
    inner = Product("gate_up", mlp.in_size, size, attrs.norm, activation=mlp.activation, gated=mlp.gate is not None)
    gate_up = product_on_gpu(inner, node)
    down = product_on_gpu(Product("down", size, mlp.out_size, mlp.sub, "sub"), node)
    # a norm behind it sees the values before they are rounded
    dtype = node.dtype if mlp.sub is None else torch.float32

    def launch(frame: Frame, x: Tensor, out: Tensor, residual: Tensor | None) -> None:
        hidden = frame.scratch((x.shape[0], size), dtype)
        gate_up(frame, x, hidden, None)
        down(frame, hidden, out, residual)

    return launch
