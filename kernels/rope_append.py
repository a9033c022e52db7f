"""Norms of heads, rotary embedding and the write into the pages, of values that lie in some columns (Triton)."""

import triton
import triton.language as tl

from pyruntime.kernels._common import let_next_start, wait_for_inputs

# bits of Q_NORM, K_NORM and V_NORM: whether there is a norm, over all heads and not each, minus the mean, times a gain,
# plus a bias
NORMED = tl.constexpr(1)
OVER_HEADS = tl.constexpr(2)
CENTERED = tl.constexpr(4)
HAS_GAIN = tl.constexpr(8)
HAS_SHIFT = tl.constexpr(16)


@triton.jit(do_not_specialize=["page_table_stride"])
def rope_append_kernel(
    input_ptr,  # [rows, in_size], normed; unread without HAS_INPUT
    product_ptr,  # [rows, outputs], unread without HAS_PRODUCT
    bias_ptr,  # [outputs] float32, unread without HAS_BIAS
    columns_ptr,  # int32, columns of the queries, keys and values that are computed; unread without HAS_COLUMNS
    positions_ptr,  # [rows] int32
    sequences_ptr,  # [rows] int32
    page_table_ptr,  # [sequences, pages] int32
    cos_ptr,  # [positions, HALF] float32, unread if HALF is 0
    sin_ptr,
    q_gain_ptr,  # float32, [HEAD_DIM] or one for each value; unread where Q_NORM says so, and so on
    q_shift_ptr,
    k_gain_ptr,
    k_shift_ptr,
    v_gain_ptr,
    v_shift_ptr,
    q_ptr,  # [rows, Q_HEADS, HEAD_DIM]
    keys_ptr,  # [pages, PAGE_SIZE, KV_HEADS, HEAD_DIM]
    values_ptr,
    in_size,
    q_begin,  # column of the first query value, or with HAS_COLUMNS the place of its number; and so on
    k_begin,
    v_begin,
    input_stride,
    product_stride,
    page_table_stride,
    q_stride,
    q_eps,
    k_eps,
    v_eps,
    Q_NORM: tl.constexpr,
    K_NORM: tl.constexpr,
    V_NORM: tl.constexpr,
    Q_HEADS: tl.constexpr,  # 0 where queries are not computed
    KV_HEADS: tl.constexpr,  # 0 where keys and values are not
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,  # pairs of a head that turn
    PAGE_SIZE: tl.constexpr,
    HAS_INPUT: tl.constexpr,
    HAS_PRODUCT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_COLUMNS: tl.constexpr,
    Q_TILE: tl.constexpr,  # heads of a program, a power of two; all of them where a norm is over heads
    KV_TILE: tl.constexpr,
    DIMS: tl.constexpr,  # a power of two, at least HEAD_DIM
    PDL: tl.constexpr,
):
    """Values by column number, those of the input first, of the product behind them, to queries and into the pages.

    Grid: rows, tiles of query heads, then of key heads, then of value heads.
    """
    wait_for_inputs(PDL)
    let_next_start(PDL)
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    x_row = input_ptr + row * input_stride
    product_row = product_ptr + row * product_stride
    position = tl.load(positions_ptr + row)
    cos_row = cos_ptr + position.to(tl.int64) * HALF
    sin_row = sin_ptr + position.to(tl.int64) * HALF
    q_tiles: tl.constexpr = (Q_HEADS + Q_TILE - 1) // Q_TILE
    kv_tiles: tl.constexpr = (KV_HEADS + KV_TILE - 1) // KV_TILE
    # a condition on a constant stands alone: only then is what it guards not compiled
    if Q_HEADS > 0:  # noqa: SIM102
        if tile < q_tiles:
            put_heads(
                x_row, product_row, bias_ptr, columns_ptr, input_ptr, 1.0, in_size, q_begin,
                q_gain_ptr, q_shift_ptr, q_eps, cos_row, sin_row, q_ptr + row * q_stride, tile * Q_TILE, Q_HEADS,
                HEAD_DIM, HALF, Q_NORM, HAS_INPUT, HAS_PRODUCT, HAS_BIAS, HAS_COLUMNS, False, Q_TILE, DIMS,
            )  # fmt: skip
    if KV_HEADS > 0:  # noqa: SIM102
        if tile >= q_tiles:
            slot = slot_of(sequences_ptr, page_table_ptr, row, position, page_table_stride, PAGE_SIZE)
            slot *= KV_HEADS * HEAD_DIM
            first = (tile - q_tiles) % kv_tiles * KV_TILE
            if tile < q_tiles + kv_tiles:
                put_heads(
                    x_row, product_row, bias_ptr, columns_ptr, input_ptr, 1.0, in_size, k_begin,
                    k_gain_ptr, k_shift_ptr, k_eps, cos_row, sin_row, keys_ptr + slot, first, KV_HEADS,
                    HEAD_DIM, HALF, K_NORM, HAS_INPUT, HAS_PRODUCT, HAS_BIAS, HAS_COLUMNS, False, KV_TILE, DIMS,
                )  # fmt: skip
            else:
                put_heads(
                    x_row, product_row, bias_ptr, columns_ptr, input_ptr, 1.0, in_size, v_begin,
                    v_gain_ptr, v_shift_ptr, v_eps, cos_row, sin_row, values_ptr + slot, first, KV_HEADS,
                    HEAD_DIM, 0, V_NORM, HAS_INPUT, HAS_PRODUCT, HAS_BIAS, HAS_COLUMNS, False, KV_TILE, DIMS,
                )  # fmt: skip


