"""RMSNorm and LayerNorm of rows, with the residual add behind a post-norm (Triton)."""

import triton
import triton.language as tl

from pyruntime.kernels._common import let_next_start, wait_for_inputs


@triton.jit
def norm_kernel(
    x_ptr,  # [rows, size]
    gain_ptr,  # [size], unread without HAS_GAIN
    bias_ptr,  # [size], unread without HAS_BIAS
    residual_ptr,  # [rows, size], unread without HAS_RESIDUAL
    out_ptr,  # [rows, size]; may be x_ptr or residual_ptr
    size,
    x_stride,
    residual_stride,
    out_stride,
    eps,
    LAYER: tl.constexpr,
    HAS_GAIN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK: tl.constexpr,  # a power of two
    PDL: tl.constexpr,
):
    """out = x / sqrt(mean(x^2) + eps) * gain + bias (+ residual); LAYER subtracts the mean of x first.

    One program per row. The second and third look at the row find it in the processor's own cache.
    """
    wait_for_inputs(PDL)
    let_next_start(PDL)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    x_ptr += row * x_stride
    mean = 0.0
    if LAYER:
        sums = tl.zeros((BLOCK,), tl.float32)
        for start in tl.range(0, size, BLOCK):
            inside = start + columns < size
            sums += tl.load(x_ptr + start + columns, mask=inside, other=0.0).to(tl.float32)
        mean = tl.sum(sums, axis=0) / size
    squares = tl.zeros((BLOCK,), tl.float32)
    for start in tl.range(0, size, BLOCK):
        inside = start + columns < size
        x = tl.load(x_ptr + start + columns, mask=inside, other=0.0).to(tl.float32)
        x = tl.where(inside, x - mean, 0.0)
        squares += x * x
    scale = 1.0 / tl.sqrt(tl.sum(squares, axis=0) / size + eps)
    for start in tl.range(0, size, BLOCK):
        inside = start + columns < size
        y = (tl.load(x_ptr + start + columns, mask=inside, other=0.0).to(tl.float32) - mean) * scale
        if HAS_GAIN:
            y *= tl.load(gain_ptr + start + columns, mask=inside, other=0.0)
        if HAS_BIAS:
            y += tl.load(bias_ptr + start + columns, mask=inside, other=0.0)
        if HAS_RESIDUAL:
            residual = tl.load(residual_ptr + row * residual_stride + start + columns, mask=inside, other=0.0)
            y += residual.to(tl.float32)
        tl.store(out_ptr + row * out_stride + start + columns, y.to(out_ptr.dtype.element_ty), mask=inside)
