"""Biases that softmax passes on or does not see leave the model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from pyruntime.passes.fold import fold_biases, fold_norms, fold_reports
from pyruntime.spec import Attention, Cached, ModelSpec
from tests.passes import folds
from tests.specs import ATTENTION, PLAIN_MLP, D, lin, model_of, random_model, rms

BIASED = folds.biased(ATTENTION)
NO_ROPE = replace(BIASED, rope=None)
MULTI_HEAD = replace(folds.biased(folds.MULTI_HEAD), rope=None)


@pytest.mark.parametrize("name", folds.MODELS)
def test_folding_biases_changes_no_logit(name: str) -> None:
    model = random_model(folds.MODELS[name])
    folds.assert_same(fold_biases(model), model)
    folds.assert_same(fold_biases(fold_norms(model)), model)


CASES: dict[str, tuple[Attention, bool, bool]] = {
    "rope": (BIASED, False, True),
    "no rope": (NO_ROPE, False, False),
    "no rope, window": (replace(NO_ROPE, window=3), False, False),
    "no rope, softcap": (replace(NO_ROPE, softcap=2.0), False, True),
    "no rope, keys normed": (replace(NO_ROPE, k_norm=rms(6)), False, True),
    "no rope, alibi": (replace(NO_ROPE, alibi=True), False, False),
    "output without bias, wider": (replace(NO_ROPE, o=lin(24, D)), True, False),
    "output without bias": (replace(MULTI_HEAD, o=lin(24, D)), False, False),
    "values normed": (replace(NO_ROPE, v_norm=rms(6)), True, False),
    "sub norm": (replace(NO_ROPE, sub=rms(24)), True, False),
    "no output projection": (replace(NO_ROPE, o=None), True, False),
    "shaped": (replace(NO_ROPE, shaped=True), True, False),
    "post norm": (replace(NO_ROPE, post=rms()), False, False),
    "keys make values": (
        replace(MULTI_HEAD, cached=Cached.KEYS), False, True,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_bias_goes_only_where_nothing_sees_it(name: str) -> None:
    attention, keeps_v, keeps_k = CASES[name]
    model = random_model(model_of([(attention, PLAIN_MLP, False)]))
    folded = fold_biases(model)
    found = folded.spec.layers[0].attention
    assert isinstance(found, Attention) and found.q is not None and found.k is not None and found.v is not None
    assert (found.q.bias, found.v.bias, found.k.bias) == (True, keeps_v, keeps_k)
    notes = folded.reports[-1].notes
    assert any("bias of v stays" in note for note in notes) is keeps_v
    assert any("bias of k stays" in note for note in notes) is keeps_k
    folds.assert_same(folded, model)


def test_every_query_head_gets_the_bias_of_its_group() -> None:
    """With grouped queries the bias of a key-value head meets the output projection once for each of its queries."""
    attention = folds.biased(replace(ATTENTION, num_heads=6, num_kv_heads=2, q=lin(D, 36), o=lin(36, D)))
    model = random_model(model_of([(attention, None, False)]))
    folded = fold_biases(model)
    o, bv, bo = (model.weights[f"layers.0.attention.{name}"].read() for name in ("o.weight", "v.bias", "o.bias"))
    expected = bo.clone()
    for head in range(6):
        for i in range(6):
            expected += o[:, 6 * head + i] * bv[6 * (head // 3) + i]
    assert (folded.weights["layers.0.attention.o.bias"].read() - expected).abs().max() < 1e-14


def test_report_counts_what_went() -> None:
    (report,) = fold_reports(fold_biases(random_model(model_of([(NO_ROPE, None, False)] * 2))))
    assert report.num_weights == 2 * (12 + 12) and report.weight_bytes == 8 * report.num_weights
    assert report.flops_per_token == report.num_weights
    assert report.rewritten[:2] == ("attention 0 v bias into o", "attention 0 k bias gone")


RUNS: list[ModelSpec] = [model_of([(BIASED, PLAIN_MLP, False)] * 2), model_of([(NO_ROPE, PLAIN_MLP, True)] * 2)]


@pytest.mark.parametrize("spec", RUNS)
def test_reference_target_runs_the_folded_model(spec: ModelSpec) -> None:
    model = random_model(spec)
    folds.assert_same_when_run(fold_biases(model), model)


def test_rewrites_in_a_row_round_once() -> None:
    """The bias of a norm goes into v and from there into o; only o's is ever rounded."""
    model = random_model(model_of([(replace(BIASED, pre=folds.LAYER_NORM), None, False)]), torch.bfloat16)
    own = {name.removeprefix("layers.0.attention."): each.read().double() for name, each in model.weights.items()}
    bias = own["v.bias"] + own["v.weight"] @ own["pre.bias"]
    heads = torch.cat([bias[:6], bias[:6], bias[6:], bias[6:]])
    expected = (own["o.bias"] + own["o.weight"] @ heads).to(torch.bfloat16)
    folded = fold_biases(fold_norms(model))
    assert torch.equal(folded.weights["layers.0.attention.o.bias"].read(), expected)
