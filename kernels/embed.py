"""Rows of the embedding table, and of a table of learned positions (Triton)."""

import triton
import triton.language as tl

from pyruntime.kernels._common import let_next_start, wait_for_inputs


@triton.jit
def embed_kernel(
    ids_ptr,  # [rows] int32
    positions_ptr,  # [rows] int32, unread without HAS_POSITIONS
    table_ptr,  # [vocabulary, size]
    position_table_ptr,  # [positions, size], unread without HAS_POSITIONS
    out_ptr,  # [rows, size]
    size,
    out_stride,
    scale,
    HAS_POSITIONS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """out = table[ids] * scale (+ position_table[positions]). A program per row and block of it."""
    wait_for_inputs(PDL)
    let_next_start(PDL)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < size
    token = tl.load(ids_ptr + row).to(tl.int64)
    y = tl.load(table_ptr + token * size + columns, mask=inside, other=0.0).to(tl.float32) * scale
    if HAS_POSITIONS:
        position = tl.load(positions_ptr + row).to(tl.int64)
        y += tl.load(position_table_ptr + position * size + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * out_stride + columns, y.to(out_ptr.dtype.element_ty), mask=inside)
