"""Matrix products with what stands in front of them and behind: few rows in one kernel, of many rows what follows."""

import triton
import triton.language as tl

from pyruntime.kernels._common import dot, let_next_start, wait_for_inputs

# steps of the inputs whose weights are on their way before the kernel in front has ended
AHEAD = tl.constexpr(4)


@triton.jit(do_not_specialize=["rows"])
def product_kernel(
    x_ptr,  # [rows, inputs]
    gain_ptr,  # [inputs] float32, unread without HAS_GAIN
    weight_ptr,  # [outputs, inputs], GATED: [2 * outputs, inputs], the gate above what it is multiplied with
    bias_ptr,  # float32, one for each row of the weight, unread without HAS_BIAS
    residual_ptr,  # [rows, outputs], unread without HAS_RESIDUAL
    out_ptr,  # [rows, outputs]; may be residual_ptr, not x_ptr
    partial_ptr,  # [row blocks, tiles, SPLITS, 2 if GATED else 1, BLOCK_ROWS, BLOCK_OUTPUTS] float32, if SPLITS > 1
    squares_ptr,  # [row blocks, tiles, SPLITS, BLOCK_ROWS] float32, if SPLITS > 1
    counter_ptr,  # [row blocks, tiles] int32 zeros, if SPLITS > 1; zeros again at the end
    rows,
    inputs,
    outputs,
    x_stride,
    residual_stride,
    out_stride,
    eps,
    softcap,
    HAS_NORM: tl.constexpr,
    HAS_GAIN: tl.constexpr,  # only with HAS_NORM
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
    BLOCK_INPUTS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    SPLITS: tl.constexpr,
    PDL: tl.constexpr,
):
    """out = finished(W norm(x) + bias) (+ residual). Grid: SPLITS of the inputs, tiles of outputs, blocks of rows.

    The weights are the left operand, rows of x the narrow right one. RMSNorm is deferred: x * gain goes into the
    product, and 1 / sqrt(mean(x^2) + eps), one number a row, multiplies the sums (Graef et al. 2024, "FlashNorm").
    Of the programs that split a tile, the last to arrive adds up all parts, in their order, and finishes the tile.
    """
    split = tl.program_id(0)
    tile = tl.program_id(1)
    place = (tl.program_id(2) * tl.num_programs(1) + tile).to(tl.int64)
    n = (tile * BLOCK_OUTPUTS + tl.arange(0, BLOCK_OUTPUTS)).to(tl.int64)
    m = (tl.program_id(2) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
    n_mask, m_mask = n < outputs, m < rows
    num_steps = tl.cdiv(inputs, BLOCK_INPUTS)
    begin, end = split * num_steps // SPLITS, (split + 1) * num_steps // SPLITS
    weight_rows = weight_ptr + n[:, None] * inputs
    factor_rows = weight_ptr + (n + outputs)[:, None] * inputs
    if PDL:
        fetch(weight_ptr, weight_rows, n_mask, begin * BLOCK_INPUTS, inputs, BLOCK_INPUTS)
        if GATED:
            fetch(weight_ptr, factor_rows, n_mask, begin * BLOCK_INPUTS, inputs, BLOCK_INPUTS)
    wait_for_inputs(PDL)

    x_rows = x_ptr + m[:, None] * x_stride
    acc = tl.zeros((BLOCK_OUTPUTS, BLOCK_ROWS), tl.float32)
    factor = tl.zeros((BLOCK_OUTPUTS, BLOCK_ROWS), tl.float32)
    squares = tl.zeros((BLOCK_ROWS, BLOCK_INPUTS), tl.float32)
    for step in range(begin, end):
        k = step * BLOCK_INPUTS + tl.arange(0, BLOCK_INPUTS)
        k_mask = k < inputs
        x = tl.load(x_rows + k[None, :], mask=m_mask[:, None] & k_mask[None, :], other=0.0)
        mask = n_mask[:, None] & k_mask[None, :]
        weight = tl.load(weight_rows + k[None, :], mask=mask, other=0.0, eviction_policy="evict_first")
        if HAS_NORM:
            x = x.to(tl.float32)
            squares += x * x
            if HAS_GAIN:
                x *= tl.load(gain_ptr + k, mask=k_mask, other=0.0)[None, :]
        columns = tl.trans(x.to(weight.dtype))
        acc = dot(weight, columns, acc)
        if GATED:
            weight = tl.load(factor_rows + k[None, :], mask=mask, other=0.0, eviction_policy="evict_first")
            factor = dot(weight, columns, factor)
    let_next_start(PDL)

    sums = tl.sum(squares, axis=1)
    parts: tl.constexpr = 2 if GATED else 1
    size: tl.constexpr = BLOCK_OUTPUTS * BLOCK_ROWS
    within = tl.arange(0, BLOCK_ROWS)[None, :] * BLOCK_OUTPUTS + tl.arange(0, BLOCK_OUTPUTS)[:, None]
    partials = partial_ptr + place * (SPLITS * parts * size) + within
    row_squares = squares_ptr + place * (SPLITS * BLOCK_ROWS) + tl.arange(0, BLOCK_ROWS)
    arrived = SPLITS - 1
    if SPLITS > 1:
        tl.store(partials + split * (parts * size), acc, mask=m_mask[None, :])
        if GATED:
            tl.store(partials + (split * parts + 1) * size, factor, mask=m_mask[None, :])
        if HAS_NORM:
            tl.store(row_squares + split * BLOCK_ROWS, sums, mask=m_mask)
        # one thread speaks for all: what the others stored must be there before
        tl.debug_barrier()
        arrived = tl.atomic_add(counter_ptr + place, 1, sem="acq_rel", scope="gpu")
    if arrived == SPLITS - 1:
        if SPLITS > 1:
            tl.store(counter_ptr + place, 0)
            acc = added_up(partials, m_mask[None, :], SPLITS, parts * size)
            if GATED:
                factor = added_up(partials + size, m_mask[None, :], SPLITS, parts * size)
            if HAS_NORM:
                sums = added_up(row_squares, m_mask, SPLITS, BLOCK_ROWS)
        if HAS_NORM:
            scale = 1.0 / tl.sqrt(sums / inputs + eps)
            acc *= scale[None, :]
            factor *= scale[None, :]
        if HAS_BIAS:
            acc += tl.load(bias_ptr + n, mask=n_mask, other=0.0)[:, None]
            if GATED:
                factor += tl.load(bias_ptr + outputs + n, mask=n_mask, other=0.0)[:, None]
        y = finished(acc, factor, softcap, ACTIVATION, GATED, HAS_SOFTCAP)
        mask = n_mask[:, None] & m_mask[None, :]
        if HAS_RESIDUAL:
            residual = tl.load(residual_ptr + m[None, :] * residual_stride + n[:, None], mask=mask, other=0.0)
            y += residual.to(tl.float32)
        tl.store(out_ptr + m[None, :] * out_stride + n[:, None], y.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def finish_kernel(
    product_ptr,  # [rows, outputs], GATED: [rows, 2 * outputs], the gate before what it is multiplied with
    bias_ptr,  # float32, one for each column of the product, unread without HAS_BIAS
    residual_ptr,  # [rows, outputs], unread without HAS_RESIDUAL
    out_ptr,  # [rows, outputs]; may be residual_ptr
    outputs,
    product_stride,
    residual_stride,
    out_stride,
    softcap,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """out = finished(product + bias) (+ residual). Grid: rows, blocks of outputs."""
    row = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = n < outputs
    wait_for_inputs(PDL)
    let_next_start(PDL)
    product = product_ptr + row * product_stride + n
    y = tl.load(product, mask=mask, other=0.0).to(tl.float32)
    factor = tl.zeros((BLOCK,), tl.float32)
    if GATED:
        factor = tl.load(product + outputs, mask=mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        y += tl.load(bias_ptr + n, mask=mask, other=0.0)
        if GATED:
            factor += tl.load(bias_ptr + outputs + n, mask=mask, other=0.0)
    y = finished(y, factor, softcap, ACTIVATION, GATED, HAS_SOFTCAP)
    if HAS_RESIDUAL:
        y += tl.load(residual_ptr + row * residual_stride + n, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * out_stride + n, y.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def fetch(first, row_ptrs, row_mask, begin, inputs, BLOCK_INPUTS: tl.constexpr):
    """Bring the next AHEAD steps of some rows [rows, 1] into the L2 cache; `first` is an address that is there."""
    line: tl.constexpr = 1024 // first.dtype.element_ty.primitive_bitwidth
    k = begin + tl.arange(0, AHEAD * BLOCK_INPUTS // line) * line
    ptrs = tl.where(row_mask[:, None] & (k < inputs)[None, :], row_ptrs + k[None, :], first)
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [ptrs], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def added_up(ptrs, mask, COUNT: tl.constexpr, STRIDE: tl.constexpr):
    """The sum of COUNT parts that other programs wrote, first to last."""
    total = tl.load(ptrs, mask=mask, other=0.0, cache_modifier=".cg")
    for i in tl.static_range(1, COUNT):
        total += tl.load(ptrs + i * STRIDE, mask=mask, other=0.0, cache_modifier=".cg")
    return total


@triton.jit
def finished(y, factor, softcap, ACTIVATION: tl.constexpr, GATED: tl.constexpr, HAS_SOFTCAP: tl.constexpr):
    """softcap * tanh(activation(y) * factor / softcap), each where it is there."""
    y = activated(y, ACTIVATION)
    if GATED:
        y *= factor
    if HAS_SOFTCAP:
        y = softcap * (2.0 * tl.sigmoid(2.0 * y / softcap) - 1.0)
    return y


@triton.jit
def activated(x, ACTIVATION: tl.constexpr):
    """The activation of that name in spec.Activation; x itself for any other."""
    if ACTIVATION == "silu":
        x = x * tl.sigmoid(x)
    elif ACTIVATION == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        # 0.5 * (1 + tanh(z)) = sigmoid(2 * z) with z = sqrt(2 / pi) * (x + 0.044715 * x^3)
        x = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif ACTIVATION == "relu":
        x = tl.maximum(x, 0.0)
    elif ACTIVATION == "relu2":
        x = tl.maximum(x, 0.0) * tl.maximum(x, 0.0)
    return x
