"""K3 on a GPU: a linear map with its norm in front and its residual add behind."""

from __future__ import annotations

from pyruntime.ops.gpu.device import refused_dtype as refuses
from pyruntime.ops.gpu.frame import Frame, GpuNode, Launch
from pyruntime.ops.gpu.product import Product, product_on_gpu
from pyruntime.ops.layout import Layout, norm_layouts, row_layouts
from pyruntime.ops.linear import LinearAttrs

__all__ = ["layouts", "on_gpu", "refuses"]


def layouts(attrs: LinearAttrs) -> dict[str, Layout]:
    """Norm and matrix."""
    return norm_layouts("norm", attrs.norm) | row_layouts("matrix", {"linear": attrs.linear})


def on_gpu(attrs: LinearAttrs, node: GpuNode) -> Launch:
    """One product."""
    linear = attrs.linear
    product = product_on_gpu(Product("matrix", linear.in_features, linear.out_features, attrs.norm), node)

    def launch(frame: Frame) -> None:
        product(frame, frame.inputs[0], frame.outputs[0], frame.inputs[1] if attrs.residual else None)

    return launch
