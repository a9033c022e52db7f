"""A residual add that no op took in, on a GPU."""

from __future__ import annotations

from typing import Final

import torch
import triton

from pyruntime.kernels.add import add_kernel
from pyruntime.ops.add import AddAttrs
from pyruntime.ops.gpu.frame import Frame, GpuNode, Launch
from pyruntime.ops.layout import Layout

_BLOCK: Final = 1024


def layouts(attrs: AddAttrs) -> dict[str, Layout]:
    """None."""
    return {}


def refuses(attrs: AddAttrs, dtype: torch.dtype) -> str | None:
    """Why the kernel cannot run it, or None."""
    return "float64 is not computed on a GPU" if dtype is torch.float64 else None


def on_gpu(attrs: AddAttrs, node: GpuNode) -> Launch:
    """One launch for any number of rows."""
    width = attrs.width

    def launch(frame: Frame) -> None:
        (stream, other), (out,) = frame.inputs, frame.outputs
        grid = (frame.view.num_rows, triton.cdiv(width, _BLOCK))
        strides = (stream.stride(0), other.stride(0), out.stride(0))
        frame.launch(add_kernel, grid, stream, other, out, width, *strides, BLOCK=_BLOCK)

    return launch
