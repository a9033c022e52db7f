"""K7 on a GPU: final norm and the map to the vocabulary."""

from __future__ import annotations

from pyruntime.ops.gpu.device import refused_dtype as refuses
from pyruntime.ops.gpu.frame import Frame, GpuNode, Launch
from pyruntime.ops.gpu.product import Product, product_on_gpu
from pyruntime.ops.head import HeadAttrs
from pyruntime.ops.layout import Layout, norm_layouts, row_layouts

__all__ = ["layouts", "on_gpu", "refuses"]


def layouts(attrs: HeadAttrs) -> dict[str, Layout]:
    """Norm and matrix."""
    return norm_layouts("norm", attrs.norm) | row_layouts("matrix", {"linear": attrs.head.linear})


def on_gpu(attrs: HeadAttrs, node: GpuNode) -> Launch:
    """One product."""
    linear, softcap = attrs.head.linear, attrs.head.softcap
    made = Product("matrix", linear.in_features, linear.out_features, attrs.norm, softcap=softcap)
    product = product_on_gpu(made, node)

    def launch(frame: Frame) -> None:
        product(frame, frame.inputs[0], frame.outputs[0], None)

    return launch
