"""Any model at all, through every rewrite in turn: what cannot be rewritten is left, and no logit changes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyruntime.checkpoint import Model
from pyruntime.passes.fold import (
    centre_layer_norms,
    drop_zero_sublayers,
    fold_biases,
    fold_mlp_prefix,
    fold_norms,
    slim,
    tabulate_first_layer,
)
from pyruntime.spec import Attention, Cached, Layer, ModelSpec, Rope, RopeKind, weight_shapes
from tests.passes import folds
from tests.spec.random_specs import specs
from tests.specs import random_model

NUM_TOKENS = 6
Pass = Callable[[Model], Model]
PASSES: dict[str, Pass] = {
    "norms": fold_norms,
    "centre": centre_layer_norms,
    "biases": fold_biases,
    "prefix": fold_mlp_prefix,
    "table": tabulate_first_layer,
    "zeros": drop_zero_sublayers,
    "inputs": lambda model: slim(model, Cached.INPUTS),
}


def _tame_rope(rope: Rope | None) -> Rope | None:
    # the oracle knows the plain one
    return None if rope is None else Rope(kind=RopeKind.DEFAULT, dim=rope.dim, theta=100.0)


def _tame_layer(layer: Layer) -> Layer:
    attention = layer.attention
    if not isinstance(attention, Attention):
        return layer
    softcap = None if attention.softcap is None else 3.0
    return replace(layer, attention=replace(attention, rope=_tame_rope(attention.rope), scale=0.5, softcap=softcap))


def tamed(spec: ModelSpec) -> ModelSpec:
    """The same parts with scores of moderate size: where softmax is a step, the last bit of a score decides."""
    head = replace(spec.head, softcap=None if spec.head.softcap is None else 30.0)
    layers = tuple(map(_tame_layer, spec.layers))
    positions = None if spec.embedding.positions is None else NUM_TOKENS
    embedding = replace(spec.embedding, scale=1.3, positions=positions)
    return replace(spec, layers=layers, head=head, embedding=embedding, max_position=NUM_TOKENS)


@settings(max_examples=120, deadline=None)
@given(spec=specs().map(tamed), order=st.permutations(sorted(PASSES)), seed=st.integers(0, 3))
def test_every_rewrite_of_any_model_is_exact(spec: ModelSpec, order: list[str], seed: int) -> None:
    model = random_model(spec, seed=seed)
    ids = [i * 7 % spec.vocab_size for i in range(NUM_TOKENS)]
    expected = folds.logits(model, ids)
    for name in order:
        model = PASSES[name](model)
        assert set(model.weights) == set(weight_shapes(model.spec))
        found = folds.logits(model, ids)
        # relu squares have no bound: the largest value is what a rounding is measured by
        assert abs(found - expected).max() <= 1e-10 * max(1.0, abs(expected).max()), name


@pytest.mark.parametrize("name", PASSES)
def test_a_second_time_changes_nothing(name: str) -> None:
    for spec in folds.MODELS.values():
        once = PASSES[name](random_model(spec))
        twice: Any = PASSES[name](once)
        assert twice.spec == once.spec
        report = twice.reports[-1]
        assert (report.num_weights, report.rewritten, report.removed) == (0, (), ())
