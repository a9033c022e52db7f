"""ModelSpec and its parts: what they refuse, and that JSON carries them there and back."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyruntime.errors import UsageError
from pyruntime.spec import (
    MLP,
    Embedding,
    Head,
    Layer,
    Linear,
    ModelSpec,
    Norm,
    Replacement,
    Rope,
    RopeKind,
    spec_from_json,
    spec_to_json,
    weight_shapes,
)
from tests.spec.makers import (
    INF,
    NAN,
    Make,
    attention,
    deep_model,
    layer,
    linear,
    llama3,
    longrope,
    mlp,
    model,
    norm,
    refused,
    rope,
    wide_attention,
    yarn,
)
from tests.spec.random_specs import specs

INTEGERS: dict[str, tuple[Make, int, int]] = {
    "linear in_features": (lambda n: linear(n, 1), 1, 2**20),
    "linear out_features": (lambda n: linear(1, n), 1, 2**20),
    "norm size": (norm, 1, 2**20),
    "rope dim": (lambda n: rope(dim=n), 2, 1024),
    "rope original_max_position": (lambda n: llama3(original_max_position=n), 1, 2**24),
    "attention window": (lambda n: attention(window=n), 1, 2**24),
    "attention num_heads": (lambda n: wide_attention(heads=n), 1, 4096),
    "attention head_dim": (lambda n: wide_attention(head_dim=n), 1, 1024),
    "layer index": (lambda n: Layer(index=n, attention=None, mlp=None), 0, 1023),
    "embedding vocab_size": (lambda n: Embedding(vocab_size=n, size=8), 1, 2**20),
    "embedding size": (lambda n: Embedding(vocab_size=8, size=n), 1, 2**20),
    "max_position": (lambda n: model(max_position=n), 1, 2**24),
}
# name -> how to make it, and the largest value; all must be above zero
REALS: dict[str, tuple[Make, float]] = {
    "norm eps": (lambda x: norm(eps=x), 1.0),
    "rope theta": (lambda x: rope(theta=x), 1e12),
    "rope factor": (lambda x: rope(factor=x), 1e6),
    "rope high_freq_factor": (lambda x: llama3(high_freq_factor=x, low_freq_factor=1e-9), 1e6),
    "rope beta_fast": (lambda x: yarn(beta_fast=x), 1e6),
    "rope beta_slow": (lambda x: yarn(beta_slow=x), 1e6),
    "rope attention_factor": (lambda x: yarn(attention_factor=x), 1e6),
    "rope divisor": (lambda x: longrope(divisors=(1.0, x)), 1e6),
    "attention scale": (lambda x: attention(scale=x), 1e6),
    "attention softcap": (lambda x: attention(softcap=x), 1e6),
    "embedding scale": (lambda x: Embedding(vocab_size=8, size=8, scale=x), 1e6),
    "head softcap": (lambda x: Head(linear=linear(), tied=False, softcap=x), 1e6),
}
BOOLS: dict[str, Make] = {
    "linear bias": lambda x: linear(bias=x),
    "norm weight": lambda x: norm(weight=x),
    "norm bias": lambda x: norm(bias=x),
    "rope truncate": lambda x: rope(truncate=x),
    "attention residual": lambda x: attention(residual=x),
    "mlp residual": lambda x: mlp(residual=x),
    "replacement residual": lambda x: Replacement(linear=linear(), residual=x),
    "layer parallel": lambda x: layer(parallel=x),
    "head tied": lambda x: Head(linear=linear(), tied=x),
}


@pytest.mark.parametrize("name", INTEGERS)
def test_integers_are_bounded_on_both_sides(name: str) -> None:
    make, low, high = INTEGERS[name]
    make(low)
    make(high)
    for value in (low - 1, high + 1, -high, 10**400):
        assert name in refused(lambda value=value: make(value))


@pytest.mark.parametrize("name", INTEGERS)
@pytest.mark.parametrize("value", [True, False, 4.0, "4", [4], NAN])
def test_what_is_no_integer_is_no_size(name: str, value: Any) -> None:
    assert name in refused(lambda: INTEGERS[name][0](value))


# at theta 1 nothing turns; a factor near zero would leave the range of floats
LOWEST = {"rope theta": 1.0, "rope factor": 1e-3}


@pytest.mark.parametrize("name", REALS)
def test_reals_are_finite_positive_and_bounded(name: str) -> None:
    make, high = REALS[name]
    low = LOWEST.get(name, 0.0)
    make(high)
    make(low + 1e-8)
    for value in (low, 0.0, 0, -1.0, high * 1.000001, NAN, INF, -INF, 10**400):
        assert name in refused(lambda value=value: make(value))


@pytest.mark.parametrize("name", REALS)
@pytest.mark.parametrize("value", [True, "0.5", [0.5]])
def test_what_is_no_number_is_no_real(name: str, value: Any) -> None:
    assert name in refused(lambda: REALS[name][0](value))


@pytest.mark.parametrize("name", BOOLS)
@pytest.mark.parametrize("value", [0, 1, None, "true", 1.0])
def test_only_a_bool_is_a_bool(name: str, value: Any) -> None:
    assert name in refused(lambda: BOOLS[name](value))


@pytest.mark.parametrize("value", [True, 1.5, "1", 0, -1])
def test_key_heads_are_counted_in_integers(value: Any) -> None:
    assert "num_kv_heads" in refused(lambda: wide_attention(heads=4, kv_heads=value))


def test_layers_are_bounded_on_both_sides() -> None:
    assert len(deep_model(1024).layers) == 1024
    assert "number of layers is 1025" in refused(lambda: model(layers=(*deep_model(1024).layers, layer())))
    assert "number of layers is 0" in refused(lambda: model(layers=()))


# what is wrong, and words that the message must hold: the values that disagree
WIDTHS: dict[str, tuple[Callable[[], Any], tuple[str, ...]]] = {
    "heads no multiple": (lambda: wide_attention(heads=4, kv_heads=3), ("4", "3")),
    "more key heads than heads": (lambda: wide_attention(heads=1, kv_heads=2), ("num_kv_heads", "2")),
    "q": (lambda: attention(q=linear(8, 9)), ("q", "9", "8")),
    "k": (lambda: attention(k=linear(8, 8)), ("k", "8", "4")),
    "v": (lambda: attention(v=linear(8, 5)), ("v", "5", "4")),
    "k reads": (lambda: attention(k=linear(7, 4)), ("k", "7", "8")),
    "o reads": (lambda: attention(o=linear(4, 8)), ("o", "4", "8")),
    "k merged away although it narrows": (lambda: attention(k=None), ("k", "8", "4")),
    "all merged away although k narrows": (lambda: attention(q=None, k=None, v=None), ("k", "8", "4")),
    "q_norm": (lambda: attention(q_norm=norm(5)), ("q_norm", "5", "4")),
    "k_norm as wide as the queries": (lambda: attention(k_norm=norm(8)), ("k_norm", "8", "4")),
    "attention sub norm": (lambda: attention(sub=norm(7)), ("sub", "7", "8")),
    "rope wider than the head": (lambda: attention(rope=rope(dim=6)), ("6", "4")),
    "rope of odd width": (lambda: rope(dim=3), ("3", "even")),
    "llama3 without context": (lambda: llama3(original_max_position=None), ("llama3", "original_max_position")),
    "yarn without beta": (lambda: yarn(beta_slow=None), ("yarn", "beta_slow")),
    "dynamic without context": (lambda: rope(RopeKind.DYNAMIC), ("dynamic", "original_max_position")),
    "llama3 factors swapped": (lambda: llama3(low_freq_factor=4.0, high_freq_factor=1.0), ("4.0", "1.0")),
    "llama3 factors equal": (lambda: llama3(low_freq_factor=4.0, high_freq_factor=4.0), ("4.0",)),
    "gate": (lambda: mlp(gate=linear(8, 15)), ("gate", "15", "16")),
    "gate reads": (lambda: mlp(gate=linear(7, 16)), ("gate", "7", "8")),
    "down reads": (lambda: mlp(down=linear(15, 8)), ("down", "15", "16")),
    "mlp sub norm": (lambda: mlp(sub=norm(15)), ("sub", "15", "16")),
    "pre norm": (lambda: layer(mlp=mlp(pre=norm(7))), ("mlp", "pre", "8")),
    "post norm": (lambda: layer(attention=attention(post=norm(7))), ("attention", "post", "8")),
    "replacement norm": (lambda: layer(mlp=Replacement(linear=linear(), pre=norm(7))), ("mlp", "pre", "8")),
    "residual of another width": (lambda: layer(mlp=mlp(down=linear(16, 9))), ("9", "8")),
    "parallel without residual": (lambda: layer(parallel=True, mlp=mlp(residual=False)), ("parallel", "residual")),
    "layers out of order": (lambda: model(layers=(layer(1),)), ("layer 1", "place 0")),
    "layer twice": (lambda: model(layers=(layer(0), layer(0))), ("layer 0", "place 1")),
    "stream": (lambda: model(embedding=Embedding(vocab_size=10, size=7)), ("layer 0 attention", "8", "7")),
    "stream behind a narrowing": (
        lambda: model(layers=(layer(mlp=mlp(down=linear(16, 9), residual=False)), layer(1))),
        ("layer 1 attention", "8", "9"),
    ),
    "final norm": (lambda: model(final_norm=norm(7)), ("final norm", "8")),
    "head reads": (lambda: model(head=Head(linear=linear(9, 10), tied=False)), ("head", "9", "8")),
    "head gives": (lambda: model(head=Head(linear=linear(8, 11), tied=False)), ("11", "10")),
    "tied head on another width": (
        lambda: model(
            layers=(layer(mlp=mlp(down=linear(16, 9), residual=False)),),
            final_norm=None,
            head=Head(linear=linear(9, 10), tied=True),
        ),
        ("tied",),
    ),
}


@pytest.mark.parametrize("name", WIDTHS)
def test_widths_that_disagree_are_refused(name: str) -> None:
    make, words = WIDTHS[name]
    message = refused(make)
    assert all(word in message for word in words), message


def test_a_sublayer_without_residual_may_change_the_width() -> None:
    wide = layer(mlp=mlp(down=linear(16, 12), residual=False))
    changed = model(layers=(wide,), final_norm=norm(12), head=Head(linear=linear(12, 10), tied=False))
    assert weight_shapes(changed)["head.weight"] == (10, 12)


def test_a_specification_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        model().max_position = 1  # type: ignore[misc]


def through_json(spec: ModelSpec) -> ModelSpec:
    return spec_from_json(json.loads(json.dumps(spec_to_json(spec), allow_nan=False)))


@settings(max_examples=150, deadline=None)
@given(specs())
def test_json_gives_back_an_equal_specification(spec: ModelSpec) -> None:
    found = through_json(spec)
    assert found == spec
    assert weight_shapes(found) == weight_shapes(spec)
    assert found.attentions() == spec.attentions()


def test_json_tells_every_field_apart() -> None:
    """A decoder that loses a field would give back an equal specification for two that differ."""
    first = model(layers=(layer(attention=attention(rope=yarn(), softcap=2.0, window=3)),))
    changed = attention(rope=yarn(), softcap=2.5, window=3)
    second = replace(first, layers=(layer(attention=changed),))
    assert spec_to_json(first) != spec_to_json(second)
    assert through_json(second).layers[0].attention == changed


def places(data: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of all values below `data`."""
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from places(value, (*path, key))


