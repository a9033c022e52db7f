"""What rewrites and mixtures leave in a specification: column maps, triangles, tables, slim caches, experts."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from pyruntime.spec import Cached, Embedding, Head, Linear, spec_from_json, spec_to_json, weight_shapes
from tests.spec.makers import attention, layer, linear, mlp, model, moe, norm, packed, refused

MIXTURE = moe()
# what is wrong, and words that the message must hold
WRONG: dict[str, tuple[Callable[[], Any], tuple[str, ...]]] = {
    "triangular and not square": (lambda: Linear(in_features=8, out_features=9, triangular=True), ("9x8", "square")),
    "a triangular head that is tied": (
        lambda: Head(linear=Linear(in_features=8, out_features=8, triangular=True), tied=True),
        ("tied", "triangular"),
    ),
    "columns beside q": (lambda: packed(q=linear()), ("q", "columns")),
    "columns without rest": (lambda: packed(rest=None), ("columns", "rest")),
    "rest without columns": (lambda: packed(columns=None), ("columns", "rest")),
    "too few columns": (lambda: packed(columns=tuple(range(15))), ("columns", "16")),
    "a column twice": (lambda: packed(columns=(1, *range(1, 16))), ("columns", "1")),
    "a table beside k": (lambda: attention(q=None, v=None, table=True), ("k", "table")),
    "a table behind a norm": (lambda: attention(q=None, k=None, v=None, table=True, pre=norm()), ("table", "input")),
    "cached keys without v": (lambda: attention(cached=Cached.KEYS, v=None), ("keys", "v")),
    "v of cached keys reads the input": (lambda: attention(cached=Cached.KEYS), ("v", "8", "4")),
    "columns with a slim cache": (lambda: packed(cached=Cached.INPUTS), ("inputs", "q, k and v")),
    "v_norm": (lambda: attention(v_norm=norm(5)), ("v_norm", "5", "4")),
    "a shortcut without residual": (lambda: layer(mlp=mlp(shortcut=linear(), residual=False)), ("shortcut",)),
    "a shortcut of another width": (lambda: layer(mlp=mlp(shortcut=linear(8, 9))), ("shortcut", "9x8", "8x8")),
    "a shortcut in parallel": (lambda: layer(parallel=True, mlp=mlp(shortcut=linear())), ("parallel", "shortcut")),
    "positions that end early": (
        lambda: model(embedding=Embedding(vocab_size=10, size=8, positions=15)),
        ("max_position", "16", "15"),
    ),
    "moe router": (lambda: moe(router=linear(8, 5)), ("router", "5x8", "4x8")),
    "moe down": (lambda: moe(down=linear(6, 7)), ("down", "7x6", "8x6")),
    "moe shared gate alone": (lambda: moe(shared_gate=linear(8, 1)), ("shared_gate",)),
    "moe shared width": (lambda: moe(shared=mlp(down=linear(16, 9))), ("shared", "9", "8")),
}
INTEGERS: dict[str, tuple[Callable[[Any], Any], int, int]] = {
    "embedding positions": (lambda n: Embedding(vocab_size=8, size=8, positions=n), 1, 2**24),
    "moe num_experts": (lambda n: moe(num_experts=n, top_k=1), 1, 4096),
    "moe top_k": (lambda n: replace(MIXTURE, top_k=n), 1, 4),
    "attention column": (lambda n: packed(columns=(n, *range(1, 16))), 0, 23),
}
BOOLS: dict[str, Callable[[Any], Any]] = {
    "linear triangular": lambda x: Linear(in_features=8, out_features=8, triangular=x),
    "attention table": lambda x: attention(table=x),
    "attention shaped": lambda x: attention(shaped=x),
    "attention alibi": lambda x: attention(alibi=x),
    "moe residual": lambda x: replace(MIXTURE, residual=x),
    "moe normalize": lambda x: replace(MIXTURE, normalize=x),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_contradicts_itself_is_refused(name: str) -> None:
    make, words = WRONG[name]
    message = refused(make)
    assert all(word in message for word in words), message


@pytest.mark.parametrize("name", INTEGERS)
def test_integers_are_bounded_on_both_sides(name: str) -> None:
    make, low, high = INTEGERS[name]
    if name != "moe num_experts":
        make(low)
        make(high)
    for value in (low - 1, high + 1, True, 4.0, "4", 10**400):
        assert name in refused(lambda value=value: make(value))


@pytest.mark.parametrize("name", BOOLS)
@pytest.mark.parametrize("value", [0, 1, None, "true"])
def test_only_a_bool_is_a_bool(name: str, value: Any) -> None:
    assert name in refused(lambda: BOOLS[name](value))


@pytest.mark.parametrize("count", [1, 4, 4096])
def test_experts_are_counted_by_the_router(count: int) -> None:
    assert moe(num_experts=count, top_k=1, router=linear(8, count)).num_experts == count


def test_neither_sublayer_of_a_parallel_layer_needs_a_residual() -> None:
    both = layer(parallel=True, attention=attention(residual=False), mlp=mlp(residual=False))
    assert model(layers=(both,)).layers[0].parallel


def test_a_narrow_slim_cache_counts_what_it_holds() -> None:
    assert attention().cached_size == 8
    assert attention(cached=Cached.KEYS, v=linear(4, 4)).cached_size == 4
    assert attention(cached=Cached.INPUTS).cached_size == 8


def test_weights_of_every_part_have_names_and_shapes() -> None:
    """Counted by hand from the docstrings: experts, shared MLP, gains, tables, packed triangles, positions."""
    first = attention(q=Linear(in_features=8, out_features=8, triangular=True), shaped=True, v_norm=norm(4))
    second = attention(q=None, k=None, v=None, table=True)
    mixture = moe(shared=mlp(), shared_gate=linear(8, 1), pre=norm())
    spec = model(
        layers=(
            layer(attention=first, mlp=mixture),
            layer(1, attention=packed(), mlp=None),
            layer(2, attention=second),
        ),
        embedding=Embedding(vocab_size=10, size=8, positions=16),
    )
    shapes = weight_shapes(spec)
    assert shapes["embedding.position.weight"] == (16, 8)
    assert shapes["layers.0.attention.q.weight"] == (36,)
    gains = ("softmax_gain", "identity_gain", "centre_gain")
    assert all(shapes[f"layers.0.attention.{name}"] == (2,) for name in gains)
    assert shapes["layers.0.attention.v_norm.weight"] == (4,)
    assert shapes["layers.0.mlp.router.weight"] == (4, 8)
    assert {shapes[f"layers.0.mlp.experts.{i}.down.weight"] for i in range(4)} == {(8, 6)}
    assert shapes["layers.0.mlp.shared.up.weight"] == (16, 8)
    assert shapes["layers.0.mlp.shared_gate.weight"] == (1, 8)
    assert shapes["layers.1.attention.rest.weight"] == (16, 8)
    assert shapes["layers.2.attention.table.weight"] == (10, 16)
    assert spec_from_json(json.loads(json.dumps(spec_to_json(spec)))) == spec
