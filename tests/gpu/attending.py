"""Attention of made-up sequences on the GPU and in float64, with NaN wherever nothing may be read."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pyruntime.ops.attention import AttentionAttrs, reference
from pyruntime.ops.cache import KvCache, KvShape
from pyruntime.ops.gpu.attention import on_gpu
from pyruntime.ops.gpu.frame import Frame
from pyruntime.ops.step import Span, View
from pyruntime.spec import GAINS, Attention
from tests.gpu.helpers import (
    DEVICE,
    NMSE_LIMITS,
    Guarded,
    cache_of,
    frame_of,
    nmse,
    node_of,
    random,
    view_of,
)
from tests.specs import lin

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"window": 5},
    "window wider than a page": {"window": 21},
    "softcap": {"softcap": 0.7},
    "alibi": {"alibi": True},
    "shaped": {"shaped": True},
    "everything": {"window": 21, "softcap": 0.7, "alibi": True, "shaped": True},
}


def attention_of(num_heads: int, num_kv_heads: int, head_dim: int, **changes: Any) -> Attention:
    """Attention with these heads, `changes` on top."""
    q_size, kv_size = num_heads * head_dim, num_kv_heads * head_dim
    made = Attention(
        num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, q=lin(8, q_size), k=lin(8, kv_size),
        v=lin(8, kv_size), o=lin(q_size, 8), scale=head_dim**-0.5,
    )  # fmt: skip
    return replace(made, **changes)


@dataclass
class Attending:
    """Sequences of `contexts` cached tokens, and the positions of the rows of each: by default the last one.

    Pages stand in any order among pages of NaN, as is what lies behind the last token of a sequence.
    """

    attention: Attention
    contexts: Sequence[int]
    dtype: torch.dtype = torch.float32
    page_size: int = 16
    rows: Sequence[Sequence[int]] | None = None
    num_sms: int = 4

    def __post_init__(self) -> None:
        attention = self.attention
        self.positions = [[c - 1] for c in self.contexts] if self.rows is None else [list(each) for each in self.rows]
        needs = [-(-context // self.page_size) for context in self.contexts]
        order = (torch.randperm(sum(needs), generator=torch.Generator().manual_seed(3)) + 1).tolist()
        self.pages = [order[sum(needs[:i]) : sum(needs[: i + 1])] for i in range(len(needs))]
        self.cache = self._filled(sum(needs) + 2)
        num_rows = sum(map(len, self.positions))
        self.queries = random(num_rows, attention.q_size, dtype=self.dtype, seed=1)
        gains = GAINS if attention.shaped else ()
        self.weights = {name: random(attention.num_heads, seed=2 + i) for i, name in enumerate(gains)}
        self.out = Guarded((num_rows, attention.q_size), self.dtype)
        lengths = list(map(len, self.positions))
        view = view_of(lengths, self.contexts, self.pages, decode=self.rows is None)
        positions = torch.tensor(list(itertools.chain(*self.positions)), dtype=torch.int32, device=DEVICE)
        self.view = replace(view, positions=positions)

    def _filled(self, num_pages: int) -> KvCache:
        shape = KvShape(self.attention.num_kv_heads, self.attention.head_dim)
        cache = cache_of([shape], num_pages, self.page_size, self.dtype)
        for pool in cache.pools(0):
            pool.fill_(torch.nan)
        for i, (context, pages) in enumerate(zip(self.contexts, self.pages, strict=True)):
            tokens = torch.arange(context)
            places = torch.tensor(pages)[tokens // self.page_size] * self.page_size + tokens % self.page_size
            made = (random(context, shape.num_kv_heads, shape.head_dim, seed=10 + 2 * i + j) for j in range(2))
            cache.write(0, places.to(DEVICE), *made)
        return cache

    def frame(self) -> Frame:
        """One step, on a device with `num_sms` processors."""
        frame = frame_of(self.view, [self.queries], [self.out.inside], self.cache)
        return replace(frame, info=replace(frame.info, num_sms=self.num_sms))

    def run(self, frame: Frame | None = None) -> Tensor:
        """What the GPU makes of it, counters and surroundings of the output checked."""
        frame = self.frame() if frame is None else frame
        self.out.inside.fill_(torch.nan)
        on_gpu(AttentionAttrs(self.attention, 0), node_of(self.weights, self.dtype))(frame)
        assert self.out.intact
        assert not frame.counters(4096).any()
        return self.out.inside.clone()

    def expected(self) -> Tensor:
        """What the reference makes of it in float64."""
        ends = [sum(map(len, self.positions[: i + 1])) for i in range(len(self.positions))]
        spans = tuple(
            Span(end - len(rows), end, torch.tensor(pages, device=DEVICE), context, newest=False)
            for end, rows, pages, context in zip(ends, self.positions, self.pages, self.contexts, strict=True)
        )
        positions = self.view.positions.long()
        # tokens and places are nothing to attention
        view = View(positions, positions, positions, positions, spans, self.cache)
        weights = {name: gain.double() for name, gain in self.weights.items()}
        (out,) = reference(AttentionAttrs(self.attention, 0), weights, [self.queries.double()], view)
        return out

    def check(self) -> None:
        """Both agree."""
        assert nmse(self.run(), self.expected()) < NMSE_LIMITS[self.dtype]
