"""A residual add that no other kernel took in (Triton)."""

import triton
import triton.language as tl

from pyruntime.kernels._common import let_next_start, wait_for_inputs


@triton.jit
def add_kernel(
    stream_ptr,  # [rows, width]
    other_ptr,  # [rows, width]
    out_ptr,  # [rows, width]; may be stream_ptr or other_ptr
    width,
    stream_stride,
    other_stride,
    out_stride,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """out = stream + other. A program per row and block of it."""
    wait_for_inputs(PDL)
    let_next_start(PDL)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    y = tl.load(stream_ptr + row * stream_stride + columns, mask=inside, other=0.0).to(tl.float32)
    y += tl.load(other_ptr + row * other_stride + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * out_stride + columns, y.to(out_ptr.dtype.element_ty), mask=inside)
