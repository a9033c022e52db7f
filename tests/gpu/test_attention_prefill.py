"""Attention of any rows against the reference in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from pyruntime.ops.gpu.attention import prefill_blocks
from tests.gpu.attending import OPTIONS, Attending, attention_of
from tests.gpu.helpers import DTYPES, NMSE_LIMITS, info, nmse

# from the first token on, from the midst of a page on, single rows, and rows that are no neighbours
CONTEXTS = (17, 40, 33, 70)
ROWS = (range(17), range(21, 40), [32], [3, 17, 18, 64, 69])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", [(3, 3), (8, 2), (7, 1), (16, 2)])
def test_any_number_of_query_heads_shares_a_key_head(heads: tuple[int, int], dtype: torch.dtype) -> None:
    Attending(attention_of(*heads, 16), CONTEXTS, dtype, rows=ROWS).check()


@pytest.mark.parametrize(("num_heads", "dtype"), [(71, torch.float32), (130, torch.float16)])
def test_more_query_heads_than_a_tile_are_several_tiles(num_heads: int, dtype: torch.dtype) -> None:
    Attending(attention_of(num_heads, 1, 16), (40, 3), dtype, rows=([7, 39], [2])).check()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [1, 6, 64, 96, 128, 256, 512])
def test_heads_have_any_width(head_dim: int, dtype: torch.dtype) -> None:
    Attending(attention_of(4, 2, head_dim), CONTEXTS, dtype, rows=ROWS).check()


@pytest.mark.parametrize("page_size", [1, 16, 24, 64])
def test_pages_have_any_size(page_size: int) -> None:
    Attending(attention_of(4, 2, 64), CONTEXTS, torch.bfloat16, page_size, rows=ROWS).check()


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("dtype", DTYPES)
def test_variants_are_their_formulas(options: dict[str, Any], dtype: torch.dtype) -> None:
    Attending(attention_of(6, 2, 24, **options), CONTEXTS, dtype, rows=ROWS).check()


@pytest.mark.parametrize("window", [None, 1, 70, 150])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_before_the_rows_are_seen_as_a_whole(window: int | None, dtype: torch.dtype) -> None:
    rows = (range(210, 260), range(60))
    Attending(attention_of(4, 1, 16, window=window), (260, 60), dtype, rows=rows).check()


@pytest.mark.parametrize("options", [{}, {"window": 700}, {"shaped": True, "alibi": True}], ids=str)
def test_a_short_chunk_behind_a_long_context_is_taken_in_parts(options: dict[str, Any]) -> None:
    rows = ([0, 600, 1290, 1299], range(10), range(1020, 1025))
    Attending(attention_of(4, 1, 24, **options), (1300, 10, 1025), torch.bfloat16, rows=rows, num_sms=64).check()


def test_parts_change_nothing_but_rounding() -> None:
    rows = (range(590, 600), [299])
    case = Attending(attention_of(7, 1, 24), (600, 300), torch.float32, rows=rows, num_sms=64)
    assert nmse(case.run(), replace(case, num_sms=1).run()) < NMSE_LIMITS[torch.float32]
    case.check()


def test_the_same_step_gives_the_same_bits_again() -> None:
    rows = (range(590, 600), [299])
    case = Attending(attention_of(4, 2, 24, shaped=True), (600, 300), torch.bfloat16, rows=rows, num_sms=64)
    frame = case.frame()
    assert torch.equal(case.run(frame), case.run(frame))


def test_single_rows_need_not_be_decode() -> None:
    contexts = (1, 16, 33, 600)
    Attending(attention_of(8, 2, 16), contexts, rows=[[c - 1] for c in contexts], num_sms=32).check()


def test_more_sequences_than_are_compared_at_a_time_find_their_rows() -> None:
    contexts = [1 + i % 3 for i in range(70)]
    Attending(attention_of(1, 1, 16), contexts, rows=[range(c) for c in contexts]).check()


def test_sequences_without_wanted_rows_are_passed_over() -> None:
    Attending(attention_of(4, 2, 16), (20, 33, 40, 5), rows=([], [3, 32], [], [4])).check()


@pytest.mark.parametrize(("longest", "tile"), [(1, 16), (4, 16), (9, 64), (30, 128), (4096, 128)])
def test_a_tile_is_no_larger_than_the_queries_of_a_sequence(longest: int, tile: int) -> None:
    case = Attending(attention_of(32, 8, 16), (4096,), torch.bfloat16, rows=[range(longest)])
    assert prefill_blocks(case.attention, case.view, 4096, 2, info()).tile == tile


@pytest.mark.parametrize(("longest", "splits"), [(1, 33), (8, 17), (16, 8), (64, 3), (256, 1), (512, 1)])
def test_few_rows_behind_a_long_context_fill_the_processors(longest: int, splits: int) -> None:
    # 8 key heads on 132 processors: two programs on each of tiles of 4 or 8 rows; one of tiles of 16 or 32, and never
    # more, as it would wait for all others; there is a tile more than are full
    case = Attending(attention_of(32, 8, 128), (1024,), torch.bfloat16, rows=[range(1024 - longest, 1024)])
    found = prefill_blocks(case.attention, case.view, 32768, 2, replace(info(), num_sms=132))
    assert found.splits == splits


@pytest.mark.parametrize(("capability", "block"), [(80, 32), (89, 32), (90, 64), (100, 64), (120, 32), (121, 32)])
def test_blocks_are_large_where_operands_stay_in_shared_memory(capability: int, block: int) -> None:
    # wgmma came with 9.0 and tcgen05 with 10.0; 12.0 has neither, and 99 KiB of shared memory
    case = Attending(attention_of(32, 8, 128), (1024,), torch.bfloat16, rows=[range(1024)])
    found = prefill_blocks(case.attention, case.view, 1024, 2, replace(info(), capability=capability))
    assert found.block == block
