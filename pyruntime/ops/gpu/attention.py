"""K2, K9 on a GPU: decode splits what a row sees over the processors, prefill tiles the rows."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from pyruntime.kernels.attention import attention_decode_kernel
from pyruntime.kernels.attention_prefill import attention_prefill_kernel
from pyruntime.ops.attention import AttentionAttrs, slopes
from pyruntime.ops.attention import layouts as gains
from pyruntime.ops.gpu.choose import Backend
from pyruntime.ops.gpu.compiled_attention import attend
from pyruntime.ops.gpu.frame import Frame, GpuInfo, GpuNode, GpuView, Launch
from pyruntime.ops.layout import Layout
from pyruntime.spec import GAINS, Attention, Cached

# a part should have so many tokens: to add it up takes about as long as to stream them
MIN_CHUNK: Final = 256
# programs of a split launch for each processor, which holds what is on its way to them in shared memory
_PER_SM: Final = 2
# rows of a matrix instruction, and query heads that one decode program holds
_MIN_TILE: Final = 16
_MAX_DECODE_TILE: Final = 64
_MAX_BLOCK: Final = 128
_DECODE_BLOCK_BYTES: Final = 16384
# values of the queries of a tile, at most, and of a head
_TILE_VALUES: Final = 16384
_MAX_HEAD_DIM: Final = 512
# partial sums that the last program loads at a time: 32 registers a thread
_COMBINED: Final = 4096


@dataclass(frozen=True, slots=True)
class Blocks:
    """Blocks of a launch: `tile` queries by `block` tokens; a row has as many queries as it has heads in the tile.

    `rows` of the queries are stored. `splits` is the most parts that the tokens of a tile are taken in.
    """

    tile: int
    rows: int
    block: int
    splits: int
    warps: int
    stages: int


def layouts(attrs: AttentionAttrs) -> dict[str, Layout]:
    """The gains, float32."""
    return gains(attrs)


def refuses(attrs: AttentionAttrs, dtype: torch.dtype) -> str | None:
    """Why the kernels cannot run it, or None."""
    if dtype is torch.float64:
        return "float64 is not computed on a GPU"
    if attrs.attention.cached is not Cached.KEYS_VALUES:
        return f"its kernels read keys and values, not {attrs.attention.cached} alone (slim attention)"
    if attrs.attention.head_dim > _MAX_HEAD_DIM:
        return f"its kernels hold heads of up to {_MAX_HEAD_DIM} values, not {attrs.attention.head_dim}"
    return None


def decode_blocks(attention: Attention, num_rows: int, longest: int, itemsize: int, num_sms: int) -> Blocks:
    """Blocks for `num_rows` sequences of up to `longest` tokens, one row each.

    A tile is all query heads of a key head, or 64 of them (32 if they are wider than 256). A block of keys is 16 KiB;
    five stages, of which the page numbers take two, keep two blocks of keys and of values on their way. Parts make two
    programs a processor where a row sees enough for them.
    """
    dims = _dims(attention)
    block = _DECODE_BLOCK_BYTES // (dims * itemsize)
    most = min(_MAX_DECODE_TILE, _TILE_VALUES // dims)
    tile = min(max(_power_of_two(_group(attention)), _MIN_TILE), most)
    programs = num_rows * attention.num_kv_heads * -(-_group(attention) // tile)
    return Blocks(
        tile=tile,
        rows=min(_power_of_two(_group(attention)), tile),
        block=min(max(block, _MIN_TILE), _MAX_BLOCK),
        splits=_splits(attention, programs, longest, num_sms, _PER_SM),
        # float32 is multiplied without matrix instructions, in many more registers
        warps=8 if tile > _MIN_TILE or itemsize == 4 else 4,
        stages=3 if tile == most or dims > 256 else 5,
    )


def prefill_blocks(attention: Attention, view: GpuView, longest: int, itemsize: int, info: GpuInfo) -> Blocks:
    """Blocks for a step of any rows over sequences of up to `longest` tokens.

    A tile is up to 128 queries, fewer where no sequence of the step has as many or where the processors would not all
    have one. Smaller tiles that are still few, as of a short chunk behind a long context, take their tokens in parts
    like decode; one of 8 warps needs the registers of a whole processor. Sizes are what registers hold without a
    spill: float32 is multiplied without matrix instructions, shaped attention has a second sum, and without wgmma or
    tcgen05, before capability 90 and from 120 on, all operands lie in registers.
    """
    dims = _dims(attention)
    most = 32 if itemsize == 4 else min(_TILE_VALUES // dims, 128) >> attention.shaped
    # wide heads of few queries spill in smaller tiles
    tile = most if dims > 128 else max(min(_power_of_two(view.longest * _group(attention)), most), _MIN_TILE)
    if tile == 128 and math.prod(_prefill_tiles(attention, view, tile)) < info.num_sms:
        tile = 64
    warps = 8 if tile * dims >= 8192 or itemsize == 4 else 4
    programs = math.prod(_prefill_tiles(attention, view, tile))
    from_shared = 90 <= info.capability < 120
    values = 8192 >> (2 * (itemsize == 4) + (not from_shared) + attention.shaped)
    return Blocks(
        tile=tile,
        rows=tile,
        block=min(max(values // dims, _MIN_TILE), 64),
        splits=_splits(attention, programs, longest, info.num_sms, 1 if warps == 8 else _PER_SM),
        warps=warps,
        stages=3 if itemsize == 4 or dims > 256 else 5,
    )


def _splits(attention: Attention, programs: int, longest: int, num_sms: int, per_sm: int) -> int:
    """Parts that give each processor `per_sm` of `programs`, if a row sees enough for them among `longest` tokens.

    Where a program fills a processor, one too many would wait for all others: there are no more than processors.
    """
    seen = longest if attention.window is None else min(longest, attention.window)
    parts = num_sms // programs if per_sm == 1 else -(-per_sm * num_sms // programs)
    return max(min(parts, seen // MIN_CHUNK), 1)


def on_gpu(attrs: AttentionAttrs, node: GpuNode) -> Launch:
    """One launch."""
    attention = attrs.attention
    alibi = slopes(attention.num_heads).float().to(node.device) if attention.alibi else None

    def launch(frame: Frame) -> None:
        if not frame.view.decode:
            _prefill(frame, attrs, node, alibi)
        elif node.choices.at(frame.view.num_rows).backend is Backend.CUDA:
            attend(node.compiled, attrs, frame)
        else:
            _decode(frame, attrs, node, alibi)

    return launch


def _decode(frame: Frame, attrs: AttentionAttrs, node: GpuNode, alibi: Tensor | None) -> None:
    attention, view = attrs.attention, frame.view
    keys, _ = frame.cache.pools(attrs.slot)
    longest = view.page_table.shape[1] * keys.shape[1]
    blocks = decode_blocks(attention, view.num_rows, longest, keys.element_size(), frame.info.num_sms)
    tiles = attention.num_kv_heads * -(-_group(attention) // blocks.tile)
    frame.launch(
        attention_decode_kernel,
        (blocks.splits, tiles, view.num_rows),
        *_arguments(frame, attrs, node, alibi, blocks, view.num_rows * tiles),
        num_warps=blocks.warps,
        num_stages=blocks.stages,
        **_constants(attention, keys, blocks),
    )


def _prefill(frame: Frame, attrs: AttentionAttrs, node: GpuNode, alibi: Tensor | None) -> None:
    attention, view = attrs.attention, frame.view
    keys, _ = frame.cache.pools(attrs.slot)
    context = view.page_table.shape[1] * keys.shape[1]
    blocks = prefill_blocks(attention, view, context, keys.element_size(), frame.info)
    row_tiles, head_tiles = _prefill_tiles(attention, view, blocks.tile)
    frame.launch(
        attention_prefill_kernel,
        (row_tiles * blocks.splits, head_tiles),
        view.starts,
        view.num_sequences,
        *_arguments(frame, attrs, node, alibi, blocks, row_tiles * head_tiles),
        num_warps=blocks.warps,
        num_stages=blocks.stages,
        **_constants(attention, keys, blocks),
    )


def _prefill_tiles(attention: Attention, view: GpuView, tile: int) -> tuple[int, int]:
    """Tiles of rows, enough for any lengths of the sequences, and tiles of heads."""
    members = min(_group(attention), tile)
    row_tiles = view.num_rows // (tile // members) + view.num_sequences
    return row_tiles, attention.num_kv_heads * -(-_group(attention) // members)


def _arguments(
    frame: Frame, attrs: AttentionAttrs, node: GpuNode, alibi: Tensor | None, blocks: Blocks, num_tiles: int
) -> tuple[Any, ...]:
    """What both kernels take; pointers that stand in for what is absent are never read."""
    attention, view, (q,), (out,) = attrs.attention, frame.view, frame.inputs, frame.outputs
    keys, values = frame.cache.pools(attrs.slot)
    assert q.stride(1) == out.stride(1) == 1 and keys.dtype is q.dtype, (q.dtype, keys.dtype)
    workspace = (q, q, q)
    if blocks.splits > 1:
        kinds = 2 if attention.shaped else 1
        parts = num_tiles * blocks.splits
        workspace = (
            frame.scratch((parts, kinds, blocks.rows, _dims(attention)), torch.float32),
            frame.scratch((parts, 2, blocks.rows), torch.float32),
            frame.counters(num_tiles),
        )
    strides = (q.stride(0), out.stride(0), view.page_table.stride(0), keys.stride(1))
    return (
        *(q, keys, values, out, view.page_table, view.positions, q if alibi is None else alibi),
        *(node.weights[name] if attention.shaped else q for name in GAINS),
        *workspace,
        *strides,
        blocks.splits,
        attention.scale,
    )


def _constants(attention: Attention, keys: Tensor, blocks: Blocks) -> dict[str, Any]:
    return {
        "GROUP": _group(attention),
        "SPLIT": blocks.splits > 1,
        "MIN_CHUNK": MIN_CHUNK,
        "WINDOW": attention.window,
        "SOFTCAP": attention.softcap,
        "ALIBI": attention.alibi,
        "SHAPED": attention.shaped,
        "HEAD_DIM": attention.head_dim,
        "DIMS": _dims(attention),
        "PAGE": keys.shape[1],
        "TILE": blocks.tile,
        "ROWS": blocks.rows,
        "PARTS": max(_COMBINED // (blocks.rows * _dims(attention)), 1),
        "BLOCK": blocks.block,
    }


def _group(attention: Attention) -> int:
    return attention.num_heads // attention.num_kv_heads


def _dims(attention: Attention) -> int:
    return max(_power_of_two(attention.head_dim), _MIN_TILE)


def _power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length()
