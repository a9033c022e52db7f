"""Everything that a specification can express runs, fused and unfused, as an independent float64 transformer says."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from pyruntime.checkpoint import InMemory, Model
from pyruntime.graph import build, fuse
from pyruntime.plan import lower
from pyruntime.spec import (
    MLP,
    Activation,
    Attention,
    DropPlan,
    Embedding,
    Head,
    Layer,
    Linear,
    ModelSpec,
    Norm,
    NormKind,
    Replacement,
    Rope,
    RopeKind,
    drop_sublayers,
    weight_shapes,
)
from tests import naive
from tests.helpers import all_logits

D = 24
VOCAB = 37
ROPE = Rope(kind=RopeKind.DEFAULT, dim=6, theta=100.0)
TOKENS = [5, 0, 36, 11, 11, 2, 30, 7, 19]


def rms(size: int = D, **changes: Any) -> Norm:
    return Norm(**{"kind": NormKind.RMS, "size": size, "eps": 1e-5, **changes})


def lin(n_in: int, n_out: int, bias: bool = False) -> Linear:
    return Linear(in_features=n_in, out_features=n_out, bias=bias)


ATTENTION = Attention(
    num_heads=4, num_kv_heads=2, head_dim=6, q=lin(D, 24), k=lin(D, 12), v=lin(D, 12), o=lin(24, D),
    scale=0.4, rope=ROPE, pre=rms(),
)  # fmt: skip
PLAIN_MLP = MLP(gate=lin(D, 40), up=lin(D, 40), down=lin(40, D), activation=Activation.SILU, pre=rms())
REPLACEMENT = Replacement(linear=lin(D, D, bias=True), pre=rms(), post=rms())
LAYER_NORM = Norm(kind=NormKind.LAYER, size=D, eps=1e-5, bias=True)

ATTENTIONS = {
    "window": replace(ATTENTION, window=3),
    "softcap": replace(ATTENTION, softcap=1.5),
    "partial rope": replace(ATTENTION, rope=replace(ROPE, dim=4)),
    "no rope": replace(ATTENTION, rope=None),
    "biases": replace(ATTENTION, q=lin(D, 24, True), k=lin(D, 12, True), v=lin(D, 12, True), o=lin(24, D, True)),
    "norms per head": replace(ATTENTION, q_norm=rms(6), k_norm=rms(6, kind=NormKind.RMS_ONE_PLUS)),
    "norms over heads": replace(ATTENTION, q_norm=rms(24), k_norm=rms(12)),
    "sub and post norm": replace(ATTENTION, sub=rms(24), post=rms()),
    "layer norm": replace(ATTENTION, pre=LAYER_NORM),
    "layer norm one plus": replace(ATTENTION, pre=replace(LAYER_NORM, kind=NormKind.LAYER_ONE_PLUS)),
    "weightless norm": replace(ATTENTION, pre=rms(weight=False)),
    "no norm": replace(ATTENTION, pre=None),
    "query merged": replace(ATTENTION, q=None),
    "output merged": replace(ATTENTION, o=None),
    "key merged": replace(ATTENTION, num_kv_heads=4, k=None, v=lin(D, 24)),
    "value merged": replace(ATTENTION, num_kv_heads=4, k=lin(D, 24), v=None),
    "all merged": replace(ATTENTION, num_kv_heads=4, q=None, k=None, v=None, o=None),
    "no residual": replace(ATTENTION, residual=False),
    "no residual, no norm, q and o merged": replace(ATTENTION, residual=False, q=None, o=None, pre=None),
    "replaced": REPLACEMENT,
}
MLPS = {
    **{f"plain {act}": replace(PLAIN_MLP, gate=None, activation=act) for act in Activation},
    **{f"gated {act}": replace(PLAIN_MLP, activation=act) for act in Activation},
    "biases": replace(PLAIN_MLP, gate=lin(D, 40, True), up=lin(D, 40, True), down=lin(40, D, True)),
    "sub and post norm": replace(PLAIN_MLP, sub=rms(40), post=rms(kind=NormKind.RMS_ONE_PLUS)),
    "no norm": replace(PLAIN_MLP, pre=None),
    "no residual": replace(PLAIN_MLP, residual=False),
    "replaced": REPLACEMENT,
}


def model_of(layers: list[tuple[Any, Any, bool]], **changes: Any) -> ModelSpec:
    fields: dict[str, Any] = {
        "family": "test",
        "embedding": Embedding(vocab_size=VOCAB, size=D, scale=1.7),
        "layers": tuple(
            Layer(index=i, attention=attention, mlp=mlp, parallel=parallel)
            for i, (attention, mlp, parallel) in enumerate(layers)
        ),
        "final_norm": rms(),
        "head": Head(linear=lin(D, VOCAB), tied=False),
        "max_position": 64,
    }
    return ModelSpec(**{**fields, **changes})


def check(spec: ModelSpec) -> None:
    """Fused and unfused plans in float64, whole and in chunks, against the naive transformer."""
    rng = np.random.default_rng(0)
    arrays = {name: rng.normal(0, 0.4, shape) for name, shape in weight_shapes(spec).items()}
    weights = {name: InMemory(torch.from_numpy(array)) for name, array in arrays.items()}
    model = Model(spec=spec, dense_spec=spec, weights=weights, dtype="float32")
    expected = naive.logits(spec, arrays, TOKENS)
    for graph in (build(spec), fuse(build(spec))):
        plan = lower(graph, model, dtype="float64")
        for chunk in (64, 4, 1):
            (found,) = all_logits(plan, [TOKENS], chunk)
            assert np.abs(found.numpy() - expected).max() < 1e-10 * np.abs(expected).max()


@pytest.mark.parametrize("name", ATTENTIONS)
def test_attention(name: str) -> None:
    check(model_of([(ATTENTION, PLAIN_MLP, False), (ATTENTIONS[name], PLAIN_MLP, False), (ATTENTION, None, False)]))


@pytest.mark.parametrize("name", ATTENTIONS)
def test_last_attention_and_so_the_tail(name: str) -> None:
    check(model_of([(ATTENTION, PLAIN_MLP, False), (ATTENTIONS[name], PLAIN_MLP, False)]))


@pytest.mark.parametrize("name", MLPS)
def test_mlp(name: str) -> None:
    check(model_of([(ATTENTION, MLPS[name], False), (None, MLPS[name], False), (None, PLAIN_MLP, False)]))


@pytest.mark.parametrize("dropped", ["nothing", "attention", "mlp", "last attention"])
def test_parallel_layers(dropped: str) -> None:
    layer = (replace(ATTENTION, pre=LAYER_NORM), replace(PLAIN_MLP, pre=LAYER_NORM, gate=None), True)
    spec = model_of([layer, layer, layer])
    plans = {
        "nothing": DropPlan(),
        "attention": DropPlan((1,)),
        "mlp": DropPlan((), (1,)),
        "last attention": DropPlan((2,)),
    }
    check(drop_sublayers(spec, plans[dropped]))


def test_layers_that_differ_in_heads_and_widths() -> None:
    narrow = replace(
        ATTENTION, num_heads=2, num_kv_heads=1, head_dim=10, q=lin(D, 20), k=lin(D, 10), v=lin(D, 10), o=lin(20, D)
    )
    slim = replace(PLAIN_MLP, gate=lin(D, 8), up=lin(D, 8), down=lin(8, D))
    spec = model_of(
        [(ATTENTION, slim, False), (narrow, PLAIN_MLP, False), (REPLACEMENT, slim, False), (narrow, None, True)]
    )
    check(spec)


@pytest.mark.parametrize(
    "changes",
    [
        {"final_norm": None},
        {"final_norm": LAYER_NORM},
        {"head": Head(linear=lin(D, VOCAB), tied=True)},
        {"head": Head(linear=lin(D, VOCAB, bias=True), tied=False, softcap=2.0)},
    ],
    ids=["no final norm", "layer norm", "tied", "bias and softcap"],
)
def test_ends(changes: dict[str, Any]) -> None:
    check(model_of([(ATTENTION, PLAIN_MLP, False)], **changes))


def test_a_skipless_model_whose_stream_changes_width() -> None:
    widening = replace(PLAIN_MLP, residual=False, pre=None, down=lin(40, 30))
    last = replace(ATTENTION, residual=False, pre=None, q=lin(30, 24), k=lin(30, 12), v=lin(30, 12), o=lin(24, D))
    check(model_of([(ATTENTION, widening, False), (last, PLAIN_MLP, False)]))
