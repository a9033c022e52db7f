"""One engine step as ops see it: the rows of a ragged batch, where each stands, and the cache they share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum

import torch

from pyruntime.ops.cache import KvCache
from pyruntime.ops.rope import Rotary, rotary
from pyruntime.spec import Rope


class Rows(StrEnum):
    """Which rows a node computes: all of the step, or only those whose logits are wanted."""

    ALL = "all"
    WANTED = "wanted"


@dataclass(frozen=True, slots=True)
class SequenceSlice:
    """The part of one sequence that a step computes.

    `token_ids` stand at positions `start`, `start` + 1, ...; `pages` are the sequence's cache pages, enough for all of
    them; `wanted` are offsets into `token_ids` whose logits are asked for, ascending.
    """

    token_ids: Sequence[int]
    start: int
    pages: Sequence[int]
    wanted: Sequence[int]


@dataclass(frozen=True, slots=True)
class Span:
    """Rows [begin, end) of a view belong to one sequence with the cache `pages` [number of pages].

    `context` positions are in the cache once the step has written its own; `newest` says that the span is the one row
    that sees all of them, so nothing needs hiding.
    """

    begin: int
    end: int
    pages: torch.Tensor
    context: int
    newest: bool


@dataclass(slots=True)
class View:
    """The rows that one node works on. `index` are their numbers among all rows of the step."""

    token_ids: torch.Tensor  # [rows] int64
    positions: torch.Tensor  # [rows] int64
    index: torch.Tensor  # [rows] int64
    slots: torch.Tensor  # [rows] int64, place in the cache: page * page_size + offset
    spans: tuple[Span, ...]
    cache: KvCache
    _rotary: dict[Rope, Rotary] = field(default_factory=dict)

    @property
    def num_rows(self) -> int:
        """Number of rows."""
        return int(self.positions.shape[0])

    def rotary(self, rope: Rope) -> Rotary:
        """Cosines and sines of the rows' positions; computed once per step and kind of rope."""
        if rope not in self._rotary:
            self._rotary[rope] = rotary(rope, self.positions)
        return self._rotary[rope]


class Step:
    """One step: the slices it computes one after the other, their cache, and both views of their rows.

    The views are made when they are first asked for: a target that unpacks the slices itself needs none.
    """

    def __init__(self, slices: Sequence[SequenceSlice], cache: KvCache, device: torch.device | str) -> None:
        self.slices = slices
        self.cache = cache
        self._device = device
        self._views: dict[Rows, View] = {}

    def num_rows(self, rows: Rows) -> int:
        """Rows of a view."""
        return sum(len(each.token_ids if rows is Rows.ALL else each.wanted) for each in self.slices)

    def view(self, rows: Rows) -> View:
        """The view of `rows`."""
        if not self._views:
            self._views = _make_views(self.slices, self.cache, self._device)
        return self._views[rows]


def make_step(slices: Sequence[SequenceSlice], cache: KvCache, device: torch.device | str = "cpu") -> Step:
    """The step that computes `slices`, one after the other, over `cache`."""
    return Step(slices, cache, device)


def _make_views(slices: Sequence[SequenceSlice], cache: KvCache, device: torch.device | str) -> dict[Rows, View]:
    tokens: list[int] = []
    positions: list[int] = []
    wanted: list[int] = []
    spans: dict[Rows, list[Span]] = {Rows.ALL: [], Rows.WANTED: []}
    slots: list[torch.Tensor] = []
    for each in slices:
        first_row, first_wanted = len(tokens), len(wanted)
        tokens.extend(each.token_ids)
        positions.extend(range(each.start, each.start + len(each.token_ids)))
        wanted.extend(first_row + offset for offset in each.wanted)
        pages = torch.tensor(each.pages, dtype=torch.int64, device=device)
        context = each.start + len(each.token_ids)
        last = len(each.token_ids) - 1
        spans[Rows.ALL].append(Span(first_row, len(tokens), pages, context, last == 0))
        spans[Rows.WANTED].append(Span(first_wanted, len(wanted), pages, context, list(each.wanted) == [last]))
        place = torch.arange(each.start, context, device=device)
        slots.append(pages[place // cache.page_size] * cache.page_size + place % cache.page_size)
    index = torch.tensor(wanted, dtype=torch.int64, device=device)
    token_ids = torch.tensor(tokens, dtype=torch.int64, device=device)
    position = torch.tensor(positions, dtype=torch.int64, device=device)
    slot = torch.cat(slots)
    everything = torch.arange(len(tokens), device=device)
    return {
        Rows.ALL: View(token_ids, position, everything, slot, tuple(spans[Rows.ALL]), cache),
        Rows.WANTED: View(token_ids[index], position[index], index, slot[index], tuple(spans[Rows.WANTED]), cache),
    }
