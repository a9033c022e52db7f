"""What the tests of exact rewrites share: models, an oracle for every kind of sublayer, and the comparison."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from pyruntime.checkpoint import InMemory, Model
from pyruntime.graph import build
from pyruntime.plan import lower
from pyruntime.spec import (
    MLP,
    Activation,
    Attention,
    Embedding,
    Head,
    ModelSpec,
    MoE,
    NormKind,
)
from tests import naive, specs
from tests.helpers import all_logits
from tests.specs import VOCAB, D, lin, model_of, rms

IDS = [5, 0, 31, 31, 7, 12, 3, 3, 36, 20, 11]
# what float64 may lose over a few layers
EXACT = 1e-12

ONE_PLUS = rms(kind=NormKind.RMS_ONE_PLUS)
LAYER_NORM = specs.LAYER_NORM
UNTIED = Head(linear=lin(D, VOCAB), tied=False)
TIED = Head(linear=lin(D, VOCAB), tied=True)


def biased(attention: Attention) -> Attention:
    """The attention with a bias on each of its maps."""
    return replace(attention, **{n: replace(getattr(attention, n), bias=True) for n in ("q", "k", "v", "o")})


def biased_mlp(mlp: MLP) -> MLP:
    """The MLP with a bias on each of its maps."""
    gate = None if mlp.gate is None else replace(mlp.gate, bias=True)
    return replace(mlp, gate=gate, up=replace(mlp.up, bias=True), down=replace(mlp.down, bias=True))


ATTENTION, MLP_ = specs.ATTENTION, specs.PLAIN_MLP
NEOX = (
    replace(biased(ATTENTION), pre=LAYER_NORM),
    replace(biased_mlp(MLP_), gate=None, activation=Activation.GELU, pre=LAYER_NORM),
)
MOE = MoE(
    num_experts=5, top_k=2, router=lin(D, 5), gate=lin(D, 10), up=lin(D, 10), down=lin(10, D), pre=rms(),
    activation=Activation.SILU, routed_scale=1.3, shared=replace(MLP_, pre=None), shared_gate=lin(D, 1),
)  # fmt: skip
NORMED = replace(ATTENTION, q_norm=rms(6), k_norm=rms(6), v_norm=rms(12))
MULTI_HEAD = replace(ATTENTION, num_kv_heads=4, k=lin(D, 24), v=lin(D, 24))

SANDWICH = (
    replace(ATTENTION, pre=ONE_PLUS, post=ONE_PLUS, softcap=2.0),
    replace(MLP_, pre=ONE_PLUS, post=ONE_PLUS),
)
POST_ALONE = (replace(ATTENTION, pre=None, post=rms()), replace(MLP_, pre=None, post=rms()))
LAYER_ONE_PLUS = replace(LAYER_NORM, kind=NormKind.LAYER_ONE_PLUS)
NEMOTRON = (replace(ATTENTION, pre=LAYER_ONE_PLUS), replace(MLP_, gate=None, pre=LAYER_ONE_PLUS))
VALUES_ONE_PLUS = replace(NORMED, v_norm=rms(6, kind=NormKind.RMS_ONE_PLUS))

MODELS: dict[str, ModelSpec] = {
    "llama": model_of([(ATTENTION, MLP_, False)] * 3),
    "llama, tied": model_of([(ATTENTION, MLP_, False)] * 2, head=TIED),
    "qwen, biases": model_of([(replace(biased(ATTENTION), o=lin(24, D)), MLP_, False)] * 2),
    "qwen3, norms of heads": model_of([(replace(ATTENTION, q_norm=rms(6), k_norm=rms(6)), MLP_, False)] * 2),
    "gemma, sandwich": model_of([(*SANDWICH, False)] * 2, final_norm=ONE_PLUS, head=replace(TIED, softcap=3.0)),
    "olmo2, post norms alone": model_of([(*POST_ALONE, False)] * 2),
    "gpt_neox, parallel": model_of([(*NEOX, True)] * 2, final_norm=LAYER_NORM),
    "phi, serial layer norms": model_of(
        [(*NEOX, False)] * 2, final_norm=LAYER_NORM, head=Head(linear=lin(D, VOCAB, True), tied=False)
    ),
    "nemotron, layer norm one plus": model_of([(*NEMOTRON, False)] * 2, final_norm=LAYER_ONE_PLUS),
    "bitnet, sub norms": model_of([(replace(ATTENTION, sub=rms(24)), replace(MLP_, sub=rms(40)), False)] * 2),
    "gpt2, learned positions": model_of(
        [(replace(NEOX[0], rope=None), NEOX[1], False)] * 2,
        embedding=Embedding(vocab_size=VOCAB, size=D, positions=16),
        final_norm=LAYER_NORM,
        max_position=16,
    ),
    "baichuan, alibi": model_of([(replace(ATTENTION, rope=None, alibi=True), MLP_, False)] * 2),
    "shaped": model_of([(replace(biased(ATTENTION), shaped=True), MLP_, False)] * 2),
    "mixture of experts": model_of(
        [(ATTENTION, MOE, False), (ATTENTION, replace(MOE, shared=None, shared_gate=None), False)]
    ),
    "values normed": model_of([(NORMED, MLP_, False), (VALUES_ONE_PLUS, MLP_, False)]),
    "replacements and gaps": model_of(
        [(specs.REPLACEMENT, None, False), (None, MLP_, False), (ATTENTION, specs.REPLACEMENT, False)]
    ),
}


def logits(model: Model, ids: Sequence[int] = IDS) -> naive.Array:
    """Logits by the formulas in float64, mixtures of experts included."""
    plain = naive.sublayer

    def sublayer(spec: Any, prefix: str, weights: naive.Weights, x: naive.Array, ids: list[int]) -> naive.Array:
        if not isinstance(spec, MoE):
            found: naive.Array = plain(spec, prefix, weights, x, ids)
            return found
        y = _experts(spec, prefix, weights, naive.norm(spec.pre, f"{prefix}pre", weights, x))
        return naive.norm(spec.post, f"{prefix}post", weights, y)

    weights = specs.as_arrays({name: each.read() for name, each in model.weights.items()})
    with patch.object(naive, "sublayer", sublayer):
        return naive.logits(model.spec, weights, ids)


def _experts(moe: MoE, prefix: str, weights: naive.Weights, x: naive.Array) -> naive.Array:
    out = np.zeros((len(x), moe.out_size))
    for i, row in enumerate(x):
        scores = naive.linear(moe.router, f"{prefix}router", weights, row)
        chances = np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum()
        best = np.argsort(-chances)[: moe.top_k]
        total = chances[best].sum() if moe.normalize else 1.0
        for expert in best:
            own = MLP(gate=moe.gate, up=moe.up, down=moe.down, activation=moe.activation)
            y = naive.sublayer(own, f"{prefix}experts.{expert}.", weights, row[None], [])[0]
            out[i] += y * chances[expert] / total * moe.routed_scale
    if moe.shared is None:
        return out
    y = naive.sublayer(moe.shared, f"{prefix}shared.", weights, x, [])
    if moe.shared_gate is not None:
        y = y / (1 + np.exp(-naive.linear(moe.shared_gate, f"{prefix}shared_gate", weights, x)))
    return np.asarray(out + y)


def difference(found: naive.Array, expected: naive.Array) -> float:
    """Largest difference over the spread of what was expected."""
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / expected.std())


def assert_same(found: Model, expected: Model, limit: float = EXACT) -> None:
    """Both models give the same logits by the formulas."""
    assert difference(logits(found), logits(expected)) < limit


RAGGED = [IDS, IDS[:1], IDS[3:8], IDS[::-1][:9]]


def assert_same_when_run(found: Model, expected: Model, limit: float = EXACT) -> None:
    """Both models give the same logits in the reference target: whole, token by token, ragged and in chunks."""
    plans = [lower(build(model.spec), model, dtype="float64") for model in (found, expected)]
    for chunk in (64, 1, 3):
        ours, theirs = (all_logits(plan, RAGGED, chunk) for plan in plans)
        for one, other in zip(ours, theirs, strict=True):
            assert difference(one.numpy(), other.numpy()) < limit


def changed(model: Model, change: Callable[[str, torch.Tensor], torch.Tensor]) -> Model:
    """The model with other weights."""
    return replace(model, weights={name: InMemory(change(name, each.read())) for name, each in model.weights.items()})
