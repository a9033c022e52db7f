"""The scheduler under any order of arrivals, steps and aborts, with sequences that only count."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from pyruntime.engine.cache import PageAllocator
from pyruntime.engine.schedule import Chunk, Scheduler, SchedulerConfig
from pyruntime.errors import UsageError


@dataclass(eq=False)
class Counter:
    """A sequence that is finished when it has `final` tokens."""

    num_tokens: int
    final: int
    pages: list[int] = field(default_factory=list)
    num_computed: int = 0
    num_preemptions: int = 0
    # what this test believes: positions in the cache, and preemptions seen
    expected_start: int = 0
    seen_preemptions: int = 0


class SchedulerMachine(RuleBasedStateMachine):
    """`live` is in order of arrival; each step's promises are checked against our own count."""

    @initialize(
        num_pages=st.integers(2, 12),
        page_size=st.integers(1, 4),
        max_num_seqs=st.integers(1, 5),
        budget=st.integers(1, 12),
    )
    def start(self, num_pages: int, page_size: int, max_num_seqs: int, budget: int) -> None:
        self.num_pages, self.page_size = num_pages, page_size
        self.max_num_seqs, self.budget = max_num_seqs, budget
        self.allocator = PageAllocator(num_pages, page_size)
        self.scheduler: Scheduler[Counter] = Scheduler(SchedulerConfig(max_num_seqs, budget), self.allocator)
        self.live: list[Counter] = []

    @rule(prompt=st.integers(1, 20), new=st.integers(1, 12))
    def add(self, prompt: int, new: int) -> None:
        room = self.num_pages * self.page_size
        # what the engine lets in: alone, it fits
        prompt = min(prompt, room)
        new = min(new, room - prompt + 1)
        sequence = Counter(prompt, prompt + new)
        self.live.append(sequence)
        self.scheduler.add(sequence)

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(self.live))
        self._forget(sequence)

    @precondition(lambda self: self.live)
    @rule()
    def step(self) -> None:
        oldest, num_running = self.live[0], self.scheduler.num_running
        chunks = self.scheduler.schedule()
        preempted = self._notice_preemptions()
        assert oldest not in preempted, "the oldest lost its cache: two could push each other out for ever"
        self._check_limits(chunks)
        self._check_pages()
        self._check_order(chunks)
        if preempted:
            assert self.scheduler.num_running == num_running - len(preempted), "somebody came into a full cache"
        else:
            self._check_nobody_waits_in_vain(chunks)
        if self.scheduler.num_running > num_running:
            # who comes in leaves room for all tokens of those who run, or it would be thrown out at once
            assert self._pages_for_the_oldest(self.scheduler.num_running) <= self.num_pages
        for chunk in chunks:
            self._compute(chunk)

    def teardown(self) -> None:
        if not hasattr(self, "live"):
            return
        # the oldest advances in every step, so this many are enough if nobody starves
        for _ in range(sum(each.final for each in self.live)):
            if not self.live:
                break
            self.step()
        assert not self.live
        assert self.scheduler.num_running == self.scheduler.num_waiting == 0
        assert self.allocator.num_free == self.num_pages
        assert self.scheduler.schedule() == []

    def _notice_preemptions(self) -> set[Counter]:
        preempted = {each for each in self.live if each.num_preemptions != each.seen_preemptions}
        for each in preempted:
            assert each.num_preemptions == each.seen_preemptions + 1
            # it computes everything again, its own output included
            each.seen_preemptions += 1
            each.expected_start = 0
        return preempted

    def _check_limits(self, chunks: list[Chunk[Counter]]) -> None:
        assert chunks, "nothing is computed although every sequence fits alone"
        assert sum(chunk.length for chunk in chunks) <= self.budget
        assert all(chunk.length > 0 for chunk in chunks)
        assert len({chunk.sequence for chunk in chunks}) == len(chunks)
        assert len(chunks) <= self.scheduler.num_running <= self.max_num_seqs
        assert self.scheduler.num_running + self.scheduler.num_waiting == len(self.live)
        for chunk in chunks:
            end = chunk.start + chunk.length
            assert chunk.start == chunk.sequence.expected_start
            assert end <= chunk.sequence.num_tokens
            assert chunk.last == (end == chunk.sequence.num_tokens)
            assert len(chunk.sequence.pages) * self.page_size >= end

    def _check_pages(self) -> None:
        owned = list(itertools.chain.from_iterable(each.pages for each in self.live))
        assert len(set(owned)) == len(owned)
        assert self.allocator.num_free + len(owned) == self.num_pages

    def _check_order(self, chunks: list[Chunk[Counter]]) -> None:
        assert list(self.scheduler.sequences()) == self.live
        # the oldest are served and all of them but the last get what they need
        assert [chunk.sequence for chunk in chunks] == self.live[: len(chunks)]
        assert all(chunk.last for chunk in chunks[:-1])

    def _check_nobody_waits_in_vain(self, chunks: list[Chunk[Counter]]) -> None:
        waiting = self.live[self.scheduler.num_running :]
        left = self.budget - sum(chunk.length for chunk in chunks)
        if not waiting or left == 0 or self.scheduler.num_running == self.max_num_seqs:
            return
        assert self._pages_for_the_oldest(self.scheduler.num_running + 1) > self.num_pages

    def _pages_for_the_oldest(self, count: int) -> int:
        return sum(-(-each.num_tokens // self.page_size) for each in self.live[:count])

    def _compute(self, chunk: Chunk[Counter]) -> None:
        sequence = chunk.sequence
        sequence.num_computed += chunk.length
        sequence.expected_start = sequence.num_computed
        if chunk.last:
            sequence.num_tokens += 1
        if sequence.num_tokens == sequence.final:
            self._forget(sequence)

    def _forget(self, sequence: Counter) -> None:
        self.scheduler.remove(sequence)
        self.live.remove(sequence)
        assert not sequence.pages


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)


def test_nothing_is_scheduled_when_there_is_nothing() -> None:
    assert Scheduler[Counter](SchedulerConfig(), PageAllocator(1, 1)).schedule() == []


@pytest.mark.parametrize("name", ["max_num_seqs", "max_num_batched_tokens"])
@pytest.mark.parametrize("value", [0, -1, True, 1.5, "8", (1 << 20) + 1])
def test_limits_that_make_no_sense_are_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(UsageError, match=name):
        SchedulerConfig(**{name: value})
