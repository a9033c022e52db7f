"""NaN and infinity in one sequence: it fails and says so, no token comes of them, and no other sequence notices."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from unittest import mock

import pytest
import torch

from pyruntime.engine.engine import Engine
from pyruntime.engine.params import SamplingParams
from pyruntime.engine.request import RequestOutput, RunningSequence
from pyruntime.ops.attention import AttentionAttrs
from pyruntime.ops.step import Rows, Step
from pyruntime.plan import Plan
from pyruntime.plan.plan import PlanStep, Watch
from tests.engine.stress import KINDS, MODELS, Kind, all_values, prompt_of, roomy_engine, values_of
from tests.generation import drain, run_all, run_one, small_engine
from tests.helpers import page_size_of

VICTIM = "victim"
GREEDY = SamplingParams(temperature=0.0, max_tokens=9, logprobs=2)
RANDOM = SamplingParams(temperature=1.5, max_tokens=9, seed=5, logprobs=2)
SCORED = SamplingParams(temperature=0.0, max_tokens=5, logprobs=2, prompt_logprobs=1)
FIRST = {
    "before": (prompt_of(21, 0), GREEDY),
    VICTIM: (prompt_of(18, 1), GREEDY),
    "behind": (prompt_of(35, 2), RANDOM),
}
LATE = (prompt_of(20, 3), SCORED)
# one step over the same rows gives the same bits, on every target
SAME_ROWS = (Kind("reference", "float32", False), *KINDS[1:])
EXACT = KINDS[1:]

kinds = pytest.mark.parametrize("kind", SAME_ROWS, ids=str)
exact_kinds = pytest.mark.parametrize("kind", EXACT, ids=str)
models = pytest.mark.parametrize("model", MODELS)

# changes the engine at once, or its next step
Plant = Callable[[Engine, RunningSequence], AbstractContextManager[object]]


@dataclass(frozen=True)
class Found:
    """What came of one sequence, and of the others; `left` is how many tokens it had before."""

    victim: RequestOutput
    left: int
    others: dict[str, tuple[object, ...]]


def pools(engine: Engine) -> list[torch.Tensor]:
    """Keys and values of every slot."""
    return [*engine._cache._keys, *engine._cache._values]


def sequence_of(engine: Engine, name: str) -> RunningSequence:
    """The one sequence of a request."""
    return engine._requests[name].sequences[0]


def run_with(kind: Kind, model: str, plant: Plant) -> Found:
    """Three sequences that decode, a fourth whose prompt comes in, and `plant` in that step."""
    engine = roomy_engine(kind.plan(model))
    for name, request in FIRST.items():
        engine.add_request(name, *request)
    engine.step()
    engine.step()
    engine.add_request("late", *LATE)
    victim = sequence_of(engine, VICTIM)
    left = len(victim.output_token_ids)
    with plant(engine, victim):
        outputs = {output.request_id: output for output in engine.step()}
    if victim.finish_reason is not None:
        assert victim.pages == []
    elif not kind.exact:
        # with one row less torch adds up in another order, so it goes here too
        engine.abort(VICTIM)
    finished = outputs | drain(engine)
    return Found(finished.pop(VICTIM), left, all_values(finished))


def no_plant(engine: Engine, victim: RunningSequence) -> AbstractContextManager[object]:
    """Nothing."""
    return nullcontext()


@functools.cache
def undisturbed(kind: Kind, model: str) -> dict[str, tuple[object, ...]]:
    """The others where nothing was planted."""
    return run_with(kind, model, no_plant).others


def in_cache(pool: str, slot: int, position: int, value: float) -> Plant:
    """`value` in the key or value of one position: NaN in one element, or infinity in all."""

    def plant(engine: Engine, victim: RunningSequence) -> AbstractContextManager[object]:
        page, offset = victim.pages[position // engine.config.page_size], position % engine.config.page_size
        keys, values = engine._cache._keys[slot], engine._cache._values[slot]
        place = keys[page, :, :, offset] if pool == "keys" else values[page, :, offset]
        if value != value:
            place = place[-1, -1:]
        place.fill_(value)
        return nullcontext()

    return plant


def in_row(step_name: str, output: int, value: float, back: int = 0) -> Plant:
    """`value` in the first element of a buffer, right behind the step that wrote it, in the row `back` of the last."""

    def plant(engine: Engine, victim: RunningSequence) -> AbstractContextManager[object]:
        honest = Plan.run

        def run(plan: Plan, step: Step, watch: Watch | None = None) -> torch.Tensor:
            def write(each: PlanStep, outputs: tuple[torch.Tensor, ...]) -> None:
                if each.node.name == step_name:
                    outputs[output][_last_row(step, each.node.rows, victim) - back, 0] = value

            return honest(plan, step, write)

        return mock.patch.object(Plan, "run", run)

    return plant


def _last_row(step: Step, rows: Rows, victim: RunningSequence) -> int:
    """The number of the victim's last row in a view."""
    count = 0
    for each in step.slices:
        count += len(each.token_ids if rows is Rows.ALL else each.wanted)
        if list(each.pages) == victim.pages:
            return count - 1
    raise AssertionError("the victim is not in this step")


def buffers(plan: Plan) -> list[tuple[str, int]]:
    """Step and number of every buffer that a step writes."""
    return [(each.node.name, i) for each in plan.steps for i in range(len(each.outputs))]


def assert_failed_alone(kind: Kind, model: str, plant: Plant, what: str = "NaN") -> None:
    """The victim fails without a token more, and the others are the same to the last bit."""
    found = run_with(kind, model, plant)
    (victim,) = found.victim.outputs
    assert (victim.finish_reason, len(victim.token_ids)) == ("error", found.left)
    assert what in str(victim.stop_reason)
    assert victim.logprobs is not None
    assert len(victim.logprobs) == found.left
    assert found.others == undisturbed(kind, model)


