"""Each step of a C++ plan held against the float64 reference of that step alone, on what the C++ step itself read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pyruntime.ops.cache import KvCache
from pyruntime.ops.qkv_rope import QkvRopeAttrs
from pyruntime.ops.step import SequenceSlice, Step, make_step
from pyruntime.plan import Plan, PlanStep
from tests.helpers import pages_of

PAGE_SIZE = 16
# what rounds what it multiplies to the dtype of the weights; everything else computes in float32
MULTIPLYING = {"linear", "qkv_rope", "mlp", "mlp_chain", "head"}
# normalised mean square errors: the greatest that were seen are less than a fifth of these
SUMMED, ROUNDED = 1e-11, 1e-4
EXACT = {"embed": 1e-13, "add": 1e-13, "gather": 0.0, "norm": 1e-12}


@dataclass(frozen=True)
class Error:
    """How far one buffer, or the cache behind a step that writes it, is from the reference of its step.

    `error` is the mean square of the differences over that of what was expected, over all runs.
    """

    step: str
    op: str
    what: str
    error: float
    limit: float

    @property
    def wrong(self) -> bool:
        """Whether the error is above its limit, or no number."""
        return not self.error <= self.limit


# squares of (the differences, what was expected) by step, op and buffer
_Squares = dict[tuple[str, str, str], list[float]]


def limit_of(op: str, dtype: torch.dtype) -> float:
    """The largest error of an op that is no mistake."""
    return EXACT.get(op, ROUNDED if dtype is torch.bfloat16 and op in MULTIPLYING else SUMMED)


def advancing(lengths: Sequence[int], chunks: Sequence[int], vocab: int = 37) -> list[list[SequenceSlice]]:
    """Runs that advance sequences of `lengths` by `chunks` tokens; each wants its first and last token of the run."""
    sequences = [[(5 * i * i + seed) % vocab for i in range(length)] for seed, length in enumerate(lengths)]
    pages = pages_of(sequences, PAGE_SIZE)
    found, start = [], 0
    for chunk in chunks:
        parts = [(sequence[start : start + chunk], own) for sequence, own in zip(sequences, pages, strict=True)]
        found.append([SequenceSlice(ids, start, own, sorted({0, len(ids) - 1})) for ids, own in parts if ids])
        start += chunk
    return found


def errors(expected: Plan, found: Plan, runs: Sequence[Sequence[SequenceSlice]]) -> list[Error]:
    """The errors of every step of `runs` in the C++ plan `found`; `expected` is the float64 reference of its graph."""
    assert expected.dtype is torch.float64
    num_pages = max(page for run in runs for each in run for page in each.pages) + 1
    ours = found.new_cache(num_pages, PAGE_SIZE)
    wide = KvCache(found.kv_shapes, num_pages, PAGE_SIZE, torch.float64)
    squares: _Squares = {}
    for slices in runs:
        _compare_run(expected, found, (make_step(slices, wide), make_step(slices, ours)), squares)
    return [
        Error(step, op, what, off / (right or 1.0), limit_of(op, found.dtype))
        for (step, op, what), (off, right) in squares.items()
    ]


def _compare_run(expected: Plan, found: Plan, steps: tuple[Step, Step], squares: _Squares) -> None:
    references = {each.node.name: each for each in expected.steps}
    buffers: dict[str, torch.Tensor] = {}

    def watch(each: PlanStep, outputs: tuple[torch.Tensor, ...]) -> None:
        node, reference = each.node, references[each.node.name]
        assert each.native is not None and reference.implementation.run is not None
        inputs = [buffers[name] for name in node.inputs]
        right = reference.implementation.run(node.attrs, reference.weights, inputs, steps[0].view(node.rows))
        pairs = list(zip(node.outputs, outputs, right, strict=True)) + _written(each, *steps)
        for what, mine, theirs in pairs:
            sums = squares.setdefault((node.name, node.op, what), [0.0, 0.0])
            sums[0] += float((mine.double() - theirs).square().sum())
            sums[1] += float(theirs.square().sum())
        buffers.update((name, out.double()) for name, out in zip(node.outputs, outputs, strict=True))
        # whoever reads the cache next reads what C++ left there
        for slot in range(steps[0].cache.num_slots):
            steps[0].cache._keys[slot].copy_(steps[1].cache._keys[slot])
            steps[0].cache._values[slot].copy_(steps[1].cache._values[slot])

    found.run(steps[1], watch)


def _written(each: PlanStep, wide: Step, ours: Step) -> list[tuple[str, torch.Tensor, torch.Tensor]]:
    """Names, found and expected keys and values of the context, behind a step that writes them."""
    attrs = each.node.attrs
    if not isinstance(attrs, QkvRopeAttrs) or not attrs.cache:
        return []
    kept = []
    for step in (ours, wide):
        pairs = [step.cache.read(attrs.slot, span.pages, span.context) for span in step.view(each.node.rows).spans]
        kept.append([torch.cat(parts) for parts in zip(*pairs, strict=True)])
    return [(kind, mine, right) for kind, mine, right in zip(("keys", "values"), *kept, strict=True)]