def container(data: Any, path: tuple[Any, ...]) -> Any:
    for key in path[:-1]:
        data = data[key]
    return data


def full_json() -> dict[str, Any]:
    """A specification with an object at every place where one may stand."""
    rich = attention(rope=yarn(), q_norm=norm(4), k_norm=norm(4), pre=norm(), sub=norm(), post=norm())
    layers = (
        layer(attention=rich, mlp=mlp(pre=norm(), sub=norm(16), post=norm())),
        layer(1, attention=Replacement(linear=linear(), pre=norm()), mlp=None),
    )
    return spec_to_json(model(layers=layers))


OBJECTS = [(), *(path for path in places(full_json()) if isinstance(container(full_json(), path)[path[-1]], dict))]
OPTIONAL = set(
    "scale rope window softcap q_norm k_norm pre sub post residual weight bias parallel factor original_max_position "
    "low_freq_factor high_freq_factor beta_fast beta_slow attention_factor truncate divisors v_norm columns rest table "
    "cached shaped alibi shortcut triangular positions".split()
)


@pytest.mark.parametrize("path", OBJECTS, ids=str)
@pytest.mark.parametrize("extra", ["colour", "kind_of_sublayer"])
def test_unknown_fields_are_refused(path: tuple[Any, ...], extra: str) -> None:
    data = full_json()
    target = container(data, (*path, extra))
    target[extra] = "red"
    assert extra in refused(lambda: spec_from_json(data))