def stays_finite(plan: Plan, name: str, value: float) -> bool:
    """Whether mathematics makes a number of an infinity behind a step.

    A softcap bounds an infinite score, and one logit of minus infinity is a token that cannot be drawn.
    """
    (step,) = (each for each in plan.steps if each.node.name == name)
    readers = [each.node.attrs for each in plan.steps if set(step.node.outputs) & set(each.node.inputs)]
    bounds = any(isinstance(attrs, AttentionAttrs) and attrs.attention.softcap is not None for attrs in readers)
    return bounds or (name == "head" and value < 0)


@kinds
@models
def test_nan_behind_any_step_of_a_decode_ends_its_sequence_alone(kind: Kind, model: str) -> None:
    for name, output in buffers(kind.plan(model)):
        assert_failed_alone(kind, model, in_row(name, output, torch.nan))


@kinds
@models
@pytest.mark.parametrize("value", [torch.inf, -torch.inf])
def test_infinity_behind_a_step_ends_its_sequence_alone_unless_mathematics_bounds_it(
    kind: Kind, model: str, value: float
) -> None:
    plan = kind.plan(model)
    for name, output in buffers(plan):
        plant = in_row(name, output, value)
        if stays_finite(plan, name, value):
            found = run_with(kind, model, plant)
            assert len(found.victim.outputs[0].token_ids) > found.left
            assert found.others == undisturbed(kind, model)
        else:
            assert_failed_alone(kind, model, plant, "inf" if name == "head" else "NaN")


@kinds
@models
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("pool", ["keys", "values"])
def test_nan_and_infinity_in_the_cache_end_their_sequence_alone(
    kind: Kind, model: str, pool: str, value: float
) -> None:
    last = len(FIRST[VICTIM][0]) - 1
    attentions = [each.node.attrs for each in kind.plan(model).steps if isinstance(each.node.attrs, AttentionAttrs)]
    assert attentions
    for attrs in attentions:
        # of the prompt, what the step's query at `last` + 2 sees first and last
        for position in {last + 3 - attrs.visible(last + 2), last}:
            assert_failed_alone(kind, model, in_cache(pool, attrs.slot, position, value))


@kinds
def test_a_key_that_left_the_window_has_no_effect(kind: Kind) -> None:
    # of three positions, the one of the step included, in slot 1 of this model
    model, position = "window and softcaps", len(FIRST[VICTIM][0]) - 2
    unharmed = values_of(run_with(kind, model, no_plant).victim)
    for value in (torch.nan, torch.inf):
        found = run_with(kind, model, in_cache("keys", 1, position, value))
        assert values_of(found.victim) == unharmed


@exact_kinds
@models
def test_nan_inside_a_prompt_ends_its_sequence_or_changes_nothing(kind: Kind, model: str) -> None:
    """Behind the last attention only the last row is read, so not every NaN of the others reaches a logit."""
    requests = {VICTIM: FIRST[VICTIM], "beside": FIRST["before"]}
    plan = kind.plan(model)
    expected = all_values(run_all(roomy_engine(plan), requests))
    reasons = set()
    for name, output in buffers(plan):
        (step,) = (each for each in plan.steps if each.node.name == name)
        for back in (0, 4, 17) if step.node.rows is Rows.ALL else (0,):
            engine = roomy_engine(plan)
            for each, request in requests.items():
                engine.add_request(each, *request)
            with in_row(name, output, torch.nan, back)(engine, sequence_of(engine, VICTIM)):
                outputs = {each.request_id: each for each in engine.step()}
            found = outputs | drain(engine)
            assert values_of(found["beside"]) == expected["beside"]
            (victim,) = found[VICTIM].outputs
            reasons.add(victim.finish_reason)
            if victim.finish_reason == "error":
                assert victim.token_ids == ()
            else:
                assert back > 0
                assert values_of(found[VICTIM]) == expected[VICTIM]
    assert "error" in reasons


@kinds
@models
def test_pages_of_a_failed_sequence_are_as_good_as_new_ones(kind: Kind, model: str) -> None:
    """They still hold its NaN: nothing behind a sequence's last position may count."""
    newcomer = (prompt_of(5, 4), GREEDY)
    engine, fresh = roomy_engine(kind.plan(model)), roomy_engine(kind.plan(model))
    fresh._cache.clear()
    engine.add_request(VICTIM, *FIRST[VICTIM])
    engine.step()
    pages = list(sequence_of(engine, VICTIM).pages)
    for pool in pools(engine):
        pool[pages] = torch.nan
    (failed,) = engine.step()
    assert failed.outputs[0].finish_reason == "error"
    engine.add_request("newcomer", *newcomer)
    engine.step()
    taken = sequence_of(engine, "newcomer").pages
    assert set(taken) <= set(pages)
    assert all(pool[taken].isnan().any() for pool in pools(engine))
    assert values_of(drain(engine)["newcomer"]) == values_of(run_one(fresh, *newcomer))


@kinds
@models
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 3e38])
def test_what_the_cache_held_before_has_no_effect(kind: Kind, model: str, value: float) -> None:
    plan = kind.plan(model)
    found = []
    for content in (0.0, value):
        # prompts come in by chunks, and one sequence takes the pages of another
        page_size = page_size_of(plan)
        engine = small_engine(plan, num_pages=80 // page_size, page_size=page_size, max_model_len=128, budget=7)
        for pool in pools(engine):
            pool.fill_(content)
        outputs = run_all(engine, {**FIRST, "late": LATE})
        assert {output.outputs[0].finish_reason for output in outputs.values()} == {"length"}
        found.append(all_values(outputs))
    assert found[0] == found[1]
