"""Two plans of one graph side by side: the first step where they part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pyruntime.errors import UsageError
from pyruntime.ops.cache import KvCache
from pyruntime.ops.qkv_rope import QkvRopeAttrs
from pyruntime.ops.step import SequenceSlice, Step, make_step
from pyruntime.plan.plan import Plan
from pyruntime.plan.step import PlanStep

# what a step left: its buffers by name, and the keys and values of its cache slot
_Left = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Difference:
    """The first buffer that differs: of which run, by which step, and how far.

    `error` is the largest difference over the root mean square of the expected values; infinite for NaN.
    """

    run: int
    step: str
    op: str
    buffer: str
    error: float

    def __str__(self) -> str:
        return f"run {self.run}, step {self.step} ({self.op}): {self.buffer} differs by {self.error:.3g}"


def first_difference(
    expected: Plan, found: Plan, runs: Sequence[Sequence[SequenceSlice]], *, page_size: int, limit: float
) -> Difference | None:
    """Run the slices of each of `runs` in both plans, one after the other over a cache each, and compare every step.

    Buffers are compared and, behind each step that writes the cache, the keys and values of the context. None where no
    error is above `limit`. Raises UsageError for plans of different graphs.
    """
    names, others = ([step.node.name for step in plan.steps] for plan in (expected, found))
    if names != others:
        raise UsageError("PLAN", f"the plans have different steps: {names} and {others}; lower the same graph twice")
    num_pages = max(page for run in runs for each in run for page in each.pages) + 1
    caches = [plan.new_cache(num_pages, page_size) for plan in (expected, found)]
    for number, slices in enumerate(runs):
        left = _walk(expected, slices, caches[0])
        for step, buffers in _walk(found, slices, caches[1]).items():
            for name, buffer in buffers.items():
                error = _error(buffer, left[step][name])
                if not error <= limit:
                    op = next(each.node.op for each in found.steps if each.node.name == step)
                    return Difference(number, step, op, name, error)
    return None


def _walk(plan: Plan, slices: Sequence[SequenceSlice], cache: KvCache) -> dict[str, _Left]:
    """What each step of one run left, by name, in order."""
    left: dict[str, _Left] = {}
    step = make_step(slices, cache, plan.device)

    def watch(each: PlanStep, outputs: tuple[torch.Tensor, ...]) -> None:
        copies = {name: out.clone() for name, out in zip(each.node.outputs, outputs, strict=True)}
        left[each.node.name] = copies | _context(each, step)

    plan.run(step, watch)
    return left


def _context(each: PlanStep, step: Step) -> _Left:
    attrs = each.node.attrs
    if not isinstance(attrs, QkvRopeAttrs) or not attrs.cache:
        return {}
    spans = step.view(each.node.rows).spans
    pairs = [step.cache.read(attrs.slot, span.pages, span.context) for span in spans]
    # slim attention has no values
    kinds = zip(("keys", "values"), zip(*pairs, strict=True), strict=False)
    return {f"{kind} of cache slot {attrs.slot}": torch.cat(parts) for kind, parts in kinds}


def _error(found: torch.Tensor, expected: torch.Tensor) -> float:
    if not expected.numel():
        return 0.0
    wide = expected.double()
    largest = float((found.double() - wide).abs().max())
    scale = float(wide.square().mean().sqrt())
    error = largest / scale if scale else largest
    return error if error == error else float("inf")
