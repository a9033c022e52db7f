"""A residual add that no op took in, on a GPU."""

from __future__ import annotations

from typing import Final

import triton

from pyruntime.kernels.add import add_kernel
from pyruntime.ops.add import AddAttrs
from pyruntime.ops.gpu.device import refused_dtype as refuses
from pyruntime.ops.gpu.frame import Frame, GpuNode, Launch
from pyruntime.ops.layout import Layout

__all__ = ["layouts", "on_gpu", "refuses"]

_BLOCK: Final = 1024


def layouts(attrs: AddAttrs) -> dict[str, Layout]:
    """None."""
    return {}


def on_gpu(attrs: AddAttrs, node: GpuNode) -> Launch:
    """One launch for any number of rows."""
    width = attrs.width

    def launch(frame: Frame) -> None:
        (stream, other), (out,) = frame.inputs, frame.outputs
        grid = (frame.view.num_rows, triton.cdiv(width, _BLOCK))
        strides = (stream.stride(0), other.stride(0), out.stride(0))
        frame.launch(add_kernel, grid, stream, other, out, width, *strides, BLOCK=_BLOCK)

    return launch
