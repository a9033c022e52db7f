"""Decode attention against the reference in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from pyruntime.ops.attention import AttentionAttrs
from pyruntime.ops.gpu.attention import MIN_CHUNK, decode_blocks, layouts, refuses
from pyruntime.ops.layout import LayoutKind
from pyruntime.spec import GAINS, Cached
from tests.gpu.attending import OPTIONS, Attending, attention_of
from tests.gpu.helpers import DTYPES, NMSE_LIMITS, nmse
from tests.specs import lin

# one token, an empty last page, and a last page with one token
CONTEXTS = (1, 15, 32, 33)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [(3, 3), (8, 2), (7, 1), (16, 2), (71, 1)])
def test_any_number_of_query_heads_shares_a_key_head(heads: tuple[int, int], dtype: torch.dtype) -> None:
    Attending(attention_of(*heads, 16), CONTEXTS, dtype).check()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [1, 6, 64, 96, 128, 256, 512])
def test_heads_have_any_width(head_dim: int, dtype: torch.dtype) -> None:
    Attending(attention_of(4, 2, head_dim), CONTEXTS, dtype).check()


@pytest.mark.parametrize("page_size", [1, 16, 24, 32, 64])
def test_pages_have_any_size(page_size: int) -> None:
    Attending(attention_of(4, 2, 64), (1, 64, 65, 130), torch.bfloat16, page_size).check()


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("dtype", DTYPES)
def test_variants_are_their_formulas(options: dict[str, Any], dtype: torch.dtype) -> None:
    Attending(attention_of(6, 2, 24, **options), (1, 5, 22, 64), dtype).check()


@pytest.mark.parametrize("options", [{}, {"window": 700}, {"shaped": True, "alibi": True}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parts_of_a_row_are_added_up(options: dict[str, Any], dtype: torch.dtype) -> None:
    Attending(attention_of(4, 1, 24, **options), (1, 511, 512, 1281), dtype, num_sms=32).check()


@pytest.mark.parametrize("heads", [(2, 2), (71, 1)])
def test_parts_are_added_up_for_any_number_of_query_heads(heads: tuple[int, int]) -> None:
    Attending(attention_of(*heads, 16), (1281, 40), torch.float16, num_sms=32).check()


def test_more_parts_than_are_loaded_at_a_time_are_added_up() -> None:
    case = Attending(attention_of(16, 1, 128), (2600,), torch.bfloat16, num_sms=64)
    config = decode_blocks(case.attention, 1, 2600, 2, 64)
    assert config.splits * config.rows * 128 > 4 * 4096
    case.check()


def test_parts_change_nothing_but_rounding() -> None:
    case = Attending(attention_of(4, 2, 24), (1100, 300), torch.float32, num_sms=64)
    assert nmse(case.run(), replace(case, num_sms=1).run()) < NMSE_LIMITS[torch.float32]


def test_the_same_step_gives_the_same_bits_again() -> None:
    case = Attending(attention_of(4, 2, 24, shaped=True), (600, 3), torch.bfloat16, num_sms=32)
    frame = case.frame()
    assert torch.equal(case.run(frame), case.run(frame))


def test_a_score_beyond_float16_does_not_overflow() -> None:
    case = Attending(attention_of(4, 2, 64, scale=1.0), (40, 600), torch.float16, num_sms=32)
    case.queries.mul_(200)
    case.cache.pools(0)[0].mul_(200)
    case.check()


def test_softcap_saturates_without_nan() -> None:
    case = Attending(attention_of(4, 2, 64, scale=100.0, softcap=2.0), (40,), torch.bfloat16)
    case.check()


@pytest.mark.parametrize(
    ("num_rows", "longest", "splits"),
    [
        # 264 programs for 132 processors: 8 key heads a row
        (1, 16384, 33),
        (8, 16384, 5),
        (64, 16384, 1),
        # each part has 256 tokens at least
        (1, 1024, 4),
        (1, 255, 1),
    ],
)
def test_parts_fill_the_processors_and_are_not_too_short(num_rows: int, longest: int, splits: int) -> None:
    assert decode_blocks(attention_of(32, 8, 128), num_rows, longest, 2, 132).splits == splits


def test_a_window_bounds_the_parts() -> None:
    attention = attention_of(32, 8, 128, window=4 * MIN_CHUNK)
    assert decode_blocks(attention, 1, 16384, 2, 132).splits == 4


def test_what_no_kernel_holds_is_refused_in_words() -> None:
    attention = attention_of(4, 4, 16)
    slim = replace(attention, cached=Cached.KEYS, v=lin(64, 64))
    assert refuses(AttentionAttrs(attention, 0), torch.bfloat16) is None
    assert "float64" in str(refuses(AttentionAttrs(attention, 0), torch.float64))
    assert "slim attention" in str(refuses(AttentionAttrs(slim, 0), torch.bfloat16))
    assert "not 520" in str(refuses(AttentionAttrs(attention_of(1, 1, 520), 0), torch.bfloat16))


def test_gains_are_float32_and_there_is_nothing_else() -> None:
    attention = attention_of(4, 4, 16)
    assert layouts(AttentionAttrs(attention, 0)) == {}
    found = layouts(AttentionAttrs(replace(attention, shaped=True), 0))
    assert {name: layout.kind for name, layout in found.items()} == dict.fromkeys(GAINS, LayoutKind.VECTOR)
