"""Queries, keys and values of few rows in one kernel, from the stream to the pages (Triton)."""

import triton
import triton.language as tl

from pyruntime.kernels._common import dot, let_next_start, wait_for_inputs
from pyruntime.kernels.product import added_up, fetch
from pyruntime.kernels.rope_append import HAS_GAIN, NORMED, put_heads, slot_of


@triton.jit(do_not_specialize=["rows", "page_table_stride"])
def qkv_rope_kernel(
    x_ptr,  # [rows, inputs]
    pre_gain_ptr,  # [inputs] float32, unread without HAS_PRE_GAIN
    weight_ptr,  # [outputs, inputs], heads that are projected: of queries, of keys, of values
    bias_ptr,  # [outputs] float32, unread without HAS_BIAS
    positions_ptr,  # [rows] int32
    sequences_ptr,  # [rows] int32
    page_table_ptr,  # [sequences, pages] int32
    cos_ptr,  # [positions, HALF] float32, unread if HALF is 0
    sin_ptr,
    q_gain_ptr,  # [HEAD_DIM] float32, unread where Q_NORM says so, and so on
    k_gain_ptr,
    v_gain_ptr,
    q_ptr,  # [rows, query heads, HEAD_DIM]
    keys_ptr,  # [pages, PAGE_SIZE, KV_HEADS, HEAD_DIM]
    values_ptr,
    partial_ptr,  # [row blocks, tiles, SPLITS, 2, BLOCK_ROWS, BLOCK_LANES] float32, if SPLITS > 1
    squares_ptr,  # [row blocks, tiles, SPLITS, BLOCK_ROWS] float32, if SPLITS > 1
    counter_ptr,  # [row blocks, tiles] int32 zeros, if SPLITS > 1; zeros again at the end
    rows,
    inputs,
    x_stride,
    page_table_stride,
    q_stride,
    eps,
    q_eps,
    k_eps,
    v_eps,
    HAS_PRE_NORM: tl.constexpr,
    HAS_PRE_GAIN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    Q_NORM: tl.constexpr,
    K_NORM: tl.constexpr,
    V_NORM: tl.constexpr,
    Q_PROJECTED: tl.constexpr,  # heads with weights
    K_PROJECTED: tl.constexpr,
    V_PROJECTED: tl.constexpr,
    Q_MERGED: tl.constexpr,  # heads that are parts of the normed input
    K_MERGED: tl.constexpr,
    V_MERGED: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,  # pairs of a head that turn
    PAGE_SIZE: tl.constexpr,
    PAIRS: tl.constexpr,  # lanes of a head: a power of two, at least half of HEAD_DIM
    BLOCK_LANES: tl.constexpr,
    BLOCK_INPUTS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    SPLITS: tl.constexpr,
    MERGED_TILE: tl.constexpr,  # merged heads of a program, a power of two
    DIMS: tl.constexpr,  # a power of two, at least HEAD_DIM
    PDL: tl.constexpr,
):
    """Deferred RMSNorm, projections, norms of heads, rotation, queries to memory, keys and values into the pages.

    Grid: SPLITS programs for each tile of projected heads, then for each row of a block the tiles of merged heads;
    blocks of rows. A lane has two values of a head that turn together, in two sums. Sums are deferred, split and added
    up as in product_kernel.
    """
    program = tl.program_id(0)
    projected: tl.constexpr = Q_PROJECTED + K_PROJECTED + V_PROJECTED
    tiles: tl.constexpr = (projected * PAIRS + BLOCK_LANES - 1) // BLOCK_LANES
    q_tiles: tl.constexpr = (Q_MERGED + MERGED_TILE - 1) // MERGED_TILE
    k_tiles: tl.constexpr = (K_MERGED + MERGED_TILE - 1) // MERGED_TILE
    v_tiles: tl.constexpr = (V_MERGED + MERGED_TILE - 1) // MERGED_TILE
    merged: tl.constexpr = q_tiles + k_tiles + v_tiles
    # conditions on constants stand alone: only then is what they guard not compiled; and a program of no kind, which
    # would not wait, is not compiled either
    if projected > 0:  # noqa: SIM102
        if (program < tiles * SPLITS) | (merged == 0):
            project_heads(
                x_ptr, pre_gain_ptr, weight_ptr, bias_ptr, positions_ptr, sequences_ptr, page_table_ptr, cos_ptr,
                sin_ptr, q_gain_ptr, k_gain_ptr, v_gain_ptr, q_ptr, keys_ptr, values_ptr, partial_ptr, squares_ptr,
                counter_ptr, rows, inputs, x_stride, page_table_stride, q_stride, eps, q_eps, k_eps, v_eps,
                HAS_PRE_NORM, HAS_PRE_GAIN, HAS_BIAS, Q_NORM, K_NORM, V_NORM, Q_PROJECTED, K_PROJECTED, V_PROJECTED,
                KV_HEADS, HEAD_DIM, HALF, PAGE_SIZE, PAIRS, BLOCK_LANES, BLOCK_INPUTS, BLOCK_ROWS, SPLITS, PDL,
            )  # fmt: skip
    if merged > 0:  # noqa: SIM102
        if (program >= tiles * SPLITS) | (projected == 0):
            wait_for_inputs(PDL)
            let_next_start(PDL)
            place = program - tiles * SPLITS
            tile = place % merged
            row = (tl.program_id(1) * BLOCK_ROWS + place // merged).to(tl.int64)
            if row < rows:
                x_row = x_ptr + row * x_stride
                scale = 1.0
                if HAS_PRE_NORM:
                    scale = row_scale(x_row, inputs, eps)
                position = tl.load(positions_ptr + row)
                slot = slot_of(sequences_ptr, page_table_ptr, row, position, page_table_stride, PAGE_SIZE)
                slot *= KV_HEADS * HEAD_DIM
                cos_row = cos_ptr + position.to(tl.int64) * HALF
                sin_row = sin_ptr + position.to(tl.int64) * HALF
                if q_tiles > 0:  # noqa: SIM102
                    if tile < q_tiles:
                        put_heads(
                            x_row, x_row, x_row, x_row, pre_gain_ptr, scale, inputs, 0,
                            q_gain_ptr, q_gain_ptr, q_eps, cos_row, sin_row, q_ptr + row * q_stride,
                            tile * MERGED_TILE, Q_MERGED, HEAD_DIM, HALF, Q_NORM,
                            True, False, False, False, HAS_PRE_GAIN, MERGED_TILE, DIMS,
                        )  # fmt: skip
                if k_tiles > 0:  # noqa: SIM102
                    if (tile >= q_tiles) & (tile < q_tiles + k_tiles):
                        put_heads(
                            x_row, x_row, x_row, x_row, pre_gain_ptr, scale, inputs, 0,
                            k_gain_ptr, k_gain_ptr, k_eps, cos_row, sin_row, keys_ptr + slot,
                            (tile - q_tiles) * MERGED_TILE, K_MERGED, HEAD_DIM, HALF, K_NORM,
                            True, False, False, False, HAS_PRE_GAIN, MERGED_TILE, DIMS,
                        )  # fmt: skip
                if v_tiles > 0:  # noqa: SIM102
                    if tile >= q_tiles + k_tiles:
                        put_heads(
                            x_row, x_row, x_row, x_row, pre_gain_ptr, scale, inputs, 0,
                            v_gain_ptr, v_gain_ptr, v_eps, cos_row, sin_row, values_ptr + slot,
                            (tile - q_tiles - k_tiles) * MERGED_TILE, V_MERGED, HEAD_DIM, 0, V_NORM,
                            True, False, False, False, HAS_PRE_GAIN, MERGED_TILE, DIMS,
                        )  # fmt: skip


@triton.jit
def row_scale(x_row, inputs, eps):
    """1 / sqrt(mean(x^2) + eps) of one row."""
    columns = tl.arange(0, 1024)
    squares = tl.zeros((1024,), tl.float32)
    for start in tl.range(0, inputs, 1024):
        x = tl.load(x_row + start + columns, mask=start + columns < inputs, other=0.0).to(tl.float32)
        squares += x * x
    return 1.0 / tl.sqrt(tl.sum(squares, axis=0) / inputs + eps)


@triton.jit
def project_heads(
    x_ptr,
    pre_gain_ptr,
    weight_ptr,
    bias_ptr,
    positions_ptr,
    sequences_ptr,
    page_table_ptr,
    cos_ptr,
    sin_ptr,
    q_gain_ptr,
    k_gain_ptr,
    v_gain_ptr,
    q_ptr,
    keys_ptr,
    values_ptr,
    partial_ptr,
    squares_ptr,
    counter_ptr,
    rows,
    inputs,
    x_stride,
    page_table_stride,
    q_stride,
    eps,
    q_eps,
    k_eps,
    v_eps,
    HAS_PRE_NORM: tl.constexpr,
    HAS_PRE_GAIN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    Q_NORM: tl.constexpr,
    K_NORM: tl.constexpr,
    V_NORM: tl.constexpr,
    Q_PROJECTED: tl.constexpr,
    K_PROJECTED: tl.constexpr,
    V_PROJECTED: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK_LANES: tl.constexpr,
    BLOCK_INPUTS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    SPLITS: tl.constexpr,
    PDL: tl.constexpr,
):
    """A tile of projected heads over one part of the inputs; the last part to arrive finishes the tile."""
    num_heads: tl.constexpr = Q_PROJECTED + K_PROJECTED + V_PROJECTED
    tiles: tl.constexpr = (num_heads * PAIRS + BLOCK_LANES - 1) // BLOCK_LANES
    lanes_of_head: tl.constexpr = (HEAD_DIM + 1) // 2
    split, tile = tl.program_id(0) % SPLITS, tl.program_id(0) // SPLITS
    place = (tl.program_id(1) * tiles + tile).to(tl.int64)
    lane = tile * BLOCK_LANES + tl.arange(0, BLOCK_LANES)
    head, pair = lane // PAIRS, lane % PAIRS
    # pairs that do not turn share what lies behind those that do
    dim_a = tl.where(pair < HALF, pair, pair + HALF)
    dim_b = tl.where(pair < HALF, pair + HALF, pair + lanes_of_head)
    mask_a = (head < num_heads) & (pair < lanes_of_head)
    mask_b = mask_a & (dim_b < HEAD_DIM)
    n_a, n_b = head * HEAD_DIM + dim_a, head * HEAD_DIM + dim_b
    m = (tl.program_id(1) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
    m_mask = m < rows
    num_steps = tl.cdiv(inputs, BLOCK_INPUTS)
    begin, end = split * num_steps // SPLITS, (split + 1) * num_steps // SPLITS
    rows_a = weight_ptr + n_a.to(tl.int64)[:, None] * inputs
    rows_b = weight_ptr + n_b.to(tl.int64)[:, None] * inputs
    if PDL:
        fetch(weight_ptr, rows_a, mask_a, begin * BLOCK_INPUTS, inputs, BLOCK_INPUTS)
        fetch(weight_ptr, rows_b, mask_b, begin * BLOCK_INPUTS, inputs, BLOCK_INPUTS)
    wait_for_inputs(PDL)

    x_rows = x_ptr + m[:, None] * x_stride
    a = tl.zeros((BLOCK_LANES, BLOCK_ROWS), tl.float32)
    b = tl.zeros((BLOCK_LANES, BLOCK_ROWS), tl.float32)
    squares = tl.zeros((BLOCK_ROWS, BLOCK_INPUTS), tl.float32)
    for step in range(begin, end):
        k = step * BLOCK_INPUTS + tl.arange(0, BLOCK_INPUTS)
        k_mask = k < inputs
        x = tl.load(x_rows + k[None, :], mask=m_mask[:, None] & k_mask[None, :], other=0.0)
        mask = mask_a[:, None] & k_mask[None, :]
        weight = tl.load(rows_a + k[None, :], mask=mask, other=0.0, eviction_policy="evict_first")
        if HAS_PRE_NORM:
            x = x.to(tl.float32)
            squares += x * x
            if HAS_PRE_GAIN:
                x *= tl.load(pre_gain_ptr + k, mask=k_mask, other=0.0)[None, :]
        columns = tl.trans(x.to(weight.dtype))
        a = dot(weight, columns, a)
        mask = mask_b[:, None] & k_mask[None, :]
        weight = tl.load(rows_b + k[None, :], mask=mask, other=0.0, eviction_policy="evict_first")
        b = dot(weight, columns, b)
    let_next_start(PDL)

    sums = tl.sum(squares, axis=1)
    size: tl.constexpr = BLOCK_LANES * BLOCK_ROWS
    within = tl.arange(0, BLOCK_ROWS)[None, :] * BLOCK_LANES + tl.arange(0, BLOCK_LANES)[:, None]
    partials = partial_ptr + place * (SPLITS * 2 * size) + within
    row_squares = squares_ptr + place * (SPLITS * BLOCK_ROWS) + tl.arange(0, BLOCK_ROWS)
    arrived = SPLITS - 1
    if SPLITS > 1:
        tl.store(partials + split * (2 * size), a, mask=m_mask[None, :])
        tl.store(partials + (split * 2 + 1) * size, b, mask=m_mask[None, :])
        if HAS_PRE_NORM:
            tl.store(row_squares + split * BLOCK_ROWS, sums, mask=m_mask)
        # one thread speaks for all: what the others stored must be there before
        tl.debug_barrier()
        arrived = tl.atomic_add(counter_ptr + place, 1, sem="acq_rel", scope="gpu")
    if arrived == SPLITS - 1:
        if SPLITS > 1:
            tl.store(counter_ptr + place, 0)
            a = added_up(partials, m_mask[None, :], SPLITS, 2 * size)
            b = added_up(partials + size, m_mask[None, :], SPLITS, 2 * size)
            if HAS_PRE_NORM:
                sums = added_up(row_squares, m_mask, SPLITS, BLOCK_ROWS)
        if HAS_PRE_NORM:
            scale = 1.0 / tl.sqrt(sums / inputs + eps)
            a *= scale[None, :]
            b *= scale[None, :]
        if HAS_BIAS:
            a += tl.load(bias_ptr + n_a, mask=mask_a, other=0.0)[:, None]
            b += tl.load(bias_ptr + n_b, mask=mask_b, other=0.0)[:, None]
        is_q, is_v = head < Q_PROJECTED, head >= Q_PROJECTED + K_PROJECTED
        is_k = (head >= Q_PROJECTED) & (head < Q_PROJECTED + K_PROJECTED)
        a, b = norm_pairs(a, b, is_q, q_gain_ptr, q_eps, dim_a, dim_b, mask_a, mask_b, Q_NORM, HEAD_DIM, PAIRS)
        a, b = norm_pairs(a, b, is_k, k_gain_ptr, k_eps, dim_a, dim_b, mask_a, mask_b, K_NORM, HEAD_DIM, PAIRS)
        a, b = norm_pairs(a, b, is_v, v_gain_ptr, v_eps, dim_a, dim_b, mask_a, mask_b, V_NORM, HEAD_DIM, PAIRS)

        # rows that are not there read what the last one reads
        known = tl.minimum(m, rows - 1)
        position = tl.load(positions_ptr + known)
        if HALF > 0:
            turned = ((pair < HALF) & (is_q | is_k))[:, None] & m_mask[None, :]
            angle = position.to(tl.int64)[None, :] * HALF + pair[:, None]
            cos = tl.load(cos_ptr + angle, mask=turned, other=1.0)
            sin = tl.load(sin_ptr + angle, mask=turned, other=0.0)
            a, b = a * cos - b * sin, b * cos + a * sin
        if Q_PROJECTED > 0:
            q_rows = q_ptr + m[None, :] * q_stride
            store_pairs(q_rows, a, b, n_a, n_b, is_q & mask_a, is_q & mask_b, m_mask)
        slot = slot_of(sequences_ptr, page_table_ptr, known, position, page_table_stride, PAGE_SIZE)
        slot *= KV_HEADS * HEAD_DIM
        if K_PROJECTED > 0:
            places = keys_ptr + (slot - Q_PROJECTED * HEAD_DIM)[None, :]
            store_pairs(places, a, b, n_a, n_b, is_k & mask_a, is_k & mask_b, m_mask)
        if V_PROJECTED > 0:
            places = values_ptr + (slot - (Q_PROJECTED + K_PROJECTED) * HEAD_DIM)[None, :]
            store_pairs(places, a, b, n_a, n_b, is_v & mask_a, is_v & mask_b, m_mask)


@triton.jit
def norm_pairs(
    a,  # [lanes, rows]
    b,
    is_normed,  # [lanes]
    gain_ptr,
    eps,
    dim_a,
    dim_b,
    mask_a,
    mask_b,
    NORM: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """RMSNorm of the whole heads of some lanes."""
    if NORMED & NORM:
        lanes: tl.constexpr = a.shape[0]
        rows: tl.constexpr = a.shape[1]
        squares = tl.reshape(a * a + b * b, (lanes // PAIRS, PAIRS, rows))
        scale = 1.0 / tl.sqrt(tl.sum(squares, axis=1, keep_dims=True) / HEAD_DIM + eps)
        scale = tl.reshape(tl.broadcast_to(scale, (lanes // PAIRS, PAIRS, rows)), (lanes, rows))
        scale_a, scale_b = scale, scale
        if HAS_GAIN & NORM:
            scale_a *= tl.load(gain_ptr + dim_a, mask=mask_a, other=0.0)[:, None]
            scale_b *= tl.load(gain_ptr + dim_b, mask=mask_b, other=0.0)[:, None]
        a, b = tl.where(is_normed[:, None], a * scale_a, a), tl.where(is_normed[:, None], b * scale_b, b)
    return a, b


@triton.jit
def store_pairs(rows, a, b, n_a, n_b, mask_a, mask_b, m_mask):
    """Both values of each lane to the places n_a and n_b of `rows` [1, rows]."""
    element: tl.constexpr = rows.dtype.element_ty
    tl.store(rows + n_a[:, None], a.to(element), mask=mask_a[:, None] & m_mask[None, :])
    tl.store(rows + n_b[:, None], b.to(element), mask=mask_b[:, None] & m_mask[None, :])
