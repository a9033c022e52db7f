"""The memory of a run: nothing is read that it did not write, and nothing is written beside what it was given."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from pyruntime.graph import build, fuse
from pyruntime.ops.cache import KvCache
from pyruntime.ops.program import Program
from pyruntime.ops.step import Rows, SequenceSlice, Step, make_step
from pyruntime.plan import Plan, lower
from pyruntime.spec import ModelSpec
from tests.helpers import nmse
from tests.specs import ODD_MODELS, D, attention_of, mlp_of, model_of, random_model, rms

PAGE_SIZE = 16
SENTINEL = 0x5A
SIZES = model_of(
    [(attention_of(D, 3, 3, 10, sub=rms(30)), mlp_of(D, 63), False), (None, mlp_of(D, 1, sub=rms(1)), False)]
)
MODELS = {**ODD_MODELS, "odd sizes": SIZES}
# rows of each sequence in one step: one, around a tile of 12 and two of them, pages that are just full
BATCHES = [[1], [12], [13], [25], [16], [17, 1, 16], [1] * 13, [48, 3]]
ISAS = ("generic", None)


def plan_of(spec: ModelSpec, dtype: torch.dtype = torch.float32) -> Plan:
    return lower(fuse(build(spec)), random_model(spec, dtype), target="cpu")


def slices_of(lengths: list[int], start: int = 0, spare: int = 0) -> list[SequenceSlice]:
    """A slice a sequence, on pages of its own; `spare` more pages than it needs follow at its end."""
    slices, page = [], 0
    for i, length in enumerate(lengths):
        count = -(-(start + length) // PAGE_SIZE) + spare
        ids = [(7 * i + 3 * k) % 37 for k in range(length)]
        slices.append(SequenceSlice(ids, start, list(range(page, page + count))[::-1], [0] if i else range(length)))
        page += count
    return slices


def num_pages(slices: list[SequenceSlice]) -> int:
    return sum(len(each.pages) for each in slices)


def program_of(plan: Plan) -> Program:
    assert plan.program is not None
    return plan.program


def run_with(plan: Plan, step: Step, prepare: Callable[[torch.Tensor, list[tuple[int, int]]], None]) -> torch.Tensor:
    """Logits of a run whose workspace, as bytes, was prepared; `prepare` gets the regions too."""
    with torch.inference_mode(), program_of(plan).start(step) as run:
        regions = run.native.regions(step.num_rows(Rows.ALL), step.num_rows(Rows.WANTED))  # type: ignore[attr-defined]
        prepare(run.workspace.view(torch.uint8), regions)
        run.logits.fill_(torch.nan)
        run.execute(0, program_of(plan).num_steps)
        return run.logits.clone()


def poison(workspace: torch.Tensor, regions: list[tuple[int, int]]) -> None:
    """NaN everywhere, whatever an earlier run left."""
    workspace.fill_(255)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("lengths", BATCHES, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_a_reused_workspace_is_never_read_before_it_is_written(
    name: str, lengths: list[int], dtype: torch.dtype
) -> None:
    plan = plan_of(MODELS[name], dtype)
    slices = slices_of(lengths)
    # a larger run first: the workspace then holds finite values that a stale read would take
    larger = slices_of([48, 48])
    plan.run(make_step(larger, plan.new_cache(num_pages(larger), PAGE_SIZE)))
    left = plan.run(make_step(slices, plan.new_cache(num_pages(slices), PAGE_SIZE)))
    poisoned = run_with(plan, make_step(slices, plan.new_cache(num_pages(slices), PAGE_SIZE)), poison)
    assert not poisoned.isnan().any()
    assert torch.equal(poisoned, left)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_nothing_is_written_between_the_regions(
    name: str, dtype: torch.dtype, threads: int, isa: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYRUNTIME_NUM_THREADS", str(threads))
    if isa is not None:
        monkeypatch.setenv("PYRUNTIME_CPU_ISA", isa)
    plan = plan_of(MODELS[name], dtype)
    for lengths in BATCHES:
        gaps: list[torch.Tensor] = []

        def guard(workspace: torch.Tensor, regions: list[tuple[int, int]], gaps: list[torch.Tensor] = gaps) -> None:
            workspace.fill_(255)
            ends = [offset + num_bytes for offset, num_bytes in regions]
            starts = [*(offset for offset, _ in regions[1:]), workspace.numel()]
            for end, start in zip(ends, starts, strict=True):
                assert start - end >= 64
                gaps.append(workspace[end:start].fill_(SENTINEL))

        slices = slices_of(lengths)
        logits = run_with(plan, make_step(slices, plan.new_cache(num_pages(slices), PAGE_SIZE)), guard)
        assert not logits.isnan().any()
        assert gaps
        assert all(bool((gap == SENTINEL).all()) for gap in gaps)


def cache_bytes(cache: KvCache) -> list[torch.Tensor]:
    """Every pool, by pages: [num_pages, bytes of a page]."""
    return [pool.flatten(1).view(torch.uint8) for pool in (*cache._keys, *cache._values)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_only_the_slots_of_the_steps_own_tokens_are_written(name: str, dtype: torch.dtype) -> None:
    """Pages of others stay as they were, bit by bit, and so do the spare pages of a sequence and its other offsets."""
    plan = plan_of(MODELS[name], dtype)
    for lengths in ([16], [17, 1], [1, 32, 5]):
        slices = slices_of(lengths, spare=1)
        cache = plan.new_cache(num_pages(slices) + 2, PAGE_SIZE)
        for pool in cache_bytes(cache):
            pool.fill_(SENTINEL)
        step = make_step(slices, cache)
        assert not plan.run(step).isnan().any()
        written = step.view(Rows.ALL).slots
        for slot in range(cache.num_slots):
            for pool, offset_dim in ((cache._keys[slot], 3), (cache._values[slot], 2)):
                by_slot = pool.movedim(offset_dim, 1).flatten(0, 1).flatten(1)  # [page * page_size + offset, values]
                untouched = (by_slot.contiguous().view(torch.uint8) == SENTINEL).all(dim=1)
                expected = torch.ones(len(by_slot), dtype=torch.bool)
                expected[written] = False
                assert torch.equal(untouched, expected)


@pytest.mark.parametrize("context", [15, 16, 17, 31, 32, 48])
@pytest.mark.parametrize("name", MODELS)
def test_what_stands_behind_the_context_never_reaches_the_logits(name: str, context: int) -> None:
    """The cache starts as NaN; the last page may be just full, and the page behind it is a spare one."""
    plan = plan_of(MODELS[name])
    ids = [(3 * k) % 37 for k in range(context + 1)]
    pages = [4, 1, 3, 0]
    cache = plan.new_cache(6, PAGE_SIZE)
    for pool in cache_bytes(cache):
        pool.fill_(255)
    plan.run(make_step([SequenceSlice(ids[:-1], 0, pages, [])], cache))
    after = plan.run(make_step([SequenceSlice(ids[-1:], context, pages, [0])], cache))
    whole = plan.run(make_step([SequenceSlice(ids, 0, pages, [context])], plan.new_cache(6, PAGE_SIZE)))
    assert not after.isnan().any()
    assert torch.equal(after, whole)
    model = random_model(MODELS[name], torch.float32)
    reference = lower(build(model.spec), model, dtype="float64")
    expected = reference.run(make_step([SequenceSlice(ids, 0, pages, [context])], reference.new_cache(6, PAGE_SIZE)))
    assert nmse(after, expected) < 1e-9


@pytest.mark.parametrize("context", [16, 21, 32])
def test_pages_of_another_sequence_never_reach_the_logits(context: int) -> None:
    plan = plan_of(ODD_MODELS["window and softcaps"])
    ids = [(3 * k) % 37 for k in range(context + 1)]
    found = []
    for others in (0.0, torch.nan, torch.inf):
        cache = plan.new_cache(8, PAGE_SIZE)
        for pool in (*cache._keys, *cache._values):
            pool.fill_(others)
        for start, end in ((0, context), (context, context + 1)):
            step = make_step([SequenceSlice(ids[start:end], start, [6, 0, 3], [end - start - 1])], cache)
            logits = plan.run(step)
        found.append(logits)
    assert not found[0].isnan().any()
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_the_weights_are_only_read() -> None:
    plan = plan_of(ODD_MODELS["merged, parallel, chained"])
    before = [{role: weight.clone() for role, weight in step.weights.items()} for step in plan.steps]
    slices = slices_of([17, 1, 16])
    plan.run(make_step(slices, plan.new_cache(num_pages(slices), PAGE_SIZE)))
    for step, weights in zip(plan.steps, before, strict=True):
        assert all(torch.equal(step.weights[role], weight) for role, weight in weights.items())


def test_a_smaller_run_takes_no_new_workspace(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of(ODD_MODELS["window and softcaps"])
    taken = []
    for lengths in ([40], [3], [40], [41]):
        slices = slices_of(lengths)
        with program_of(plan).start(make_step(slices, plan.new_cache(num_pages(slices), PAGE_SIZE))) as run:
            taken.append(run.workspace.data_ptr())
    assert taken[0] == taken[1] == taken[2]
