"""Random models of everything that a specification can say, run by both targets as the naive transformer says."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings

from pyruntime.graph import build, fuse
from pyruntime.plan import lower
from pyruntime.spec import Attention, Layer, ModelSpec, RopeKind
from tests import naive
from tests.helpers import TARGETS, all_logits
from tests.spec.random_specs import specs
from tests.specs import as_arrays, random_model, random_weights

MAX_POSITION = 32


def tamed(spec: ModelSpec) -> ModelSpec:
    """The same with numbers under which rounding stays small, and with ropes that the naive transformer knows."""
    layers = tuple(replace(layer, attention=_tamed(layer)) for layer in spec.layers)
    positions = None if spec.embedding.positions is None else MAX_POSITION
    embedding = replace(spec.embedding, scale=1.7, positions=positions)
    head = replace(spec.head, softcap=None if spec.head.softcap is None else 3.0)
    return replace(spec, layers=layers, embedding=embedding, head=head, max_position=MAX_POSITION)


def _tamed(layer: Layer) -> Any:
    attention = layer.attention
    if not isinstance(attention, Attention):
        return attention
    plain = {"kind": RopeKind.DEFAULT, "factor": 1.0, "attention_factor": None, "divisors": None}
    rope = None if attention.rope is None else replace(attention.rope, **plain)  # type: ignore[arg-type]
    return replace(attention, rope=rope, scale=0.4, softcap=None if attention.softcap is None else 2.0)


@pytest.mark.parametrize("target", TARGETS)
@given(specs(), st.lists(st.integers(0, 1 << 20), min_size=1, max_size=20))
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
def test_a_random_model_runs_as_the_formulas_say(target: str, wild: ModelSpec, wild_tokens: list[int]) -> None:
    spec = tamed(wild)
    tokens = [token % spec.vocab_size for token in wild_tokens]
    dtype = torch.float64 if target == "reference" else torch.float32
    expected = torch.from_numpy(naive.logits(spec, as_arrays(random_weights(spec, dtype)), tokens))
    # squares of squares without a norm leave the range where digits can be counted
    scale = float(expected.abs().max())
    assume(1e-6 < scale < 1e6)
    model = random_model(spec, dtype)
    for graph in (build(spec), fuse(build(spec))):
        plan = lower(graph, model, target=target)
        for chunk in (64, 3):
            (found,) = all_logits(plan, [tokens], chunk)
            error = float((found.double() - expected).abs().max()) / scale
            assert error < (1e-9 if target == "reference" else 1e-3)
