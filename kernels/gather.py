"""The wanted rows of a buffer that holds all rows (Triton)."""

import triton
import triton.language as tl

from pyruntime.kernels._common import let_next_start, wait_for_inputs


@triton.jit
def gather_kernel(
    x_ptr,  # [all rows, width]
    index_ptr,  # [rows] int32
    out_ptr,  # [rows, width]
    width,
    x_stride,
    out_stride,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """out = x[index]. A program per row and block of it."""
    wait_for_inputs(PDL)
    let_next_start(PDL)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    source = tl.load(index_ptr + row).to(tl.int64)
    y = tl.load(x_ptr + source * x_stride + columns, mask=inside, other=0.0)
    tl.store(out_ptr + row * out_stride + columns, y.to(out_ptr.dtype.element_ty), mask=inside)
