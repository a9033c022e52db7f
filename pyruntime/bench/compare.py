"""What dropping gains: predicted by bytes or operations, beside measured, for one dense plan and one pruned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pyruntime.bench.steps import step_runner
from pyruntime.bench.timing import Probe, Samples, interleaved, percentile
from pyruntime.graph import Cost, SequenceWork
from pyruntime.plan import Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One kind of step; decode is predicted by the bytes it moves, prefill by its operations."""

    name: str
    work: Sequence[SequenceWork]
    by_bytes: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Speed-up of the pruned plan over the dense one in one case, what each must do, and the times behind it."""

    case: Case
    predicted: float
    dense: Samples
    pruned: Samples
    dense_cost: Cost
    pruned_cost: Cost

    @property
    def measured(self) -> float:
        """Median of the ratios of neighbouring samples: a machine that changes its speed half-way changes both."""
        return self.measured_percentile(50)

    def measured_percentile(self, percent: float) -> float:
        """Of the ratios of neighbouring samples, the one that `percent` of them do not exceed."""
        ratios = [slow / fast for slow, fast in zip(self.dense.seconds, self.pruned.seconds, strict=True)]
        return percentile(ratios, percent)


def decode_case(batch: int, context: int) -> Case:
    """One new token for each of `batch` sequences with `context` tokens before it."""
    return Case(
        name=f"decode, batch {batch}, context {context}", work=[SequenceWork(context, 1)] * batch, by_bytes=True
    )


def prefill_case(length: int) -> Case:
    """A prompt of `length` tokens whose last logits are wanted."""
    return Case(name=f"prefill, {length} tokens", work=[SequenceWork(0, length)], by_bytes=False)


def compare_plans(
    dense: Plan, pruned: Plan, cases: Sequence[Case], repeats: int, probe: Probe | None = None
) -> list[Comparison]:
    """Time both plans in turn, `repeats` times per case. The caller has checked their results (gate.check_plan).

    With a `probe` (ceilings.Ceilings), each sample carries the ceilings around it.
    """
    found = []
    for case in cases:
        before, after = dense.total_cost(case.work), pruned.total_cost(case.work)
        predicted = before.num_bytes / after.num_bytes if case.by_bytes else before.flops / after.flops
        runs = [step_runner(dense, case.work), step_runner(pruned, case.work)]
        slow, fast = interleaved(runs, repeats, probe=probe)
        found.append(
            Comparison(case=case, predicted=predicted, dense=slow, pruned=fast, dense_cost=before, pruned_cost=after)
        )
    return found
