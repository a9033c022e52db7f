"""Bare steps of a plan as functions to be timed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Final

import torch

from pyruntime.bench.timing import wait_for
from pyruntime.engine.decode import one_row_each
from pyruntime.engine.memory import check_memory
from pyruntime.graph import SequenceWork
from pyruntime.ops.cache import KvCache
from pyruntime.ops.gpu.batch import GREEDY, BatchSizes
from pyruntime.ops.step import SequenceSlice, make_step
from pyruntime.plan import Plan

_PAGE_SIZE: Final = 16
# steps one after the other, of the same sequences
Works = Sequence[Sequence[SequenceWork]]


def step_runner(plan: Plan, work: Sequence[SequenceWork]) -> Callable[[], torch.Tensor]:
    """A function that computes one step over `work` again and again; the cache before it holds zeros."""
    return steps_runner(plan, [work])


def steps_runner(plan: Plan, works: Works) -> Callable[[], torch.Tensor]:
    """A function that computes steps over `works` one after the other, again and again, and gives the last logits.

    All steps are of the same sequences; the cache before the first one holds zeros. On a GPU decode steps run as in an
    engine, captured and with their tokens sampled.
    """
    return steps_runners(plan, [works])[0]


def steps_runners(plan: Plan, tests: Sequence[Works]) -> list[Callable[[], torch.Tensor]]:
    """Such a function for each of `tests`, which may be called in any order: they share one cache."""
    pages = [_pages_each(works) for works in tests]
    needed = max(map(sum, pages))
    check_memory(needed * _PAGE_SIZE * plan.kv_bytes_per_token, f"a KV cache of {needed} pages", str(plan.device))
    cache = plan.new_cache(needed, _PAGE_SIZE)
    cache.clear()
    if plan.gpu is not None:
        everything = [work for works in tests for work in works]
        decoding = {len(work) for work in everything if all(each.length == 1 for each in work)}
        rows, sequences = (max(count(work) for work in everything) for count in (_num_rows, len))
        plan.gpu.prepare(cache, BatchSizes(rows, rows, sequences, max(map(max, pages))))
        plan.gpu.capture(sorted(decoding))
    return [_runner(plan, works, pages_each, cache) for works, pages_each in zip(tests, pages, strict=True)]


def _runner(plan: Plan, works: Works, pages_each: Sequence[int], cache: KvCache) -> Callable[[], torch.Tensor]:
    pages, first = [], 0
    for count in pages_each:
        pages.append(range(first, first + count))
        first += count
    steps = [[_slice(plan, each, own) for each, own in zip(work, pages, strict=True)] for work in works]

    def run() -> torch.Tensor:
        sampling, tokens = [GREEDY] * len(pages), None
        for slices in steps:
            # making the step is part of every engine step, so it is timed too
            if plan.gpu is not None and one_row_each(slices):
                # what was sampled is fed back, as in an engine
                fed = (
                    slices
                    if tokens is None
                    else [replace(s, token_ids=[t]) for s, t in zip(slices, tokens, strict=True)]
                )
                tokens = plan.gpu.decode(fed, sampling, cache).tolist()
                plan.gpu.fed_back(tokens)
                sampling = [each.next() for each in sampling]
                logits = plan.gpu.decoded_logits(len(slices))
            else:
                logits = plan.run(make_step(slices, cache, plan.device))
        wait_for(plan.device)
        return logits

    return run


def _num_rows(work: Sequence[SequenceWork]) -> int:
    return sum(each.length for each in work)


def _pages_each(works: Works) -> list[int]:
    """Pages that each sequence fills."""
    ends = [max(each.start + each.length for each in sequence) for sequence in zip(*works, strict=True)]
    return [-(-end // _PAGE_SIZE) for end in ends]


def _slice(plan: Plan, work: SequenceWork, pages: range) -> SequenceSlice:
    ids = [(work.start + i) % plan.vocab_size for i in range(work.length)]
    return SequenceSlice(ids, work.start, pages, range(work.length - min(work.wanted, work.length), work.length))