@triton.jit
def slot_of(sequences_ptr, page_table_ptr, row, position, page_table_stride, PAGE_SIZE: tl.constexpr):
    """Where the token of a row, or of each of some rows, stands in the cache: page * PAGE_SIZE + offset, int64."""
    sequence = tl.load(sequences_ptr + row).to(tl.int64)
    page = tl.load(page_table_ptr + sequence * page_table_stride + position // PAGE_SIZE)
    return page.to(tl.int64) * PAGE_SIZE + position % PAGE_SIZE


@triton.jit
def put_heads(
    x_row,  # [in_size], a row of the input, unread without HAS_INPUT
    product_row,  # [outputs], unread without HAS_PRODUCT
    bias_ptr,
    columns_ptr,
    pre_gain_ptr,  # [in_size] float32, unread without HAS_PRE_GAIN
    pre_scale,  # times the input
    in_size,
    begin,
    gain_ptr,
    shift_ptr,
    eps,
    cos_row,  # [HALF]
    sin_row,
    out_row,  # [NUM_HEADS, HEAD_DIM]
    first,  # the first head
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    NORM: tl.constexpr,
    HAS_INPUT: tl.constexpr,
    HAS_PRODUCT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_COLUMNS: tl.constexpr,
    HAS_PRE_GAIN: tl.constexpr,
    TILE: tl.constexpr,
    DIMS: tl.constexpr,
):
    """Some heads of one row: their values by column number, normed, turned, stored."""
    head = first + tl.arange(0, TILE)[:, None]
    dim = tl.arange(0, DIMS)[None, :]
    mask = (head < NUM_HEADS) & (dim < HEAD_DIM)
    n = head * HEAD_DIM + dim
    y = values_at(
        x_row, product_row, bias_ptr, columns_ptr, pre_gain_ptr, pre_scale, in_size, begin, n, mask,
        HAS_INPUT, HAS_PRODUCT, HAS_BIAS, HAS_COLUMNS, HAS_PRE_GAIN,
    )  # fmt: skip
    if NORMED & NORM:
        mean, scale = statistics(y, mask, eps, NORM, NUM_HEADS, HEAD_DIM)
        y = normed(y, mean, scale, gain_ptr, shift_ptr, n, dim, mask, NORM)
    if HALF > 0:
        # each value turns with its partner, which this processor has just read
        partner = tl.where(dim < HALF, dim + HALF, dim - HALF)
        turned = mask & (dim < 2 * HALF)
        n_partner = head * HEAD_DIM + partner
        z = values_at(
            x_row, product_row, bias_ptr, columns_ptr, pre_gain_ptr, pre_scale, in_size, begin, n_partner, turned,
            HAS_INPUT, HAS_PRODUCT, HAS_BIAS, HAS_COLUMNS, HAS_PRE_GAIN,
        )  # fmt: skip
        if NORMED & NORM:
            z = normed(z, mean, scale, gain_ptr, shift_ptr, n_partner, partner, turned, NORM)
        angle = tl.where(dim < HALF, dim, partner)
        cos = tl.load(cos_row + angle, mask=dim < 2 * HALF, other=1.0)
        sin = tl.load(sin_row + angle, mask=dim < 2 * HALF, other=0.0)
        y = y * cos + tl.where(dim < HALF, -z, z) * sin
    tl.store(out_row + n, y.to(out_row.dtype.element_ty), mask=mask)


@triton.jit
def values_at(
    x_row,
    product_row,
    bias_ptr,
    columns_ptr,
    pre_gain_ptr,
    pre_scale,
    in_size,
    begin,
    n,
    mask,
    HAS_INPUT: tl.constexpr,
    HAS_PRODUCT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_COLUMNS: tl.constexpr,
    HAS_PRE_GAIN: tl.constexpr,
):
    """The values `n` of a role in float32: of the input, scaled, or of the product with its bias."""
    column = begin + n
    if HAS_COLUMNS:
        column = tl.load(columns_ptr + column, mask=mask, other=0)
    y = tl.zeros(mask.shape, tl.float32)
    if HAS_INPUT:
        in_input = mask & (column < in_size)
        y = tl.load(x_row + column, mask=in_input, other=0.0).to(tl.float32) * pre_scale
        if HAS_PRE_GAIN:
            y *= tl.load(pre_gain_ptr + column, mask=in_input, other=0.0)
    if HAS_PRODUCT:
        in_product = mask & (column >= in_size)
        y += tl.load(product_row + (column - in_size), mask=in_product, other=0.0).to(tl.float32)
        if HAS_BIAS:
            y += tl.load(bias_ptr + (column - in_size), mask=in_product, other=0.0)
    return y


@triton.jit
def statistics(y, mask, eps, NORM: tl.constexpr, NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Mean (or 0) and 1 / sqrt(mean square + eps) of each head, or of all of them [heads or 1, 1]."""
    size: tl.constexpr = NUM_HEADS * HEAD_DIM if OVER_HEADS & NORM else HEAD_DIM
    mean = tl.zeros_like(total(y, NORM))
    if CENTERED & NORM:
        mean = total(y, NORM) / size
    deviation = tl.where(mask, y - mean, 0.0)
    return mean, 1.0 / tl.sqrt(total(deviation * deviation, NORM) / size + eps)


@triton.jit
def total(y, NORM: tl.constexpr):
    """Sums of a tile's rows [heads, 1], or of all of it [1, 1]."""
    sums = tl.sum(y, axis=1, keep_dims=True)
    if OVER_HEADS & NORM:
        sums = tl.sum(sums, axis=0, keep_dims=True)
    return sums


@triton.jit
def normed(y, mean, scale, gain_ptr, shift_ptr, n, dim, mask, NORM: tl.constexpr):
    """(y - mean) * scale * gain + shift; gains by value of all heads, or by dimension of a head."""
    y = (y - mean) * scale
    place = n if OVER_HEADS & NORM else dim
    if HAS_GAIN & NORM:
        y *= tl.load(gain_ptr + place, mask=mask, other=0.0)
    if HAS_SHIFT & NORM:
        y += tl.load(shift_ptr + place, mask=mask, other=0.0)
    return y
