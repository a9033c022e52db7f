"""Steps of any size launch the kernels that warm-up compiled: Triton makes one for each set of constants and types."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import replace

import pytest

from pyruntime.bench import shape_spec
from pyruntime.engine.capture import warm_up_prefill
from pyruntime.ops.gpu.batch import BatchSizes
from pyruntime.ops.step import SequenceSlice, make_step
from pyruntime.plan import Plan
from tests.kernels.compiled import absent_device, unique
from tests.kernels.models import Case, pruned
from tests.kernels.record import DEVICES, PAGE_SIZE, Recorded, Recorder, plan_of

CAPABILITY = 90


def kernels_of(plan: Plan, steps: Iterable[Sequence[int]], max_pages: int) -> set[str]:
    """What tells apart the kernels that prefill launches for sequences of these lengths, over tables so wide."""
    launches: list[Recorded] = []
    for lengths in steps:
        sizes = BatchSizes(sum(lengths), len(lengths), len(lengths), max_pages)
        launches += recorded(plan, lengths, [lengths[-1] - 1], sizes)
    return names_of(launches)


def recorded(plan: Plan, lengths: Sequence[int], wanted: Sequence[int], sizes: BatchSizes) -> list[Recorded]:
    """Launches of one step whose sequences share their pages; `wanted` are rows of the last, the others have one."""
    assert plan.gpu is not None
    plan.gpu.launcher = recorder = Recorder()
    pages = range(-(-max(lengths) // PAGE_SIZE))
    cache = plan.new_cache(len(pages), PAGE_SIZE)
    plan.gpu.prepare(cache, sizes)
    slices = [SequenceSlice([0] * length, 0, pages, [length - 1]) for length in lengths[:-1]]
    slices.append(SequenceSlice([0] * lengths[-1], 0, pages, wanted))
    plan.gpu.run(make_step(slices, cache, "meta"))
    return recorder.launches


def names_of(launches: Sequence[Recorded]) -> set[str]:
    """What tells their kernels apart."""
    with absent_device(CAPABILITY):
        return set(unique(launches, CAPABILITY))


@pytest.fixture(scope="module", params=["smollm2-135m", "llama-3-8b", "llama-2-7b"])
def plan(request: pytest.FixtureRequest) -> Plan:
    return plan_of(Case("a model", pruned(shape_spec(request.param))), DEVICES[CAPABILITY])


@pytest.mark.parametrize("rows", [(1, 2, 3, 15, 16), (17, 18, 31, 32, 48), (500, 511, 512)], ids=str)
def test_few_rows_more_or_less_need_no_other_kernel(plan: Plan, rows: tuple[int, ...]) -> None:
    # sequences of 4 rows and less, of one tile of attention
    steps = [[4] * (count // 4) + [1] * (count % 4) for count in rows]
    assert kernels_of(plan, steps, 512) == kernels_of(plan, [steps[0], steps[-1]], 512)


@pytest.mark.parametrize("max_pages", [1024, 1000, 1027], ids=str)
def test_page_tables_of_any_width_need_no_other_kernel(plan: Plan, max_pages: int) -> None:
    steps = [[3], [20], [300, 1]]
    assert kernels_of(plan, steps, max_pages) == kernels_of(plan, steps, 1008)


@pytest.mark.parametrize(
    "sizes", [BatchSizes(2048, 2048, 32, 512), BatchSizes(600, 600, 4, 20), BatchSizes(40, 40, 1, 200)], ids=str
)
def test_no_step_needs_a_kernel_that_warm_up_did_not_launch(plan: Plan, sizes: BatchSizes) -> None:
    assert plan.gpu is not None
    plan.gpu.launcher = recorder = Recorder()
    warm_up_prefill(plan, sizes, PAGE_SIZE)
    known, chosen = names_of(recorder.launches), random.Random(0)
    longest = min(sizes.max_rows, sizes.max_pages * PAGE_SIZE)
    for _ in range(40):
        lengths = [round(longest ** chosen.random())]
        left, others = sizes.max_rows - lengths[0], chosen.randrange(sizes.max_sequences)
        while len(lengths) <= others and left > 0:
            lengths.append(min(round(longest ** chosen.random()), left))
            left -= lengths[-1]
        wanted = range(lengths[-1]) if chosen.random() < 0.3 else [lengths[-1] - 1]
        assert not names_of(recorded(plan, lengths, wanted, sizes)) - known, (lengths, wanted)


def test_warm_up_launches_nothing_where_kernels_are_interpreted(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    assert plan.gpu is not None
    plan.gpu.launcher = recorder = Recorder()
    monkeypatch.setattr(plan.gpu, "info", replace(plan.gpu.info, capability=0))
    warm_up_prefill(plan, BatchSizes(64, 64, 4, 20), PAGE_SIZE)
    assert not recorder.launches
