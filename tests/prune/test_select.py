"""Choices from scores: orders, ties, bounds, budgets; judged by sorting and counting in plain Python."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyruntime.errors import UsageError
from pyruntime.passes import drop
from pyruntime.prune import Calibration, ScoreOptions, Scores, Selection, score, select, select_iteratively
from pyruntime.spec import DropPlan, ModelSpec, drop_sublayers
from tests.specs import ATTENTION, ATTENTIONS, PLAIN_MLP, model_of, random_model

L = 6
SPEC = model_of([(ATTENTION, PLAIN_MLP, False)] * L)
# keys and values of one token: 2 heads of 6 values
KV_VALUES = 2 * 2 * 6
Values = Sequence[float | None]


def scores(attention: Values, mlp: Values, block: Values | None = None, **more: Any) -> Scores:
    kinds = {"attention": tuple(attention), "mlp": tuple(mlp), "block": tuple(block or attention)}
    return Scores(model="", family="test", num_layers=len(attention), values={"cosine": kinds}, **more)


def choose(found: Scores | None, spec: ModelSpec = SPEC, **said: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    plan = select(spec, found, Selection(**said))
    return plan.attention, plan.mlp


SOME = scores([0.3, 0.1, 0.5, 0.2, 0.6, 0.4], [0.15, 0.9, 0.35, 0.8, 0.25, 0.7], [0.6, 0.5, 0.4, 0.3, 0.2, 0.1])

CHOICES: list[tuple[dict[str, Any], tuple[tuple[int, ...], tuple[int, ...]]]] = [
    ({"drop_n": 1}, ((1,), ())),
    ({"drop_n": 3}, ((0, 1, 3), ())),
    ({"drop_n": 6}, ((0, 1, 2, 3, 4, 5), ())),
    ({"target": "mlp", "drop_n": 2}, ((), (0, 4))),
    ({"target": "block", "drop_n": 2}, ((4, 5), (4, 5))),
    # .1 A1, .15 M0, .2 A3, .25 M4, .3 A0, .35 M2
    ({"target": "joint", "drop_n": 2}, ((1,), (0,))),
    ({"target": "joint", "drop_n": 5}, ((0, 1, 3), (0, 4))),
    ({"target": "joint", "drop_n": 12}, ((0, 1, 2, 3, 4, 5), (0, 1, 2, 3, 4, 5))),
    ({"drop_ratio": 0.5}, ((0, 1, 3), ())),
    ({"drop_ratio": 0.49}, ((1, 3), ())),
    ({"drop_ratio": 1.0}, ((0, 1, 2, 3, 4, 5), ())),
    ({"target": "joint", "drop_ratio": 0.25}, ((1, 3), (0,))),
    ({"metric": "reverse", "drop_n": 2}, ((4, 5), ())),
    ({"metric": "reverse", "target": "block", "drop_n": 1}, ((5,), (5,))),
    ({"metric": "reverse", "target": "joint", "drop_n": 3}, ((4, 5), (5,))),
    ({"method": "last", "drop_n": 2}, ((4, 5), ())),
    ({"method": "keep-last", "drop_n": 2}, ((3, 4), ())),
    ({"method": "keep-last", "target": "mlp", "drop_n": 5}, ((), (0, 1, 2, 3, 4))),
    ({"method": "keep-last", "target": "block", "drop_n": 1}, ((4,), (4,))),
]


@pytest.mark.parametrize(("said", "expected"), CHOICES, ids=str)
def test_the_lowest_scores_are_dropped(said: dict[str, Any], expected: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    assert choose(SOME, **said) == expected


def test_a_third_of_three_is_one() -> None:
    """0.1 + 0.2 and the like must not round a whole number down."""
    spec = model_of([(ATTENTION, None, False)] * 10)
    for count in range(1, 11):
        found = select(spec, None, Selection(metric="reverse", drop_ratio=count / 10))
        assert len(found.attention) == count


@given(
    attention=st.lists(st.integers(0, 3), min_size=L, max_size=L),
    mlp=st.lists(st.integers(0, 3), min_size=L, max_size=L),
    count=st.integers(1, L),
)
@settings(max_examples=60, deadline=None)
def test_ties_go_to_the_lower_layer_and_to_attention(attention: list[int], mlp: list[int], count: int) -> None:
    found = scores(attention, mlp)
    lowest = sorted((value, i) for i, value in enumerate(attention))[:count]
    assert choose(found, drop_n=count)[0] == tuple(sorted(i for _, i in lowest))
    both = [(value, 0, i) for i, value in enumerate(attention)] + [(value, 1, i) for i, value in enumerate(mlp)]
    first = sorted(both)[:count]
    joint = tuple(tuple(sorted(i for _, kind, i in first if kind == own)) for own in (0, 1))
    assert choose(found, target="joint", drop_n=count) == joint


def test_equal_scores_drop_the_first_layers() -> None:
    equal = scores([0.5] * L, [0.5] * L)
    assert choose(equal, drop_n=2) == ((0, 1), ())
    assert choose(equal, target="joint", drop_n=7) == ((0, 1, 2, 3, 4, 5), (0,))


def test_random_choices_are_those_of_their_seed() -> None:
    draws = {choose(None, metric="random", target="joint", drop_n=4, seed=seed) for seed in range(20)}
    assert len(draws) > 10
    assert choose(None, metric="random", drop_n=3, seed=7) == choose(None, metric="random", drop_n=3, seed=7)


BOUNDS = [
    {"drop_n": 0},
    {"drop_n": -1},
    {"drop_n": 7},
    {"drop_n": True},
    {"drop_n": 1.0},
    {"target": "mlp", "drop_n": 7},
    {"target": "joint", "drop_n": 13},
    {"target": "block", "drop_n": 7},
    {"drop_ratio": 0.0},
    {"drop_ratio": 0.16},
    {"drop_ratio": 1.01},
    {"drop_ratio": -0.5},
    {"drop_ratio": float("nan")},
    {"kv_bytes": -1},
    {"method": "last", "drop_n": 7},
    {"method": "keep-last", "drop_n": 6},
]


@pytest.mark.parametrize("said", BOUNDS, ids=str)
def test_bounds_are_refused(said: dict[str, Any]) -> None:
    with pytest.raises(UsageError) as caught:
        choose(SOME, **said)
    assert caught.value.exit_code == 2


CONTRADICTIONS: list[tuple[dict[str, Any], str]] = [
    ({}, "no budget"),
    ({"drop_n": 1, "drop_ratio": 0.5}, "drop_n and drop_ratio"),
    ({"drop_n": 1, "target": "attention"}, "expected one of attn"),
    ({"drop_n": 1, "metric": "taylor"}, "expected one of cosine"),
    ({"drop_n": 1, "method": "greedy"}, "expected one of one-shot"),
    ({"kv_bytes": 1, "target": "mlp"}, "only attn and block free cache"),
    ({"kv_bytes": 1, "target": "joint"}, "only attn and block free cache"),
    ({"drop_n": 1, "method": "consecutive"}, "runs are of blocks"),
    ({"drop_n": 1, "method": "consecutive", "target": "block", "metric": "magnitude"}, "runs are of blocks"),
    ({"drop_n": 1, "method": "last", "target": "joint"}, "say attn, mlp or block"),
    ({"drop_n": 1, "method": "iterative", "metric": "random"}, "use one-shot"),
    ({"speedup": 1.2, "method": "iterative"}, "one-shot scores"),
    ({"drop_n": 1, "batch": 0}, "batch"),
    ({"speedup": 0.9}, "speedup"),
]


@pytest.mark.parametrize(("said", "why"), CONTRADICTIONS, ids=str)
def test_contradictions_are_refused(said: dict[str, Any], why: str) -> None:
    with pytest.raises(UsageError, match=why):
        Selection(**said)


def test_scores_that_are_missing_are_named() -> None:
    with pytest.raises(UsageError, match="needs scores"):
        choose(None, drop_n=1)
    with pytest.raises(UsageError, match="no perplexity of attentions"):
        choose(SOME, drop_n=1, metric="perplexity")
    with pytest.raises(UsageError, match="of 5 layers; the model has 6"):
        choose(scores([0.1] * 5, [0.1] * 5), drop_n=1)
    with pytest.raises(UsageError, match="no cosine of attention 2"):
        choose(scores([0.3, 0.2, None, 0.1, 0.3, 0.4], [0.1] * L), drop_n=1)
    with pytest.raises(UsageError, match="--runs 2"):
        choose(SOME, drop_n=2, method="consecutive", target="block")


# what is there


def test_what_is_gone_or_has_no_residual_is_no_candidate() -> None:
    spec = model_of(
        [
            (ATTENTION, PLAIN_MLP, False),
            (None, PLAIN_MLP, False),
            (ATTENTIONS["no residual"], PLAIN_MLP, False),
            (ATTENTION, None, False),
            (None, None, False),
        ]
    )
    found = scores([0.9, None, None, 0.8, None], [0.1, 0.2, 0.3, None, None], [0.9, 0.2, None, 0.8, None])
    assert choose(found, spec, drop_n=2) == ((0, 3), ())
    assert choose(found, spec, target="block", drop_n=2) == ((1, 3), (1, 3))
    assert choose(found, spec, target="block", drop_n=3) == ((0, 1, 3), (0, 1, 3))
    with pytest.raises(UsageError, match="2 of target attn can be dropped"):
        choose(found, spec, drop_n=3)
    assert choose(None, spec, method="last", drop_n=1) == ((3,), ())


# runs of blocks


def runs(values: Sequence[float | None], length: int, metric: str = "cosine") -> Scores:
    return scores([0.0] * L, [0.0] * L, runs={metric: {length: tuple(values)}})


@pytest.mark.parametrize("metric", ["cosine", "angular"])
def test_the_nearest_run_is_dropped(metric: str) -> None:
    found = runs([0.5, 0.4, 0.2, 0.3, 0.6], 2, metric)
    said = {"method": "consecutive", "target": "block", "metric": metric}
    assert choose(found, drop_n=2, **said) == ((2, 3), (2, 3))
    assert choose(runs([0.5, 0.2, 0.2, 0.2], 3, metric), drop_ratio=0.5, **said) == ((1, 2, 3), (1, 2, 3))


def test_runs_that_cannot_be_dropped_are_passed_over() -> None:
    said: dict[str, Any] = {"method": "consecutive", "target": "block", "drop_n": 2}
    assert choose(runs([0.5, None, None, 0.7, 0.6], 2), **said) == ((0, 1), (0, 1))
    with pytest.raises(UsageError, match="no run of 2 layers"):
        choose(runs([None] * 5, 2), **said)


# cache


@pytest.mark.parametrize(("batch", "context", "itemsize"), [(1, 1, 2), (8, 200, 2), (3, 100, 4)])
def test_as_many_attentions_go_as_the_cache_asks_for(batch: int, context: int, itemsize: int) -> None:
    one = KV_VALUES * itemsize * batch * context
    how = {"batch": batch, "context": context, "itemsize": itemsize}
    for kept in range(L):
        plan = select(SPEC, SOME, Selection(kv_bytes=kept * one, **how))
        assert len(plan.attention) == L - kept
        assert f"batch {batch}" in plan.origin
        # a byte less takes one more
        if kept:
            assert len(select(SPEC, SOME, Selection(kv_bytes=kept * one - 1, **how)).attention) == L - kept + 1
    with pytest.raises(UsageError, match="as it is"):
        select(SPEC, SOME, Selection(kv_bytes=L * one, **how))


def test_a_cache_that_cannot_shrink_so_far_is_refused() -> None:
    spec = model_of([(ATTENTIONS["no residual"], PLAIN_MLP, False), (ATTENTION, PLAIN_MLP, False)])
    with pytest.raises(UsageError, match=f"the least is {KV_VALUES * 2 * 100}"):
        select(spec, scores([None, 0.1], [0.1, 0.1]), Selection(kv_bytes=0, context=100))


def test_a_context_beyond_the_model_is_refused() -> None:
    with pytest.raises(UsageError, match="256; before a new token the model holds at most 255"):
        select(SPEC, SOME, Selection(kv_bytes=0, context=256))


# step by step


@pytest.mark.parametrize("target", ["attn", "mlp", "block", "joint"])
@pytest.mark.parametrize("metric", ["cosine", "magnitude", "perplexity"])
def test_iterative_choices_are_one_shot_choices_in_a_row(target: str, metric: str) -> None:
    model = random_model(SPEC, seed=3)
    draw = random.Random(0)
    text = Calibration(sequences=tuple(tuple(draw.randrange(37) for _ in range(12)) for _ in range(2)))
    options = ScoreOptions(target="reference", metrics=(metric,))
    expected, told = DropPlan(), []
    for _ in range(3):
        left = drop(model, expected)
        one = select(left.spec, score(left, text, options), Selection(target=target, metric=metric, drop_n=1))
        expected = expected | one
    selection = Selection(target=target, metric=metric, method="iterative", drop_n=3)
    found = select_iteratively(model, text, selection, options, on_pick=told.append)
    assert (found.attention, found.mlp) == (expected.attention, expected.mlp)
    assert [str(pick) for pick in told] == found.origin.rpartition(": ")[2].split(", ")


def test_iterative_choices_stop_at_the_cache() -> None:
    model = random_model(SPEC)
    text = Calibration(sequences=((1, 2, 3, 4, 5),))
    selection = Selection(method="iterative", kv_bytes=2 * KV_VALUES * 2 * 100, context=100)
    found = select_iteratively(model, text, selection, ScoreOptions(target="reference"))
    assert len(found.attention) == 4
    assert len(drop_sublayers(SPEC, found).attentions()) == 2


def test_plans_say_where_they_are_from() -> None:
    found = scores([0.3, 0.1, 0.5, 0.2, 0.6, 0.4], [1.0] * L, text="calib.txt", text_sha256="ab12" * 16, num_tokens=99)
    origin = select(SPEC, found, Selection(drop_n=2)).origin
    assert origin == "one-shot attn by cosine, drop_n 2, 99 tokens of calib.txt (sha256 ab12ab12ab12)"
    assert select(SPEC, None, Selection(metric="random", drop_n=2, seed=5)).origin.endswith("seed 5, drop_n 2")
