"""Residual addition and RMSNorm in one pass (Triton)."""

import triton
import triton.language as tl


@triton.jit
def norm_kernel(
    x_ptr,  # [rows, hidden]
    residual_ptr,  # [rows, hidden], unread without HAS_RESIDUAL
    weight_ptr,  # [hidden]
    sum_out_ptr,  # [rows, hidden], unwritten without HAS_RESIDUAL; may be residual_ptr
    out_ptr,  # [rows, hidden]
    hidden,
    x_stride,
    residual_stride,
    sum_out_stride,
    out_stride,
    eps,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK: tl.constexpr,  # a power of two, at least hidden
):
    """sum_out = x + residual; out = sum_out / sqrt(mean(sum_out^2) + eps) * weight. One program per row.

    The norm is taken of the sum as stored, so the result is that of two separate steps.
    """
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK).to(tl.int64)
    mask = columns < hidden
    state = tl.load(x_ptr + row * x_stride + columns, mask=mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        state += tl.load(residual_ptr + row * residual_stride + columns, mask=mask, other=0.0).to(tl.float32)
        rounded = state.to(sum_out_ptr.dtype.element_ty)
        tl.store(sum_out_ptr + row * sum_out_stride + columns, rounded, mask=mask)
        state = rounded.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(state * state, axis=0) / hidden + eps)
    weight = tl.load(weight_ptr + columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * out_stride + columns, (state * scale * weight).to(out_ptr.dtype.element_ty), mask=mask)
