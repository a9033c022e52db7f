"""The wanted rows of a buffer that holds all rows, on a GPU."""

from __future__ import annotations

from typing import Final

import triton

from pyruntime.kernels.gather import gather_kernel
from pyruntime.ops.gather import GatherAttrs
from pyruntime.ops.gpu.device import refused_dtype as refuses
from pyruntime.ops.gpu.frame import Frame, GpuNode, Launch
from pyruntime.ops.layout import Layout

__all__ = ["layouts", "on_gpu", "refuses"]

_BLOCK: Final = 1024


def layouts(attrs: GatherAttrs) -> dict[str, Layout]:
    """None."""
    return {}


def on_gpu(attrs: GatherAttrs, node: GpuNode) -> Launch:
    """One launch for any number of rows."""
    width = attrs.width

    def launch(frame: Frame) -> None:
        (x,), (out,), view = frame.inputs, frame.outputs, frame.view
        grid = (view.num_rows, triton.cdiv(width, _BLOCK))
        frame.launch(gather_kernel, grid, x, view.index, out, width, x.stride(0), out.stride(0), BLOCK=_BLOCK)

    return launch
