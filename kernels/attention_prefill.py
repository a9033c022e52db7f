"""Attention of any number of rows per sequence over the pages of its cache (Triton)."""

import triton
import triton.language as tl

from pyruntime.kernels._common import let_next_start, wait_for_inputs
from pyruntime.kernels.attention import LOWEST, arrive, attend, chunk_of, combine_parts, store_part, write_mix

# sequences whose first rows are compared at a time
SEQUENCES = tl.constexpr(64)


@triton.jit
def sequence_of(starts_ptr, slot, num_sequences, QUERIES: tl.constexpr):
    """Sequence, first row and end of the tile `slot`, where sequence s has those from starts[s] // QUERIES + s on.

    That is room for all its rows, as each sequence has at most one tile that is not full.
    """
    count = 0
    for base in tl.range(0, num_sequences, SEQUENCES):
        numbers = base + tl.arange(0, SEQUENCES)
        present = numbers < num_sequences
        first_slots = tl.load(starts_ptr + numbers, mask=present, other=0) // QUERIES + numbers
        count += tl.sum((present & (first_slots <= slot)).to(tl.int32), axis=0)
    sequence = count - 1
    first, end = tl.load(starts_ptr + sequence), tl.load(starts_ptr + sequence + 1)
    return sequence, first + (slot - first // QUERIES - sequence) * QUERIES, end


@triton.jit(do_not_specialize=["num_sequences", "table_stride", "splits"])
def attention_prefill_kernel(
    starts_ptr,  # [num_sequences + 1] int32, first row of each sequence
    num_sequences,
    q_ptr,  # [rows, heads * HEAD_DIM]
    keys_ptr,  # [pages, PAGE, kv_heads, HEAD_DIM]
    values_ptr,  # as keys_ptr
    out_ptr,  # [rows, heads * HEAD_DIM]
    table_ptr,  # [num_sequences, pages of one sequence] int32
    positions_ptr,  # [rows] int32
    slopes_ptr,  # [heads] float32, unread without ALIBI
    softmax_gain_ptr,  # [heads] float32, these three unread unless SHAPED
    identity_gain_ptr,
    centre_gain_ptr,
    sums_ptr,  # [tiles, tiles of heads, splits, 1 or 2, TILE, DIMS] float32, these three unused unless SPLIT
    stats_ptr,  # [tiles, tiles of heads, splits, 2, TILE] float32
    counters_ptr,  # [tiles, tiles of heads] int32, zeros
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
    TILE: tl.constexpr,
    ROWS: tl.constexpr,  # TILE
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (tiles * splits, tiles of heads): a tile is as many rows as fit with all query heads of one key head.

    A row at position p sees [p + 1 - WINDOW, p]. Blocks that all rows see as a whole need no masks. The last tiles of a
    sequence see most, so they start first.
    """
    wait_for_inputs(PDL)
    MEMBERS: tl.constexpr = min(GROUP, TILE)
    QUERIES: tl.constexpr = TILE // MEMBERS
    TILES: tl.constexpr = (GROUP + MEMBERS - 1) // MEMBERS
    head_tile = tl.program_id(1)
    split = tl.program_id(0) % splits
    slot = (tl.num_programs(0) - 1 - tl.program_id(0)) // splits
    sequence, first_row, end_row = sequence_of(starts_ptr, slot, num_sequences, QUERIES)
    if first_row < end_row:
        lanes, dims = tl.arange(0, TILE), tl.arange(0, DIMS)
        kv_head = head_tile // TILES
        members = head_tile % TILES * MEMBERS + lanes % MEMBERS
        rows = first_row + lanes // MEMBERS
        stored = (rows < end_row) & (lanes < QUERIES * MEMBERS) & (members < GROUP)
        heads = kv_head * GROUP + members
        positions = tl.load(positions_ptr + rows, mask=stored, other=-1)
        newest = tl.max(positions, axis=0)
        # what is not stored does as the newest row does
        positions = tl.where(stored, positions, newest)
        oldest = tl.min(positions, axis=0)
        # whole blocks: [first, clear) and [masked, newest] are hidden from some rows, [clear, masked) from none
        first, clear, masked = 0, 0, (oldest + 1) // BLOCK * BLOCK
        if WINDOW is not None:
            first = tl.maximum(oldest + 1 - WINDOW, 0) // BLOCK * BLOCK
            clear = tl.cdiv(tl.maximum(newest + 1 - WINDOW, 0), BLOCK) * BLOCK
            masked = tl.maximum(masked, clear)
        span = newest + 1 - first
        chunk = span
        if SPLIT:
            chunk = chunk_of(span, splits, MIN_CHUNK, BLOCK)
        num_parts = tl.cdiv(span, chunk)
        if split < num_parts:
            begin = first + split * chunk
            end = tl.minimum(begin + chunk, newest + 1)
            table_ptr += sequence.to(tl.int64) * table_stride
            keys_ptr += kv_head * HEAD_DIM
            values_ptr += kv_head * HEAD_DIM
            q_offsets = rows.to(tl.int64) * q_stride + heads * HEAD_DIM
            q_mask = stored[:, None] & (dims < HEAD_DIM)[None, :]
            q = tl.load(q_ptr + q_offsets[:, None] + dims[None, :], mask=q_mask, other=0.0)
            slopes = tl.zeros([TILE], tl.float32)
            if ALIBI:
                slopes = tl.load(slopes_ptr + heads, mask=stored, other=0.0)
            highest = tl.full([TILE], LOWEST, tl.float32)
            total = tl.zeros([TILE], tl.float32)
            mixed = tl.zeros([TILE, DIMS], tl.float32)
            seen = tl.zeros([TILE, DIMS], tl.float32)
            for stage in tl.static_range(0 if WINDOW is not None else 1, 3):
                low = tl.maximum(begin, clear if stage == 1 else (masked if stage == 2 else begin))
                high = tl.minimum(end, clear if stage == 0 else (masked if stage == 1 else end))
                highest, total, mixed, seen = attend(
                    q,
                    highest,
                    total,
                    mixed,
                    seen,
                    keys_ptr,
                    values_ptr,
                    table_ptr,
                    low,
                    high,
                    newest + 1,
                    positions,
                    slopes,
                    token_stride,
                    scale,
                    stage != 1,
                    WINDOW if stage != 1 else None,
                    SOFTCAP,
                    ALIBI,
                    SHAPED,
                    HEAD_DIM,
                    DIMS,
                    PAGE,
                    BLOCK,
                )
            let_next_start(PDL)
            last = num_parts == 1
            if SPLIT:
                tile = slot.to(tl.int64) * tl.num_programs(1) + head_tile
                if num_parts > 1:
                    part = tile * splits + split
                    store_part(
                        sums_ptr, stats_ptr, part, lanes, stored, highest, total, mixed, seen, SHAPED, ROWS, DIMS
                    )
                    last = arrive(counters_ptr + tile) == num_parts - 1
                    if last:
                        tl.store(counters_ptr + tile, 0)
                        total, mixed, seen = combine_parts(
                            sums_ptr, stats_ptr, tile * splits, num_parts, stored, SHAPED, ROWS, DIMS, PARTS
                        )
            if last:
                write_mix(
                    out_ptr,
                    rows.to(tl.int64) * out_stride + heads * HEAD_DIM,
                    stored,
                    total,
                    mixed,
                    seen,
                    heads,
                    positions,
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