@pytest.mark.parametrize("path", [path for path in places(full_json()) if isinstance(path[-1], str)], ids=str)
def test_missing_fields_are_refused_where_there_is_no_default(path: tuple[Any, ...]) -> None:
    data = full_json()
    del container(data, path)[path[-1]]
    needed = path[-1] not in OPTIONAL or (path[-1] == "scale" and "attention" in path)
    yarn_needs = {"original_max_position", "beta_fast", "beta_slow", "attention_factor"}
    if needed or ("rope" in path and path[-1] in yarn_needs):
        assert path[-1] in refused(lambda: spec_from_json(data))
    else:
        spec_from_json(data)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(["mlp", "rms", 8]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(list(places(full_json()))), json_values)
def test_any_edit_of_the_json_is_read_or_refused(path: tuple[Any, ...], value: Any) -> None:
    data = copy.deepcopy(full_json())
    container(data, path)[path[-1]] = value
    try:
        spec = spec_from_json(data)
    except UsageError:
        refused(lambda: spec_from_json(data))
    else:
        assert through_json(spec) == spec


@pytest.mark.parametrize("data", [None, [], 3, "model", {}])
def test_what_is_no_specification_is_refused(data: Any) -> None:
    refused(lambda: spec_from_json(data))


def test_kinds_are_members_of_their_enum_and_nothing_else() -> None:
    norm = {"size": 4, "eps": 1e-5}
    for make in (
        lambda: Norm(kind="banana", **norm),  # type: ignore[arg-type]
        lambda: Rope(kind="su", dim=4, theta=10.0),  # type: ignore[arg-type]
        lambda: MLP(
            gate=None,
            up=Linear(in_features=4, out_features=8),
            down=Linear(in_features=8, out_features=4),
            activation="sine",  # type: ignore[arg-type]
        ),
    ):
        with pytest.raises(UsageError, match="expected one of"):
            make()


@pytest.mark.parametrize("changes", [{"theta": 1.0}, {"theta": 1e-300}, {"factor": 1e-300}])
def test_ropes_that_cannot_turn_are_refused(changes: dict[str, float]) -> None:
    with pytest.raises(UsageError, match="rope"):
        Rope(**{"kind": RopeKind.LINEAR, "dim": 4, "theta": 10.0, "factor": 2.0, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("divisors", [None, (), (1.0,), (1.0, 2.0, 3.0), [1.0, 2.0], 2.0, "12"], ids=repr)
def test_longrope_has_a_divisor_for_each_pair(divisors: Any) -> None:
    assert "divisors" in refused(lambda: longrope(divisors=divisors))
