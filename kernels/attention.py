"""Attention of one row per sequence over the pages of its cache (Triton), and the parts that prefill shares.

The query heads of one key head are the rows of a tile. Scores are in units of log2(e), so that weights are powers of 2.
"""

import triton
import triton.language as tl

from pyruntime.kernels._common import dot, let_next_start, wait_for_inputs

LOG2E = tl.constexpr(1.4426950408889634)
# below every score, and still a number: what is hidden gets weight 0 also before anything was seen
LOWEST = tl.constexpr(-1e30)


@triton.jit
def token_offsets(table_ptr, tokens, present, token_stride, PAGE: tl.constexpr):
    """Where the values of `tokens` start in a pool, int64; `table_ptr` points at the sequence's own pages."""
    pages = tl.load(table_ptr + tokens // PAGE, mask=present, other=0).to(tl.int64)
    return (pages * PAGE + tokens % PAGE) * token_stride


@triton.jit
def load_tokens(
    pool_ptr,
    offsets,  # [BLOCK] int64
    present,  # [BLOCK]
    MASKED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr,
):
    """[BLOCK, DIMS] keys or values; zeros where `present` is not, as what was never written may be NaN."""
    dims = tl.arange(0, DIMS)
    addresses = pool_ptr + offsets[:, None] + dims[None, :]
    if MASKED:
        return tl.load(addresses, mask=present[:, None] & (dims < HEAD_DIM)[None, :], other=0.0)
    if HEAD_DIM != DIMS:
        return tl.load(addresses, mask=(dims < HEAD_DIM)[None, :], other=0.0)
    return tl.load(addresses)


@triton.jit
def attend(
    q,  # [TILE, DIMS], of the dtype of keys
    highest,  # [TILE] float32, the highest score so far
    total,  # [TILE] float32, sum of 2^(score - highest)
    mixed,  # [TILE, DIMS] float32, sum of 2^(score - highest) * value
    seen,  # [TILE, DIMS] float32, sum of visible values; unchanged unless SHAPED
    keys_ptr,  # [pages, PAGE, kv_heads, HEAD_DIM], at the tile's key head
    values_ptr,  # as keys_ptr
    table_ptr,  # [pages] int32
    begin,
    end,
    limit,
    positions,  # [TILE] int32
    slopes,  # [TILE] float32, unread without ALIBI
    token_stride,
    scale,
    MASKED: tl.constexpr,  # some position is hidden from some row
    WINDOW: tl.constexpr,  # or None
    SOFTCAP: tl.constexpr,  # or None
    ALIBI: tl.constexpr,
    SHAPED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr,  # a power of two, at least HEAD_DIM
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Take in the tokens [begin, end), BLOCK at a time; if MASKED, none from `limit` on is read."""
    for start in tl.range(begin, end, BLOCK):
        tokens = start + tl.arange(0, BLOCK)
        present = tl.full([BLOCK], 1, tl.int1)
        if MASKED:
            present = tokens < limit
        offsets = token_offsets(table_ptr, tokens, present, token_stride, PAGE)
        k = load_tokens(keys_ptr, offsets, present, MASKED, HEAD_DIM, DIMS)
        scores = dot(q, tl.trans(k), tl.zeros([q.shape[0], BLOCK], tl.float32))  # [TILE, BLOCK]
        if SOFTCAP is None:
            scores *= scale * LOG2E
        else:
            # tanh(x) = 1 - 2 / (e^2x + 1)
            grown = tl.exp2(scores * (scale * (2.0 * LOG2E / SOFTCAP)))
            scores = (SOFTCAP * LOG2E) * (1.0 - 2.0 / (grown + 1.0))
        if ALIBI:
            scores += slopes[:, None] * LOG2E * (tokens[None, :] - positions[:, None]).to(tl.float32)
        visible = tl.full([q.shape[0], BLOCK], 1, tl.int1)
        if MASKED:
            visible = tokens[None, :] <= positions[:, None]
            if WINDOW is not None:
                visible = visible & (tokens[None, :] > positions[:, None] - WINDOW)
            scores = tl.where(visible, scores, -float("inf"))
        raised = tl.maximum(highest, tl.max(scores, axis=1))
        weights = tl.exp2(scores - raised[:, None])
        shrink = tl.exp2(highest - raised)
        total = total * shrink + tl.sum(weights, axis=1)
        highest = raised
        v = load_tokens(values_ptr, offsets, present, MASKED, HEAD_DIM, DIMS)
        mixed = dot(weights.to(v.dtype), v, mixed * shrink[:, None])
        if SHAPED:
            seen = dot(tl.where(visible, 1.0, 0.0).to(v.dtype), v, seen)
    return highest, total, mixed, seen


@triton.jit
def write_mix(
    out_ptr,  # [rows, heads * HEAD_DIM]
    out_offsets,  # [TILE] int64, where the values of each row and head start
    stored,  # [TILE]
    total,
    mixed,
    seen,
    heads,  # [TILE], query heads
    positions,  # [TILE]
    softmax_gain_ptr,  # [heads] float32, these three unread unless SHAPED
    identity_gain_ptr,
    centre_gain_ptr,
    values_ptr,
    table_ptr,
    token_stride,
    WINDOW: tl.constexpr,
    SHAPED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr,
    PAGE: tl.constexpr,
):
    """out = mixed / total, or softmax_gain * that + identity_gain * own value - centre_gain * mean of visible ones."""
    dims = tl.arange(0, DIMS)
    mask = stored[:, None] & (dims < HEAD_DIM)[None, :]
    mix = mixed / tl.where(stored, total, 1.0)[:, None]
    if SHAPED:
        own_offsets = token_offsets(table_ptr, positions, stored, token_stride, PAGE)
        own = tl.load(values_ptr + own_offsets[:, None] + dims[None, :], mask=mask, other=0.0).to(tl.float32)
        count = positions + 1
        if WINDOW is not None:
            count = tl.minimum(count, WINDOW)
        softmax_gain = tl.load(softmax_gain_ptr + heads, mask=stored, other=0.0)
        identity_gain = tl.load(identity_gain_ptr + heads, mask=stored, other=0.0)
        centre_gain = tl.load(centre_gain_ptr + heads, mask=stored, other=0.0) / count
        mix = softmax_gain[:, None] * mix + identity_gain[:, None] * own - centre_gain[:, None] * seen
    tl.store(out_ptr + out_offsets[:, None] + dims[None, :], mix.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def chunk_of(span, splits, MIN_CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """Tokens of each part of `span`: whole blocks, about MIN_CHUNK at least, in at most `splits` parts."""
    parts = tl.maximum(tl.minimum(span // MIN_CHUNK, splits), 1)
    return tl.cdiv(tl.cdiv(span, parts), BLOCK) * BLOCK


@triton.jit
def store_part(
    sums_ptr,  # [tiles, splits, 1 or if SHAPED 2, ROWS, DIMS] float32
    stats_ptr,  # [tiles, splits, 2, ROWS] float32
    part,  # int64, tile * splits + split
    lanes,  # [TILE], row of each in the part
    stored,  # [TILE]
    highest,
    total,
    mixed,
    seen,
    SHAPED: tl.constexpr,
    ROWS: tl.constexpr,
    DIMS: tl.constexpr,
):
    """Leave a part in the workspace."""
    tl.store(stats_ptr + part * (2 * ROWS) + lanes, highest, mask=stored)
    tl.store(stats_ptr + part * (2 * ROWS) + ROWS + lanes, total, mask=stored)
    inner = lanes[:, None] * DIMS + tl.arange(0, DIMS)[None, :]
    sums_ptr += part * ((2 if SHAPED else 1) * ROWS * DIMS)
    tl.store(sums_ptr + inner, mixed, mask=stored[:, None])
    if SHAPED:
        tl.store(sums_ptr + ROWS * DIMS + inner, seen, mask=stored[:, None])


@triton.jit
def arrive(counter_ptr):
    """Number of programs that had arrived before; all that they stored is visible from here on."""
    # every thread's stores come before the one thread's release
    tl.debug_barrier()
    return tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu")


@triton.jit
def combine_parts(
    sums_ptr,  # as store_part has it, and so on
    stats_ptr,
    first_part,  # int64, tile * splits
    num_parts,
    stored,  # [ROWS]
    SHAPED: tl.constexpr,
    ROWS: tl.constexpr,
    DIMS: tl.constexpr,
    PARTS: tl.constexpr,  # parts whose loads are in flight together
):
    """total, mixed and seen [ROWS, ...] of all parts, in their order: the same bits whoever comes last."""
    rows = tl.arange(0, ROWS)
    inner = rows[None, :, None] * DIMS + tl.arange(0, DIMS)[None, None, :]
    highest = tl.full([ROWS], LOWEST, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mixed = tl.zeros([ROWS, DIMS], tl.float32)
    seen = tl.zeros([ROWS, DIMS], tl.float32)
    for first in tl.range(0, num_parts, PARTS):
        there = first + tl.arange(0, PARTS)
        parts = first_part + there
        mask = (there < num_parts)[:, None] & stored[None, :]
        stats = stats_ptr + parts[:, None] * (2 * ROWS) + rows[None, :]
        sums = sums_ptr + parts[:, None, None] * ((2 if SHAPED else 1) * ROWS * DIMS) + inner
        part_highest = tl.load(stats, mask=mask, other=LOWEST, cache_modifier=".cg")  # [PARTS, ROWS]
        part_total = tl.load(stats + ROWS, mask=mask, other=0.0, cache_modifier=".cg")
        part_mixed = tl.load(sums, mask=mask[:, :, None], other=0.0, cache_modifier=".cg")  # [PARTS, ROWS, DIMS]
        raised = tl.maximum(highest, tl.max(part_highest, axis=0))
        shrink, grow = tl.exp2(highest - raised), tl.exp2(part_highest - raised[None, :])
        total = total * shrink + tl.sum(part_total * grow, axis=0)
        mixed = mixed * shrink[:, None] + tl.sum(part_mixed * grow[:, :, None], axis=0)
        if SHAPED:
            part_seen = tl.load(sums + ROWS * DIMS, mask=mask[:, :, None], other=0.0, cache_modifier=".cg")
            seen += tl.sum(part_seen, axis=0)
        highest = raised
    return total, mixed, seen


@triton.jit(do_not_specialize=["table_stride", "splits"])
def attention_decode_kernel(
    q_ptr,  # [rows, heads * HEAD_DIM]
    keys_ptr,  # [pages, PAGE, kv_heads, HEAD_DIM]
    values_ptr,  # as keys_ptr
    out_ptr,  # [rows, heads * HEAD_DIM]
    table_ptr,  # [rows, pages of one sequence] int32
    positions_ptr,  # [rows] int32
    slopes_ptr,  # [heads] float32, unread without ALIBI
    softmax_gain_ptr,  # [heads] float32, these three unread unless SHAPED
    identity_gain_ptr,
    centre_gain_ptr,
    sums_ptr,  # [rows, tiles of heads, splits, 1 or 2, ROWS, DIMS] float32, these three unused unless SPLIT
    stats_ptr,  # [rows, tiles of heads, splits, 2, ROWS] float32
    counters_ptr,  # [rows, tiles of heads] int32, zeros
    q_stride,
    out_stride,
    table_stride,
    token_stride,
    splits,
    scale,
    GROUP: tl.constexpr,  # query heads of one key head
    SPLIT: tl.constexpr,  # splits may be more than 1
    MIN_CHUNK: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ALIBI: tl.constexpr,
    SHAPED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr,
    PAGE: tl.constexpr,
    TILE: tl.constexpr,  # query heads of a tile, at least 16
    ROWS: tl.constexpr,  # those that are stored, a power of two
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (splits, tiles of heads, rows): each program takes a part of what its row sees, the last one adds them up.

    A row at position p sees [p + 1 - WINDOW, p]. How many parts that makes is known to each of its programs.
    """
    wait_for_inputs(PDL)
    split, head_tile, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    TILES: tl.constexpr = (GROUP + TILE - 1) // TILE
    kv_head = head_tile // TILES
    first_member = head_tile % TILES * TILE
    first_head = kv_head * GROUP + first_member
    num_members = GROUP - first_member
    position = tl.load(positions_ptr + row)
    first = 0
    if WINDOW is not None:
        first = tl.maximum(position + 1 - WINDOW, 0)
    span = position + 1 - first
    chunk = span
    if SPLIT:
        chunk = chunk_of(span, splits, MIN_CHUNK, BLOCK)
    num_parts = tl.cdiv(span, chunk)
    if split < num_parts:
        lanes, dims = tl.arange(0, TILE), tl.arange(0, DIMS)
        stored = lanes < num_members
        table_ptr += row * table_stride
        keys_ptr += kv_head * HEAD_DIM
        values_ptr += kv_head * HEAD_DIM
        out_ptr += row * out_stride
        heads = first_head + lanes
        q_mask = stored[:, None] & (dims < HEAD_DIM)[None, :]
        q = tl.load(q_ptr + row * q_stride + heads[:, None] * HEAD_DIM + dims[None, :], mask=q_mask, other=0.0)
        slopes = tl.zeros([TILE], tl.float32)
        if ALIBI:
            slopes = tl.load(slopes_ptr + heads, mask=stored, other=0.0)
        begin = first + split * chunk
        highest, total, mixed, seen = attend(
            q,
            tl.full([TILE], LOWEST, tl.float32),
            tl.zeros([TILE], tl.float32),
            tl.zeros([TILE, DIMS], tl.float32),
            tl.zeros([TILE, DIMS], tl.float32),
            keys_ptr,
            values_ptr,
            table_ptr,
            begin,
            tl.minimum(begin + chunk, position + 1),
            position + 1,
            tl.zeros([TILE], tl.int32) + position,
            slopes,
            token_stride,
            scale,
            True,
            None,
            SOFTCAP,
            ALIBI,
            SHAPED,
            HEAD_DIM,
            DIMS,
            PAGE,
            BLOCK,
        )
        let_next_start(PDL)
        if num_parts == 1:
            write_mix(
                out_ptr,
                heads * HEAD_DIM,
                stored,
                total,
                mixed,
                seen,
                heads,
                tl.zeros([TILE], tl.int32) + position,
                softmax_gain_ptr,
                identity_gain_ptr,
                centre_gain_ptr,
                values_ptr,
                table_ptr,
                token_stride,
                WINDOW,
                SHAPED,
                HEAD_DIM,
                DIMS,
                PAGE,
            )
        elif SPLIT:
            tile = row * tl.num_programs(1) + head_tile
            part = tile * splits + split
            store_part(sums_ptr, stats_ptr, part, lanes, stored, highest, total, mixed, seen, SHAPED, ROWS, DIMS)
            if arrive(counters_ptr + tile) == num_parts - 1:
                tl.store(counters_ptr + tile, 0)
                rows = tl.arange(0, ROWS)
                row_stored = rows < num_members
                sum_total, sum_mixed, sum_seen = combine_parts(
                    sums_ptr, stats_ptr, tile * splits, num_parts, row_stored, SHAPED, ROWS, DIMS, PARTS
                )
                write_mix(
                    out_ptr,
                    (first_head + rows) * HEAD_DIM,
                    row_stored,
                    sum_total,
                    sum_mixed,
                    sum_seen,
                    first_head + rows,
                    tl.zeros([ROWS], tl.int32) + position,
                    softmax_gain_ptr,
                    identity_gain_ptr,
                    centre_gain_ptr,
                    values_ptr,
                    table_ptr,
                    token_stride,
                    WINDOW,
                    SHAPED,
                    HEAD_DIM,
                    DIMS,
                    PAGE,
                )
