"""Decode attention in CUDA C++ against float64; where there is no GPU, its host twin."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from pyruntime.ops.attention import AttentionAttrs
from pyruntime.ops.gpu.compiled_attention import LEAST_TILES, attend, num_blocks, refused
from pyruntime.ops.gpu.frame import Frame
from pyruntime.spec import Attention
from tests.gpu.attending import Attending, attention_of
from tests.gpu.helpers import INTERPRETED, guarded, random
from tests.gpu.twin import twin

HALVES = (torch.bfloat16, torch.float16)
# one position, a page's end and beginning, a tile's end and beginning, several parts
CONTEXTS = (1, 16, 17, 64, 65, 150)


def compiled() -> Any:
    """The CUDA module, or its twin."""
    return twin() if INTERPRETED else importlib.import_module("pyruntime._C_cuda")


@contextmanager
def order(seed: int, at_once: int) -> Iterator[None]:
    """Blocks and threads in this order; a GPU has its own."""
    if INTERPRETED:
        twin().set_order(seed=seed, at_once=at_once)
    yield
    if INTERPRETED:
        twin().set_order()


class Compiled(Attending):
    """The same sequences through the CUDA kernel."""

    def run(self, frame: Frame | None = None, following: Tensor | None = None) -> Tensor:
        frame = self.frame() if frame is None else frame
        self.out.inside.fill_(torch.nan)
        attend(compiled(), AttentionAttrs(self.attention, 0), frame, following)
        assert self.out.intact
        assert not frame.counters(4096).any()
        return self.out.inside.clone()


def case(
    heads: tuple[int, int, int] = (4, 2, 64),
    contexts: tuple[int, ...] = (40, 300),
    dtype: torch.dtype = torch.bfloat16,
    page_size: int = 16,
    num_sms: int = 4,
    **changes: Any,
) -> Compiled:
    return Compiled(attention_of(*heads, **changes), contexts, dtype, page_size, num_sms=num_sms)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize("heads", [(2, 2), (8, 2), (7, 1), (8, 1)])
def test_groups_of_every_size_match_float64(heads: tuple[int, int], head_dim: int, dtype: torch.dtype) -> None:
    case((*heads, head_dim), (33, 130), dtype).check()


def test_more_query_heads_than_a_tile_has_rows_are_several_items() -> None:
    case((20, 1, 64), (90,)).check()
    case((40, 2, 64), (90, 3)).check()


@pytest.mark.parametrize("num_sms", [1, 3, 32])
@pytest.mark.parametrize("head_dim", [64, 256])
def test_ragged_contexts_match_however_they_are_split(head_dim: int, num_sms: int) -> None:
    case((2, 1, head_dim), CONTEXTS, num_sms=num_sms).check()


@pytest.mark.parametrize("page_size", [16, 48, 128])
def test_pages_of_every_size_are_followed(page_size: int) -> None:
    case(contexts=(page_size - 1, page_size, 2 * page_size + 1), page_size=page_size).check()


def test_more_sequences_than_a_warp_has_lanes() -> None:
    case((1, 1, 64), tuple(1 + 13 * i % 70 for i in range(70)), num_sms=8).check()


@pytest.mark.parametrize("changes", [{"window": 5}, {"window": 64}, {"window": 100}, {"softcap": 0.7}])
def test_windows_and_soft_caps_match(changes: dict[str, Any]) -> None:
    case(contexts=(3, 64, 65, 200), **changes).check()


def test_what_left_the_window_is_not_read() -> None:
    made = case(contexts=(100, 200), window=40)
    for pages, context in zip(made.pages, made.contexts, strict=True):
        for pool in made.cache.pools(0):
            hidden = context - 40
            for position in range(hidden):
                pool[pages[position // 16], position % 16] = torch.nan
    expected = case(contexts=(100, 200), window=40).expected()
    assert (made.run().double() - expected).abs().max() < 0.05
    # nor which pages they were on
    for i, context in enumerate(made.contexts):
        made.view.page_table[i, : (context - 40) // 16] = -(10**6)
    assert (made.run().double() - expected).abs().max() < 0.05


def test_blocks_in_any_order_give_the_same_bits() -> None:
    # a block has the last part of the first sequence and the first one of the second
    made = case((4, 1, 64), (300, 310, 40), num_sms=8)
    made.check()
    once = made.run()
    for seed, at_once in ((1, 1), (2, 3), (3, 16)):
        with order(seed, at_once):
            assert torch.equal(made.run(), once)


def test_weights_of_a_later_kernel_are_left_as_they_are() -> None:
    made = case()
    following = random(300, dtype=torch.bfloat16)
    before = following.clone()
    made.run(following=following)
    assert torch.equal(following, before)


def test_padding_rows_are_computed_like_any_other() -> None:
    made = case(contexts=(1, 50, 1))
    assert not made.run().isnan().any()


def test_contexts_may_change_between_launches_of_the_same_sizes() -> None:
    longer, shorter = case(contexts=(200, 60)), case(contexts=(200, 60))
    shorter.contexts = (31, 60)
    shorter.view.contexts.copy_(torch.tensor(shorter.contexts))
    shorter.view.positions.copy_(torch.tensor(shorter.contexts) - 1)
    longer.check()
    shorter.check()


def test_rows_may_lie_apart() -> None:
    made = case()
    wide = guarded(torch.full((2, 2 * made.attention.q_size), torch.nan, dtype=made.dtype))
    wide[:, : made.attention.q_size] = made.queries
    once = made.run()
    assert torch.equal(made.run(replace(made.frame(), inputs=(wide[:, : made.attention.q_size],))), once)


def test_every_tile_belongs_to_one_part_and_no_two_parts_share_a_place() -> None:
    module = compiled()
    lengths = list(itertools.product(range(1, 8), repeat=3))
    for items, blocks, least in itertools.product(lengths, (1, 2, 3, 7), (1, 2)):
        total = sum(items)
        per_block = module.attention_tiles_per_block(num_tiles=total, blocks=blocks, least=least)
        assert per_block >= least and per_block * blocks >= total
        assert per_block == least or (per_block - 1) * blocks < total
        places: list[int] = []
        for i, size in enumerate(items):
            begin, end = sum(items[:i]), sum(items[: i + 1])
            first, own = module.attention_parts(begin=begin, end=end, per_block=per_block)
            owners = [tile // per_block for tile in range(begin, end)]
            assert [place // 2 for place in own] == sorted(set(owners))
            assert own[0] // 2 == first == owners[0]
            assert size == len(owners)
            # a whole item goes to the output
            places += own if len(own) > 1 else []
        assert len(set(places)) == len(places)
        assert all(place < 2 * blocks for place in places)


def test_tiles_hold_every_visible_position_and_each_holds_one() -> None:
    module = compiled()
    for context, window, tile in itertools.product(range(150), (0, 1, 5, 64, 100), (32, 64)):
        begin, end = module.attention_tiles(context=context, window=window, tile=tile)
        seen = range(max(context - window, 0) if window else 0, context)
        assert set(range(begin, end)) == {position // tile for position in seen}


def test_partial_results_have_room_for_two_parts_of_every_block() -> None:
    sizes = {"blocks": 3, "num_heads": 8, "num_kv_heads": 2, "head_dim": 64}
    assert compiled().attention_partials(**sizes) == 3 * 2 * 4 * (64 + 2)
    assert compiled().attention_items(num_heads=40, num_kv_heads=2) == 4


def test_a_block_leaves_room_for_the_next_kernel() -> None:
    for head_dim, group in itertools.product((64, 96, 128, 256), (1, 4, 8, 16)):
        shared = compiled().attention_shared_bytes(num_heads=group, num_kv_heads=1, head_dim=head_dim)
        assert shared <= 110 * 1024


@pytest.mark.parametrize(
    ("capability", "heads", "per_sm"), [(90, (32, 8, 128), 3), (80, (32, 8, 128), 2), (90, (32, 32, 64), 3)]
)
def test_blocks_fill_the_processors(capability: int, heads: tuple[int, int, int], per_sm: int) -> None:
    assert num_blocks(compiled(), attention_of(*heads), capability, 132, 10**6) == 132 * per_sm
    assert num_blocks(compiled(), attention_of(*heads), capability, 132, 40) == 40


@pytest.mark.parametrize(
    ("attention", "dtype", "page_size", "why"),
    [
        (attention_of(2, 1, 80), torch.bfloat16, 16, "head_dim 80"),
        (attention_of(2, 1, 64), torch.float32, 16, "float32"),
        (attention_of(2, 1, 64), torch.bfloat16, 24, "pages of 24"),
        (attention_of(2, 1, 64, alibi=True), torch.bfloat16, 16, "ALiBi"),
    ],
)
def test_it_says_what_it_cannot_run(attention: Attention, dtype: torch.dtype, page_size: int, why: str) -> None:
    assert why in (refused(attention, dtype, page_size) or "")
    assert refused(attention_of(2, 1, 64), torch.bfloat16, 16) is None


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"head_dim": 80}, "head_dim is 80"),
        ({"num_kv_heads": 3}, "not a multiple"),
        ({"page_size": 24}, "multiple of 16"),
        ({"q": 0}, "null pointer"),
        ({"q": 264}, "aligned"),
        ({"q_stride": 100}, "row stride 100"),
        ({"dtype": "float32"}, "float32"),
        ({"blocks": 0}, "blocks is 0"),
        ({"window": -1}, "window is -1"),
    ],
)
def test_the_launcher_raises_instead_of_launching_nonsense(change: dict[str, Any], why: str) -> None:
    pointers = ("q", "out", "keys", "values", "contexts", "page_table", "partials", "counters")
    sizes = {
        "prefetch": 0, "prefetch_bytes": 0, "q_stride": 256, "out_stride": 256, "table_stride": 4, "num_sequences": 1,
        "num_heads": 4, "num_kv_heads": 2, "head_dim": 64, "page_size": 16, "window": 0, "blocks": 4,
        "least_tiles": LEAST_TILES, "scale": 1.0, "softcap": 0.0, "dtype": "bfloat16", "early": False, "stream": 0,
    }  # fmt: skip
    with pytest.raises(ValueError, match=why):
        compiled().attention(**{**dict.fromkeys(pointers, 256), **sizes, **change})
