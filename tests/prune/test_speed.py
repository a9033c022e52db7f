"""Choices for a wanted speed: the time that is predicted, and how near the choice comes to what was asked for."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import replace
from typing import Any

import pytest

from pyruntime.bench import shape_spec, summary
from pyruntime.checkpoint import Model
from pyruntime.errors import UsageError
from pyruntime.graph import Cost, SequenceWork, build, cost_of, fuse
from pyruntime.prune import Machine, Scores, Selection, decode_cost, decode_seconds, select_for_speedup
from pyruntime.prune.identity import plan_of
from pyruntime.spec import DropPlan, ModelSpec, drop_sublayers
from tests.specs import ATTENTION, ATTENTIONS, EXPERTS, PLAIN_MLP, model_of

TINYLLAMA = shape_spec("tinyllama-1.1b")
SHORT = replace(TINYLLAMA, layers=TINYLLAMA.layers[:8])


def scores_of(spec: ModelSpec, seed: int = 0) -> Scores:
    """As trained models have them: deep sublayers matter less, attentions less than MLPs."""
    draw, count = random.Random(seed), len(spec.layers)
    attention = tuple(0.01 + 0.08 * (1 - i / count) + 0.01 * draw.random() for i in range(count))
    mlp = tuple(0.03 + 0.10 * (1 - i / count) + 0.02 * draw.random() for i in range(count))
    block = tuple(a + b for a, b in zip(attention, mlp, strict=True))
    values = {"cosine": {"attention": attention, "mlp": mlp, "block": block}}
    return Scores(model="", family="", num_layers=count, values=values)


def predicted(spec: ModelSpec, plan: DropPlan, how: Selection) -> float:
    sizes = (how.batch, how.context_of(spec), how.itemsize)
    return decode_seconds(spec, *sizes) / decode_seconds(drop_sublayers(spec, plan), *sizes)


def loss(plan: DropPlan, scores: Scores) -> float:
    kinds = scores.values["cosine"]
    return sum(kinds["attention"][i] or 0 for i in plan.attention) + sum(kinds["mlp"][i] or 0 for i in plan.mlp)


def linear_bytes(d: int, q: int, kv: int, f: int) -> tuple[int, int]:
    """Weights of an attention and of an MLP with their norms, written out."""
    return d + d * q + 2 * d * kv + q * d, d + 3 * d * f


def test_seconds_are_bytes_over_bandwidth() -> None:
    """TinyLlama: 22 layers of 2048, 4 KV heads of 64, MLPs of 5632, vocabulary 32000, bfloat16."""
    attention, mlp = linear_bytes(2048, 2048, 256, 5632)
    batch, context = 3, 100
    # the last attention's keys and queries are two nodes, and each reads its norm
    weights = 22 * (attention + mlp) + 2048 + 2048 + 32000 * 2048 + batch * 2048
    # each sequence's new token is written to the cache, and read with the others
    cache = 22 * 2 * 256 * batch * (1 + context + 1)
    found = decode_seconds(TINYLLAMA, batch, context, 2, Machine(read_bandwidth=1e9))
    assert found == pytest.approx(2 * (weights + cache) / 1e9, rel=1e-12)


def test_seconds_are_operations_where_they_take_longer() -> None:
    slow = Machine(read_bandwidth=1e30, multiply_rate=1e9)
    flops = 2 * (22 * (2048 * 2048 * 2 + 2 * 2048 * 256 + 3 * 2048 * 5632) + 2048 * 32000) + 22 * 4 * 2048 * 101
    assert decode_seconds(TINYLLAMA, 1, 100, 2, slow) == pytest.approx(flops / 1e9, rel=1e-12)


def test_a_constant_counts_each_node() -> None:
    spec = model_of([(ATTENTION, PLAIN_MLP, False)] * 2)
    plain, constant = (decode_seconds(spec, 1, 5, 2, Machine(1.0, math.inf, each)) for each in (0.0, 1000.0))
    # per layer qkv, attend, o and mlp; the last attention fills the cache and makes queries apart; embed, gather, head
    assert (constant - plain) / 1000 == pytest.approx(4 + 5 + 3)


@pytest.mark.parametrize("batch, context", [(1, 256), (64, 1024)])
@pytest.mark.parametrize("speedup", [1.02, 1.3, 2.0])
@pytest.mark.parametrize("target", ["attn", "mlp", "joint", "block"])
def test_the_wanted_speed_is_reached_and_not_far_exceeded(
    target: str, speedup: float, batch: int, context: int
) -> None:
    how = Selection(target=target, speedup=speedup, batch=batch, context=context)
    scores = scores_of(SHORT)
    try:
        plan = select_for_speedup(SHORT, scores, how)
    except UsageError:
        gone = tuple(range(8))
        everything = {"attn": (gone, ()), "mlp": ((), gone), "joint": (gone, gone), "block": (gone, gone)}
        assert predicted(SHORT, DropPlan(*everything[target]), how) < speedup
        return
    found = predicted(SHORT, plan, how)
    assert found >= speedup * (1 - 1e-9)
    # nothing that was dropped is superfluous
    for kind, gone in (("attention", plan.attention), ("mlp", plan.mlp)):
        for index in gone:
            less = plan_of("block" if target == "block" else kind, index)
            fewer = DropPlan(tuple(set(plan.attention) - set(less.attention)), tuple(set(plan.mlp) - set(less.mlp)))
            assert predicted(SHORT, fewer, how) < speedup
    assert f"predicted {found:.3f}" in plan.origin and f"context {context}" in plan.origin


@pytest.mark.parametrize("target", ["attn", "mlp", "joint", "block"])
def test_more_speed_is_never_less(target: str) -> None:
    wanted = [1.01 + 0.02 * i for i in range(9)]
    plans = [select_for_speedup(SHORT, scores_of(SHORT), Selection(target=target, speedup=each)) for each in wanted]
    found = [predicted(SHORT, plan, Selection(target=target, speedup=2)) for plan in plans]
    assert all(speed >= each * (1 - 1e-9) for speed, each in zip(found, wanted, strict=True))
    assert found == sorted(found)


def test_the_loss_is_near_the_least_that_any_choice_has() -> None:
    """Against every subset of eight sublayers."""
    spec = model_of([(ATTENTION, PLAIN_MLP, False)] * 4)
    how = Selection(target="joint", speedup=1.5, context=50)
    layers = [each for count in range(5) for each in itertools.combinations(range(4), count)]
    plans = [DropPlan(attention, mlp) for attention in layers for mlp in layers]
    fast = [plan for plan in plans if predicted(spec, plan, how) >= 1.5]
    assert len(plans) == 256 and 0 < len(fast) < 256
    for seed in range(5):
        scores = scores_of(spec, seed)
        found = loss(select_for_speedup(spec, scores, how), scores)
        assert found <= 1.25 * min(loss(plan, scores) for plan in fast)


@pytest.mark.parametrize("speedup", [1.05, 1.5, 2.0])
def test_what_helps_when_it_is_gone_is_dropped_before_anything_else(speedup: float) -> None:
    """Scores of both signs, as perplexities have them; against every subset of eight sublayers."""
    spec = model_of([(ATTENTION, PLAIN_MLP, False)] * 4)
    how = Selection(target="joint", speedup=speedup, context=50)
    layers = [each for count in range(5) for each in itertools.combinations(range(4), count)]
    plans = [DropPlan(attention, mlp) for attention in layers for mlp in layers]
    fast = [plan for plan in plans if predicted(spec, plan, how) >= speedup]
    for seed in range(8):
        draw = random.Random(seed)
        attention, mlp = ([draw.uniform(-0.1, 0.2) for _ in range(4)] for _ in range(2))
        values = {"cosine": {"attention": tuple(attention), "mlp": tuple(mlp)}}
        scores = Scores(model="", family="", num_layers=4, values=values)
        plan = select_for_speedup(spec, scores, how)
        assert predicted(spec, plan, how) >= speedup
        assert set(plan.attention) >= {i for i, value in enumerate(attention) if value <= 0}
        assert set(plan.mlp) >= {i for i, value in enumerate(mlp) if value <= 0}
        # the least loss drops these too, so that only the rest is a matter of choice
        gained = sum(value for value in attention + mlp if value <= 0)
        least = min(loss(each, scores) for each in fast)
        assert least - 1e-12 <= loss(plan, scores) <= gained + 1.25 * (least - gained) + 1e-12


@pytest.mark.parametrize("speedup", [1.01, 1.2, 1.6])
def test_of_equal_savings_the_least_loss_is_found_whatever_the_signs(speedup: float) -> None:
    spec = model_of([(None, PLAIN_MLP, False)] * 8)
    how = Selection(target="mlp", speedup=speedup, context=50)
    plans = [DropPlan((), gone) for count in range(9) for gone in itertools.combinations(range(8), count)]
    fast = [plan for plan in plans if predicted(spec, plan, how) >= speedup]
    for seed in range(8):
        draw = random.Random(seed)
        values = {"cosine": {"attention": (None,) * 8, "mlp": tuple(draw.uniform(-0.1, 0.1) for _ in range(8))}}
        scores = Scores(model="", family="", num_layers=8, values=values)
        found = loss(select_for_speedup(spec, scores, how), scores)
        assert found == pytest.approx(min(loss(plan, scores) for plan in fast), abs=1e-12)


@pytest.mark.parametrize("moe", [False, True], ids=["dense", "experts"])
def test_the_cost_of_a_batch_is_that_of_its_sequences_together(moe: bool) -> None:
    spec = model_of([(ATTENTION, EXPERTS if moe else PLAIN_MLP, False)] * 2)
    nodes = fuse(build(spec)).nodes
    for batch in (1, 3, 8):
        expected = cost_of(nodes, [SequenceWork(20, 1)] * batch, 2)
        assert cost_of(nodes, [SequenceWork(20, 1)], 2, copies=batch) == expected
        assert decode_cost(spec, batch, 20, 2) == sum(expected.values(), Cost())


def test_a_huge_batch_is_counted_not_listed() -> None:
    """A list of so many sequences would not fit the memory."""
    huge, one = (decode_cost(SHORT, batch, 100, 2) for batch in (10**12, 1))
    assert huge.kv_bytes == 10**12 * one.kv_bytes and huge.flops == 10**12 * one.flops
    assert (
        summary(Model(spec=SHORT, dense_spec=SHORT, weights={}, dtype="bfloat16"), 2, 10**12, 100)["batch_size"]
        == 10**12
    )


def test_at_long_contexts_attentions_pay_and_at_short_ones_mlps() -> None:
    equal = (0.1,) * 22
    values = {"cosine": {"attention": equal, "mlp": equal, "block": equal}}
    scores = Scores(model="", family="", num_layers=22, values=values)
    short = select_for_speedup(TINYLLAMA, scores, Selection(target="joint", speedup=1.1, context=16))
    long = select_for_speedup(TINYLLAMA, scores, Selection(target="joint", speedup=1.1, batch=64, context=2047))
    assert (short.attention, long.mlp) == ((), ())
    assert short.mlp and long.attention


def test_what_cannot_be_reached_names_the_best() -> None:
    how = Selection(target="attn", speedup=3.0)
    best = predicted(TINYLLAMA, DropPlan(tuple(range(22))), how)
    with pytest.raises(UsageError, match=rf"batch 1, context 256 is out of reach.*{best:.3f} without all") as caught:
        select_for_speedup(TINYLLAMA, scores_of(TINYLLAMA), how)
    assert caught.value.code == "SELECT"


def test_a_speed_of_one_is_refused() -> None:
    with pytest.raises(UsageError, match="more than 1"):
        select_for_speedup(TINYLLAMA, scores_of(TINYLLAMA), Selection(target="attn", speedup=1.0))


def test_sublayers_without_residual_stay() -> None:
    spec = model_of([(ATTENTIONS["no residual"], PLAIN_MLP, False), (ATTENTION, PLAIN_MLP, False)])
    values = {"cosine": {"attention": (None, 0.5), "mlp": (0.1, 0.1), "block": (None, 0.6)}}
    scores = Scores(model="", family="", num_layers=2, values=values)
    plan = select_for_speedup(spec, scores, Selection(target="joint", speedup=1.8, context=10))
    assert plan.attention in ((), (1,))


@pytest.mark.parametrize(
    "said", [{"read_bandwidth": 0.0}, {"multiply_rate": -1.0}, {"node_seconds": -1e-9}, {"read_bandwidth": math.nan}]
)
def test_machines_that_cannot_be_are_refused(said: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="cannot be"):
        Machine(**said)
