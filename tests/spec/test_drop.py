"""DropPlan: one canonical form, union, JSON; and what it does to a specification."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyruntime.errors import UsageError
from pyruntime.spec import DropPlan, ModelSpec, drop_sublayers, weight_shapes
from tests.spec.random_specs import specs

indices = st.lists(st.integers(0, 40), max_size=8)
plans = st.builds(DropPlan, indices.map(tuple), indices.map(tuple), st.sampled_from(["", "by hand", "by score"]))


@given(indices, indices)
@settings(max_examples=100, deadline=None)
def test_a_plan_is_sorted_and_unique(attention: list[int], mlp: list[int]) -> None:
    plan = DropPlan(tuple(attention), tuple(mlp))
    assert plan.attention == tuple(sorted(set(attention)))
    assert plan.mlp == tuple(sorted(set(mlp)))
    assert plan == DropPlan(tuple(attention[::-1]) * 2, tuple(mlp[::-1]))
    assert bool(plan) == bool(attention or mlp)


@given(plans, plans)
@settings(max_examples=100, deadline=None)
def test_union_drops_what_either_drops(first: DropPlan, second: DropPlan) -> None:
    union = first | second
    assert set(union.attention) == {*first.attention, *second.attention}
    assert set(union.mlp) == {*first.mlp, *second.mlp}
    assert all(plan.origin in union.origin for plan in (first, second))
    assert first | first == first


@given(plans)
@settings(max_examples=100, deadline=None)
def test_json_gives_back_an_equal_plan(plan: DropPlan) -> None:
    assert DropPlan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


def test_json_uses_the_names_of_llm_drop() -> None:
    data = DropPlan(attention=(5, 2), mlp=(7,)).to_json()
    assert (data["drop_attn_list"], data["drop_mlp_list"]) == ([2, 5], [7])


@pytest.mark.parametrize("index", [True, False, -1, 1.0, "1", None, [1]])
@pytest.mark.parametrize("kind", ["attention", "mlp"])
def test_what_is_no_layer_index_is_refused(kind: str, index: Any) -> None:
    with pytest.raises(UsageError, match=kind) as caught:
        DropPlan(**{kind: (0, index)})
    assert caught.value.code == "DROP"


@pytest.mark.parametrize("origin", ["two\nlines", "\x1b[2J", 3, None])
def test_an_origin_that_would_garble_a_report_is_refused(origin: Any) -> None:
    with pytest.raises(UsageError, match="origin") as caught:
        DropPlan((1,), (), origin)
    assert caught.value.code == "DROP"


BAD: dict[str, Any] = {
    "a list": [1, 2],
    "nothing": None,
    "another format": {"format": "other"},
    "no format": {"format": ...},
    "version 2": {"version": 2},
    "version true": {"version": True},
    "version 1.0": {"version": 1.0},
    "no version": {"version": ...},
    "unknown key": {"drop_block_list": [1]},
    "null list": {"drop_mlp_list": None},
    "text for a list": {"drop_attn_list": "12"},
    "object for a list": {"drop_attn_list": {"1": 2}},
    "bools": {"drop_attn_list": [True, False]},
    "negative": {"drop_mlp_list": [-1]},
    "float": {"drop_mlp_list": [1.0]},
    "origin of lines": {"origin": "a\nb"},
    "origin a number": {"origin": 3},
}


@pytest.mark.parametrize("case", BAD)
def test_json_that_is_no_plan_is_refused(case: str) -> None:
    change = BAD[case]
    data = change
    if isinstance(change, dict):
        whole = {**DropPlan((1,), (2,)).to_json(), **change}
        data = {key: value for key, value in whole.items() if value is not ...}
    with pytest.raises(UsageError) as caught:
        DropPlan.from_json(data)
    assert caught.value.code == "DROP_PLAN"


@given(specs(skipless=False), plans)
@settings(max_examples=150, deadline=None)
def test_dropping_removes_the_named_sublayers_and_nothing_else(spec: ModelSpec, plan: DropPlan) -> None:
    inside = DropPlan(
        tuple(i % len(spec.layers) for i in plan.attention), tuple(i % len(spec.layers) for i in plan.mlp)
    )
    dropped = drop_sublayers(spec, inside)
    for before, after in zip(spec.layers, dropped.layers, strict=True):
        assert after.attention == (None if before.index in inside.attention else before.attention)
        assert after.mlp == (None if before.index in inside.mlp else before.mlp)
        assert after.parallel == before.parallel
    assert replace(dropped, layers=spec.layers) == spec
    assert drop_sublayers(dropped, inside) == dropped
    gone = weight_shapes(spec).keys() - weight_shapes(dropped).keys()
    starts = [f"layers.{i}.attention." for i in inside.attention] + [f"layers.{i}.mlp." for i in inside.mlp]
    assert gone == {name for name in weight_shapes(spec) if name.startswith(tuple(starts))}


@given(specs(), st.data())
@settings(max_examples=150, deadline=None)
def test_a_sublayer_is_refused_exactly_when_it_has_no_plain_residual(spec: ModelSpec, data: st.DataObject) -> None:
    layer = data.draw(st.sampled_from(spec.layers))
    kind = data.draw(st.sampled_from(["attention", "mlp"]))
    sublayer = getattr(layer, kind)
    plan = DropPlan(**{kind: (layer.index,)})
    if sublayer is None or (sublayer.residual and sublayer.shortcut is None):
        assert getattr(drop_sublayers(spec, plan).layers[layer.index], kind) is None
    else:
        with pytest.raises(UsageError, match=f"layer {layer.index} {kind} has .*; keep it") as caught:
            drop_sublayers(spec, plan)
        assert caught.value.code == "DROP"


@given(specs(skipless=False), st.sampled_from(["attention", "mlp"]), st.integers(0, 10**9))
@settings(max_examples=50, deadline=None)
def test_a_layer_that_does_not_exist_is_refused(spec: ModelSpec, kind: str, beyond: int) -> None:
    count = len(spec.layers)
    drop_sublayers(spec, DropPlan(**{kind: (count - 1,)}))
    with pytest.raises(UsageError, match=f"{kind} {count + beyond} does not exist") as caught:
        drop_sublayers(spec, DropPlan(**{kind: (count + beyond,)}))
    assert caught.value.code == "DROP"
