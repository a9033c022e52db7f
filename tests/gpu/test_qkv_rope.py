"""Queries, keys and values on a GPU against the reference in float64, on the same rounded weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from pyruntime.ops.attrs import linear_shapes
from pyruntime.ops.cache import KvCache, KvLayout
from pyruntime.ops.gpu.choose import Backend
from pyruntime.ops.gpu.frame import Frame
from pyruntime.ops.gpu.qkv_rope import layouts, on_gpu, refuses
from pyruntime.ops.layout import arrange
from pyruntime.ops.qkv_rope import QkvRopeAttrs, reference
from pyruntime.ops.step import Rows, SequenceSlice, make_step
from pyruntime.spec import Attention, Norm, NormKind
from tests.gpu.helpers import (
    DEVICE,
    DTYPES,
    NMSE_LIMITS,
    Guarded,
    cache_of,
    frame_of,
    guarded,
    node_of,
    random,
    view_of,
)
from tests.gpu.helpers import nmse as nmse_of
from tests.specs import ATTENTION, ATTENTIONS, ROPE, SLIM_ATTENTIONS, attention_of, lin, rms

PAGE_SIZE = 4
BACKENDS = (Backend.TRITON, Backend.VENDOR)
KEPT = {name: each for name, each in ATTENTIONS.items() if isinstance(each, Attention)}


@dataclass(frozen=True)
class Rags:
    """Rows of a step: for each sequence how many, and the positions in the cache behind them."""

    lengths: Sequence[int]
    contexts: Sequence[int]

    @property
    def pages(self) -> list[list[int]]:
        """Pages of each sequence, in no order; page 0 is nobody's."""
        counts = [-(-context // PAGE_SIZE) for context in self.contexts]
        ends = [1 + sum(counts[: i + 1]) for i in range(len(counts))]
        return [list(range(end - 1, end - 1 - count, -1)) for end, count in zip(ends, counts, strict=True)]

    @property
    def num_pages(self) -> int:
        """With the one in front."""
        return 1 + sum(map(len, self.pages))


ONE = Rags([1], [6])
# a prompt, rows on both sides of a page's end, one on a page of its own, one that fills a page
RAGGED = Rags([1, 2, 1, 1], [1, 5, 9, 8])
DECODE = {rows: Rags([1] * rows, [1 + 5 * i % 13 for i in range(rows)]) for rows in (1, 5, 16, 17, 66)}


Found = tuple[tuple[Guarded, ...], KvCache, Frame]


def same_bits(one: Found, other: Found) -> bool:
    """Whether queries, keys and values are equal."""
    pairs = [(a.inside, b.inside) for a, b in zip(one[0], other[0], strict=True)]
    pairs += zip(one[1].pools(0), other[1].pools(0), strict=True)
    return all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in pairs)


def attrs_of(attention: Attention, **changes: Any) -> QkvRopeAttrs:
    return QkvRopeAttrs(attention, 0, **{"norm": attention.pre, **changes})


@dataclass(frozen=True)
class Case:
    """A node, its weights as stored, and its input."""

    attrs: QkvRopeAttrs
    stored: Mapping[str, Tensor]
    x: Tensor
    rags: Rags
    dtype: torch.dtype

    @staticmethod
    def of(attrs: QkvRopeAttrs, rags: Rags, dtype: torch.dtype) -> Case:
        shapes = attrs.weight_shapes()
        if "rest.weight" in shapes:
            # stored whole, also where a half of the tail needs some of its rows
            shapes |= linear_shapes("rest", attrs.attention.rest)
        stored = {
            role: random(*shape, dtype=dtype, seed=i, scale=min(0.4, 2.0 / shape[-1] ** 0.5))
            for i, (role, shape) in enumerate(shapes.items())
        }
        return Case(attrs, stored, random(sum(rags.lengths), attrs.in_size, seed=77), rags, dtype)

    def arranged(self) -> dict[str, Tensor]:
        return {
            name: guarded(arrange(layout, [None if role is None else self.stored[role] for role in layout.sources]))
            for name, layout in layouts(self.attrs).items()
        }

    def cache(self, dtype: torch.dtype) -> KvCache:
        """NaN everywhere."""
        cache = cache_of((self.attrs.kv_shape(),), self.rags.num_pages, PAGE_SIZE, dtype)
        for pool in cache.pools(0):
            pool.fill_(torch.nan)
        return cache

    def expected(self) -> tuple[tuple[Tensor, ...], KvCache]:
        """Queries, and the cache with the step's keys and values in float64."""
        cache = self.cache(torch.float64)
        assert cache.layout is KvLayout.TOKENS
        pairs = zip(self.rags.lengths, self.rags.contexts, self.rags.pages, strict=True)
        slices = [SequenceSlice([0] * n, context - n, pages, ()) for n, context, pages in pairs]
        view = make_step(slices, cache, DEVICE).view(Rows.ALL)
        weights = {role: weight.double() for role, weight in self.stored.items()}
        return reference(self.attrs, weights, (self.x.double(),), view), cache

    def found(self, backend: Backend | None) -> Found:
        rows = self.x.shape[0]
        outputs = tuple(Guarded((rows, width), self.dtype) for width in self.attrs.out_widths())
        view = view_of(self.rags.lengths, self.rags.contexts, self.rags.pages, decode=max(self.rags.lengths) == 1)
        cache = self.cache(self.dtype)
        frame = frame_of(view, (self.x,), [out.inside for out in outputs], cache)
        on_gpu(self.attrs, node_of(self.arranged(), self.dtype, backend))(frame)
        return outputs, cache, frame

    def check(self, backend: Backend | None) -> None:
        queries, cache = self.expected()
        outputs, found_cache, frame = self.found(backend)
        pairs = [(out.inside, query) for out, query in zip(outputs, queries, strict=True)]
        assert all(out.intact for out in outputs)
        for found, expected in zip(found_cache.pools(0), cache.pools(0), strict=True):
            # the step's own places, and no other
            assert torch.equal(found.isnan(), expected.isnan())
            if self.attrs.cache:
                kept = ~expected.isnan()
                pairs.append((found[kept], expected[kept]))
        for found, expected in pairs:
            assert nmse_of(found, expected) < NMSE_LIMITS[self.dtype]
        assert not frame.counters(64).any()


def splits_of(case: Case) -> int:
    """Programs that share a tile of the launch for few rows."""
    found: list[int] = []

    def keep(kernel: Any, grid: Any, arguments: Any, constants: Mapping[str, Any], *options: Any) -> None:
        found.append(constants["SPLITS"])

    frame = replace(case.found(Backend.TRITON)[2], launcher=keep)
    on_gpu(case.attrs, node_of(case.arranged(), case.dtype, Backend.TRITON))(frame)
    assert len(found) == 1, "one launch does it all"
    return found[0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", KEPT)
def test_every_attention_matches_the_reference(name: str, backend: Backend) -> None:
    Case.of(attrs_of(KEPT[name]), RAGGED, torch.float32).check(backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "name",
    ["biases", "query merged", "norms per head", "norms over heads", "layer norm", "no norm", "table", "pivoted"],
)
def test_narrow_dtypes_round_once(name: str, dtype: torch.dtype, backend: Backend) -> None:
    Case.of(attrs_of(KEPT[name]), ONE, dtype).check(backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_stream_beyond_float16_is_normed_before_it_is_rounded(backend: Backend) -> None:
    case = Case.of(attrs_of(KEPT["biases"]), ONE, torch.float16)
    replace(case, x=random(1, case.attrs.in_size, scale=1e6)).check(backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["biases", "query merged", "all merged", "pivoted with norms", "norms over heads"])
@pytest.mark.parametrize("half", [{"query": False}, {"cache": False}])
def test_the_tail_computes_queries_apart_from_keys_and_values(
    name: str, half: dict[str, bool], backend: Backend
) -> None:
    Case.of(attrs_of(KEPT[name], **half), RAGGED, torch.float32).check(backend)


@pytest.mark.parametrize("rows", [1, 5, 16, 17])
def test_any_number_of_rows(rows: int) -> None:
    Case.of(attrs_of(KEPT["query merged"]), DECODE[rows], torch.bfloat16).check(None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [17, 66])
def test_one_launch_takes_any_number_of_rows_where_it_is_chosen(rows: int, dtype: torch.dtype) -> None:
    Case.of(attrs_of(KEPT["biases"]), DECODE[rows], dtype).check(Backend.TRITON)


@pytest.mark.parametrize("backend", BACKENDS)
def test_queries_of_wanted_rows_are_those_of_the_whole_step(backend: Backend) -> None:
    case = Case.of(attrs_of(KEPT["biases"], cache=False), RAGGED, torch.float32)
    (queries,), _ = case.expected()
    wanted = [0, 2, 4]
    frame = case.found(backend)[2]
    view = replace(
        frame.view, num_rows=3, positions=frame.view.positions[wanted], sequences=frame.view.sequences[wanted]
    )
    out = Guarded((3, queries.shape[1]), torch.float32)
    part = replace(frame, view=view, inputs=(case.x[wanted],), outputs=(out.inside,))
    on_gpu(case.attrs, node_of(case.arranged(), torch.float32, backend))(part)
    assert out.intact
    assert nmse_of(out.inside, queries[wanted]) < NMSE_LIMITS[torch.float32]


def layer(size: int, **changes: Any) -> Norm:
    return Norm(**{"kind": NormKind.LAYER, "size": size, "eps": 1e-5, **changes})


SIZES = {
    "one head of 64": attention_of(63, 1, 1, 64),
    "4 to a key head, 96": attention_of(100, 4, 1, 96),
    "7 to a key head, 128": attention_of(160, 7, 1, 128, rope=replace(ROPE, dim=64)),
    "8 to a key head, 256": attention_of(33, 8, 1, 256),
    "14 and 2 of 64, biases": attention_of(
        56, 14, 2, 64, q=lin(56, 896, True), k=lin(56, 128, True), v=lin(56, 128, True)
    ),
    "odd": attention_of(33, 3, 3, 11, q_norm=rms(11), k_norm=rms(11, kind=NormKind.RMS_ONE_PLUS)),
    "heads of one value": attention_of(24, 5, 1, 1),
    "norm of heads of 128": attention_of(100, 2, 1, 128, q_norm=rms(128), k_norm=rms(128)),
    "layer norms of heads": attention_of(33, 4, 2, 6, q_norm=layer(6, bias=True), v_norm=layer(6)),
    "layer norm over heads": attention_of(33, 4, 2, 6, k_norm=layer(12, kind=NormKind.LAYER_ONE_PLUS)),
    "9 merged heads of 128": attention_of(1152, 9, 1, 128, q=None),
    "merged, 128": attention_of(256, 2, 2, 128, q=None, k=None, q_norm=rms(128)),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", SIZES)
def test_any_size_of_heads(name: str, backend: Backend) -> None:
    Case.of(attrs_of(SIZES[name]), RAGGED, torch.float32).check(backend)


DEEP = {
    "biases": attention_of(331, 2, 1, 24, q=lin(331, 48, True), k=lin(331, 24, True), v=lin(331, 24)),
    "norms": attention_of(300, 3, 1, 64, q_norm=rms(64), v_norm=rms(64)),
    "no norm": attention_of(331, 2, 1, 24, pre=None),
    "query merged": attention_of(320, 5, 1, 64, q=None),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", DEEP)
def test_inputs_are_split_over_programs_and_added_up_in_order(name: str, dtype: torch.dtype) -> None:
    case = Case.of(attrs_of(DEEP[name]), RAGGED, dtype)
    case.check(Backend.TRITON)
    assert splits_of(case) > 1
    first, second = (case.found(Backend.TRITON) for _ in range(2))
    assert same_bits(first, second)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_same_bits_twice(backend: Backend) -> None:
    case = Case.of(attrs_of(KEPT["biases"]), RAGGED, torch.bfloat16)
    assert same_bits(case.found(backend), case.found(backend))


def test_float64_and_slim_attention_are_refused() -> None:
    assert [refuses(attrs_of(ATTENTION), dtype) for dtype in DTYPES] == [None] * 3
    assert refuses(attrs_of(ATTENTION), torch.float64) is not None
    for attention in SLIM_ATTENTIONS.values():
        reason = refuses(attrs_of(attention), torch.bfloat16)
        assert reason is not None and "slim" in reason
