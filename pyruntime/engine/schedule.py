"""Which tokens the next step computes: continuous batching with chunked prefill under a token budget."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from pyruntime.engine.cache import PageAllocator
from pyruntime.errors import UsageError


class Schedulable(Protocol):
    """What the scheduler needs to know of a sequence, and the two fields that it keeps."""

    pages: list[int]
    num_computed: int
    num_preemptions: int

    @property
    def num_tokens(self) -> int:
        """Tokens that exist; those from `num_computed` on are not in the cache yet."""
        ...


S = TypeVar("S", bound=Schedulable)


@dataclass(frozen=True, slots=True)
class Chunk(Generic[S]):
    """Positions [start, start + length) of a sequence are computed; `last` says that its next token can be sampled."""

    sequence: S
    start: int
    length: int
    last: bool


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """Limits of one step: sequences at a time, and tokens over all of them."""

    max_num_seqs: int = 64
    max_num_batched_tokens: int = 2048

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_num_batched_tokens"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 1 << 20:
                raise UsageError("CONFIG", f"{name} is {value!r}; expected an integer from 1 to {1 << 20}")


class Scheduler(Generic[S]):
    """First come, first served. Running sequences go first, oldest first; the youngest gives way when pages run out.

    A sequence that gives way loses its cache and computes it again later; its tokens stay. The oldest one can always
    go on, because whoever adds a sequence has checked that it fits an empty cache: so there is no deadlock.
    """

    def __init__(self, config: SchedulerConfig, allocator: PageAllocator) -> None:
        self._config = config
        self._allocator = allocator
        self._waiting: deque[S] = deque()
        self._running: list[S] = []

    @property
    def num_waiting(self) -> int:
        """Sequences without cache."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Sequences with cache."""
        return len(self._running)

    def sequences(self) -> Iterator[S]:
        """All sequences, oldest first."""
        yield from self._running
        yield from self._waiting

    def add(self, sequence: S) -> None:
        """Queue a new sequence."""
        self._waiting.append(sequence)

    def remove(self, sequence: S) -> None:
        """Forget a sequence, finished or not, and free its pages."""
        if sequence in self._running:
            self._running.remove(sequence)
        else:
            self._waiting.remove(sequence)
        self._free(sequence)

    def schedule(self) -> list[Chunk[S]]:
        """The next step's chunks. The sequences' `pages` hold enough pages for them afterwards."""
        budget = self._config.max_num_batched_tokens
        chunks: list[Chunk[S]] = []
        for sequence in list(self._running):
            if budget == 0 or sequence not in self._running:
                continue
            length = min(sequence.num_tokens - sequence.num_computed, budget)
            while not self._allocator.grow(sequence.pages, sequence.num_computed + length):
                if self._preempt_youngest() is sequence:
                    break
            else:
                chunks.append(_chunk(sequence, length))
                budget -= length
        # budget is left only when every running sequence got all it needs, so free pages are free for new ones
        while budget > 0 and self._admits():
            sequence = self._waiting.popleft()
            self._running.append(sequence)
            length = min(sequence.num_tokens, budget)
            grown = self._allocator.grow(sequence.pages, length)
            assert grown
            chunks.append(_chunk(sequence, length))
            budget -= length
        return chunks

    def _admits(self) -> bool:
        if not self._waiting or len(self._running) >= self._config.max_num_seqs:
            return False
        # room for the whole prompt, or its later chunks would push out what runs
        return self._allocator.pages_for(self._waiting[0].num_tokens) <= self._allocator.num_free

    def _preempt_youngest(self) -> S:
        sequence = self._running.pop()
        self._free(sequence)
        sequence.num_preemptions += 1
        self._waiting.appendleft(sequence)
        return sequence

    def _free(self, sequence: S) -> None:
        self._allocator.release(sequence.pages)
        sequence.pages.clear()
        sequence.num_computed = 0


def _chunk(sequence: S, length: int) -> Chunk[S]:
    # a sequence whose tokens are all in the cache has one sampled in the same step, or ends
    assert length > 0, "a scheduled sequence has nothing to compute"
    end = sequence.num_computed + length
    return Chunk(sequence, sequence.num_computed, length, end == sequence.num_tokens)
