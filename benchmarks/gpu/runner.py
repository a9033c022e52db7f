"""Decode steps and prompts of a plan, as the engine runs them, over a cache of random keys and values."""

from __future__ import annotations

import torch

from pyruntime.ops.cache import KvCache
from pyruntime.ops.gpu.batch import GREEDY, BatchSizes
from pyruntime.ops.step import SequenceSlice, Step, make_step
from pyruntime.plan import Plan
from pyruntime.plan.gpu import GpuRunner

PAGE_SIZE = 16


def gpu_of(plan: Plan) -> GpuRunner:
    """The runner of a plan for target cuda."""
    assert plan.gpu is not None
    return plan.gpu


def num_pages(length: int) -> int:
    """Pages of a sequence of `length` tokens."""
    return -(-length // PAGE_SIZE)


def filled_cache(plan: Plan, pages: int, seed: int = 0) -> KvCache:
    """A cache of normal keys and values, the same for the same seed."""
    cache = plan.new_cache(pages, PAGE_SIZE)
    generator = torch.Generator(plan.device).manual_seed(seed)
    for slot in range(cache.num_slots):
        for pool in cache.pools(slot):
            pool.normal_(generator=generator)
    return cache


class Decoder:
    """`batch` sequences with `context` tokens in the cache and `room` for more: one token each a step, fed back.

    On a GPU a step is a replay of a captured graph and returns at once; in the interpreter it is done when it returns.
    """

    def __init__(self, plan: Plan, batch: int, context: int, room: int, *, capture: bool = True) -> None:
        each = num_pages(context + room)
        self._gpu = gpu_of(plan)
        self._batch, self._context = batch, context
        self._pages = [tuple(range(i * each, (i + 1) * each)) for i in range(batch)]
        self.cache = filled_cache(plan, batch * each)
        self._vocab_size = plan.vocab_size
        self._tokens: list[int] = []
        self._position = context
        with torch.inference_mode():
            self._gpu.prepare(self.cache, BatchSizes(batch, batch, batch, each))
            if capture:
                self._gpu.capture([batch])
        self.captured = batch in self._gpu.batch_sizes

    def expected(self, plan: Plan) -> torch.Tensor:
        """Logits [batch, vocab] of the first step, through the form of the plan that takes any rows."""
        self._rewind()
        return plan.run(make_step(self._slices(), self.cache, plan.device))

    def start(self) -> list[int]:
        """Do the first step behind the context; the tokens it chose."""
        self._rewind()
        return self.launch()

    def launch(self) -> list[int]:
        """One step as the engine asks for it: rows that the device does not hold yet are sent; the tokens it chose."""
        with torch.inference_mode():
            self._tokens = self._gpu.decode(self._slices(), [GREEDY] * self._batch, self.cache).tolist()
            self._gpu.fed_back(self._tokens)
        self._position += 1
        return self._tokens

    def step(self) -> None:
        """One step behind the one before it, for the clock."""
        if self.captured:
            self._gpu.replay(self._batch)
        else:
            self.launch()

    def logits(self) -> torch.Tensor:
        """Logits [batch, vocab] of the last step, static."""
        return self._gpu.decoded_logits(self._batch)

    def _rewind(self) -> None:
        self._position = self._context
        self._tokens = [i * 7919 % self._vocab_size for i in range(self._batch)]

    def _slices(self) -> list[SequenceSlice]:
        pairs = zip(self._tokens, self._pages, strict=True)
        return [SequenceSlice([token], self._position, pages, [0]) for token, pages in pairs]


def prompt_step(plan: Plan, length: int) -> Step:
    """A step that reads one prompt and wants the logits behind it."""
    ids = [i * 7919 % plan.vocab_size for i in range(length)]
    cache = plan.new_cache(num_pages(length), PAGE_SIZE)
    return make_step([SequenceSlice(ids, 0, range(num_pages(length)), [length - 1])], cache, plan.device)
