"""The two sides of a comparison, alike from outside: a prompt in, the logits of the last position out, then steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Final, Protocol

import torch
from transformers import DynamicCache

from pyruntime.bench import Ceiling, Samples
from pyruntime.bench.timing import Probe
from pyruntime.ops.step import SequenceSlice, make_step
from pyruntime.plan import Plan

_PAGE_SIZE: Final = 16


class Side(Protocol):
    """One implementation. Tokens are [batch] and [batch, length], logits [batch, vocab]."""

    def start(self, prompts: torch.Tensor, room: int) -> torch.Tensor:
        """Forget everything, read `prompts`, and give the logits behind them; `room` tokens may follow."""
        ...

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits behind one more token for each sequence."""
        ...


class Ours:
    """A pyruntime plan. The cache is kept while the sizes stay, as an engine keeps its own."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._sizes = (0, 0)
        self._length = 0
        self._pages: list[range] = []

    def start(self, prompts: torch.Tensor, room: int) -> torch.Tensor:
        """All prompts in one step."""
        batch, length = prompts.shape
        count = -(-(length + room) // _PAGE_SIZE)
        if self._sizes != (batch, count):
            self._sizes = (batch, count)
            self._cache = self._plan.new_cache(batch * count, _PAGE_SIZE)
            self._pages = [range(i * count, (i + 1) * count) for i in range(batch)]
        self._length = 0
        return self._run(prompts.tolist())

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """One step of the plan."""
        return self._run([[token] for token in tokens.tolist()])

    def _run(self, rows: Sequence[Sequence[int]]) -> torch.Tensor:
        last = len(rows[0]) - 1
        slices = [SequenceSlice(row, self._length, pages, [last]) for row, pages in zip(rows, self._pages, strict=True)]
        self._length += last + 1
        return self._plan.run(make_step(slices, self._cache, self._plan.device))


class Theirs:
    """A transformers model, called eagerly with its own growing cache."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def start(self, prompts: torch.Tensor, room: int) -> torch.Tensor:
        """All prompts at once into a fresh cache, which needs no room ahead."""
        self._cache = DynamicCache(config=self._model.config)
        return self._run(prompts)

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """One call of the model."""
        return self._run(tokens[:, None])

    def _run(self, tokens: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            found = self._model(input_ids=tokens, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        logits: torch.Tensor = found.logits[:, -1]
        return logits


def greedy(side: Side, logits: torch.Tensor) -> Callable[[], object]:
    """A function that makes one more token of every sequence, again and again: a step and the choice behind it."""
    tokens = logits.argmax(-1)

    def run() -> None:
        nonlocal tokens
        tokens = side.step(tokens).argmax(-1)

    return run


def paired(
    runs: Sequence[Callable[[], object]], repeats: int, pause: float, warmup: int, probe: Probe, burst: int = 1
) -> tuple[Samples, ...]:
    """Time `runs` in turn, the first one first in every second round, `pause` seconds of silence before each.

    A sample is the mean of `burst` runs without a pause between them; before a burst of several, one run is not timed.
    Threads of the one side may still be looking for work when the other one begins; the pause lets them fall asleep.
    Between two rounds stands a reading of the ceilings; a sample carries the mean of the two around its round.
    """
    seconds: list[list[float]] = [[] for _ in runs]
    ceilings: list[Ceiling] = []
    before = _in_silence(probe, pause)
    for i in range(-warmup, repeats):
        order = list(enumerate(runs))
        for place, run in order if i % 2 == 0 else order[::-1]:
            time.sleep(pause)
            elapsed = _mean_seconds(run, burst)
            if i >= 0:
                seconds[place].append(elapsed)
        after = _in_silence(probe, pause)
        if i >= 0:
            ceilings.append(before.mean(after))
        before = after
    return tuple(Samples(tuple(own), tuple(ceilings)) for own in seconds)


def _in_silence(probe: Probe, pause: float) -> Ceiling:
    time.sleep(pause)
    return probe()


def _mean_seconds(run: Callable[[], object], burst: int) -> float:
    if burst > 1:
        run()
    begin = time.perf_counter()
    for _ in range(burst):
        run()
    return (time.perf_counter() - begin) / burst
