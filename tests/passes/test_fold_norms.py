"""Gains, biases and means of norms move into the maps around them, and nothing else changes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from pyruntime.passes.fold import centre_layer_norms, fold_norms, fold_reports
from pyruntime.spec import Attention, Cached, Linear, NormKind, weight_shapes
from tests.passes import folds
from tests.specs import ATTENTION, ATTENTIONS, LAYER_NORM, MLPS, PLAIN_MLP, D, lin, model_of, random_model, rms


@pytest.mark.parametrize("name", folds.MODELS)
def test_folding_norms_changes_no_logit(name: str) -> None:
    model = random_model(folds.MODELS[name])
    folds.assert_same(fold_norms(model), model)


@pytest.mark.parametrize("name", folds.MODELS)
def test_centring_changes_no_logit(name: str) -> None:
    model = random_model(folds.MODELS[name])
    centred = centre_layer_norms(model)
    folds.assert_same(centred, model)
    folds.assert_same(fold_norms(centred), model)


@pytest.mark.parametrize("kind, name", [("attention", each) for each in ATTENTIONS] + [("mlp", each) for each in MLPS])
def test_every_kind_of_sublayer_survives(kind: str, name: str) -> None:
    pair = (ATTENTIONS[name], PLAIN_MLP) if kind == "attention" else (ATTENTION, MLPS[name])
    model = random_model(model_of([(*pair, False), (*pair, False)]))
    folds.assert_same(fold_norms(model), model)


def test_no_gain_and_no_bias_is_left_where_linear_maps_stand_behind() -> None:
    for name in ("llama", "qwen, biases", "gpt_neox, parallel", "bitnet, sub norms", "mixture of experts"):
        model = random_model(folds.MODELS[name])
        left = [each for each in fold_norms(model).weights if "norm" in each or ".pre." in each or ".sub." in each]
        assert left == []


def test_layer_norms_become_rms_norms_where_every_writer_can_be_centred() -> None:
    spec = fold_norms(centre_layer_norms(random_model(folds.MODELS["phi, serial layer norms"]))).spec
    kinds = {each.pre.kind for layer in spec.layers for _, each in layer.sublayers() if each.pre is not None}
    assert kinds == {NormKind.RMS} and spec.final_norm == replace(
        LAYER_NORM, kind=NormKind.RMS, weight=False, bias=False
    )


@pytest.mark.parametrize(
    "spec, reason",
    [
        (model_of([(ATTENTION, PLAIN_MLP, False)]), "the stream has no LayerNorm"),
        (model_of([(*folds.NEOX, False), (ATTENTION, None, False)], final_norm=LAYER_NORM), "attention 1 reads the"),
        (model_of([(*folds.NEOX, False)]), "the head reads the stream through no LayerNorm"),
        (model_of([(*folds.NEOX, False)], final_norm=LAYER_NORM, head=folds.TIED), "the head is tied"),
        (
            model_of([(folds.NEOX[0], replace(folds.NEOX[1], post=rms()), False)], final_norm=LAYER_NORM),
            "mlp 0 writes through a norm",
        ),
        (
            model_of([(replace(folds.NEOX[0], o=None), None, False)], final_norm=LAYER_NORM),
            "attention 0 writes without an output projection",
        ),
    ],
)  # fmt: skip
def test_centring_refuses_what_would_see_or_keep_a_mean(spec: object, reason: str) -> None:
    model = random_model(spec)  # type: ignore[arg-type]
    kept = centre_layer_norms(model)
    assert kept.spec == model.spec and dict(kept.weights) == dict(model.weights)
    assert any(note.startswith(reason) for note in kept.reports[-1].notes)


def test_a_tied_head_may_lose_the_mean_of_its_rows_behind_a_weightless_norm() -> None:
    final = replace(LAYER_NORM, weight=False, bias=False)
    model = random_model(model_of([(*folds.NEOX, False)], final_norm=final, head=folds.TIED))
    centred = centre_layer_norms(model)
    assert centred.spec.final_norm == replace(final, kind=NormKind.RMS)
    folds.assert_same(centred, model)


def test_gains_of_ones_and_biases_of_zeros_vanish_where_nothing_could_take_them() -> None:
    """FlashNorm checkpoints of the compatible kind hold ones."""
    model = random_model(folds.MODELS["gemma, sandwich"])
    unit = folds.changed(
        model, lambda name, each: torch.zeros_like(each) if ".post." in name or "final_norm" in name else each
    )
    spec = fold_norms(unit).spec
    assert spec.final_norm is not None and not spec.final_norm.weight
    assert all(each.post is not None and not each.post.weight for layer in spec.layers for _, each in layer.sublayers())
    folds.assert_same(fold_norms(unit), unit)


def test_one_gain_that_is_not_one_keeps_the_vector() -> None:
    model = random_model(folds.MODELS["llama, tied"])

    def nearly(name: str, each: torch.Tensor) -> torch.Tensor:
        if name != "final_norm.weight":
            return each
        ones = torch.ones_like(each)
        ones[3] = 1 + 2**-40
        return ones

    assert "final_norm.weight" in fold_norms(folds.changed(model, nearly)).weights


def test_report_says_what_stays_and_why() -> None:
    (report,) = fold_reports(fold_norms(random_model(folds.MODELS["gemma, sandwich"])))
    assert "final norm: the head is tied to the embedding, which must not change" in report.notes
    assert any("attention 0-1 post, mlp 0-1 post" in note and "residual" in note for note in report.notes)
    # four pre-norms of 24 values; each saves a multiplication a value
    assert (report.num_weights, report.weight_bytes, report.flops_per_token) == (4 * D, 4 * D * 8, 4 * D)


def test_input_that_serves_as_query_keeps_its_gain() -> None:
    model = random_model(model_of([(replace(ATTENTION, q=None), PLAIN_MLP, False)]))
    folded = fold_norms(model)
    assert "layers.0.attention.pre.weight" in folded.weights and "layers.0.mlp.pre.weight" not in folded.weights
    assert "attention 0 pre: the input itself serves as q" in folded.reports[-1].notes
    folds.assert_same(folded, model)


def test_triangular_map_stays_triangular() -> None:
    triangular = Linear(in_features=D, out_features=D, triangular=True)
    spec = model_of([(replace(ATTENTION, q=triangular, pre=LAYER_NORM), None, False)])
    model = random_model(spec)
    folded = fold_norms(model)
    assert folded.weights["layers.0.attention.q.weight"].shape == (D * (D + 1) // 2,)
    folds.assert_same(folded, model)


def test_keys_that_make_values_pass_the_gain_on() -> None:
    slim = replace(folds.MULTI_HEAD, v=lin(24, 24), cached=Cached.KEYS)
    model = random_model(model_of([(slim, PLAIN_MLP, False)]))
    folded = fold_norms(model)
    assert folded.weights["layers.0.attention.v.weight"] is model.weights["layers.0.attention.v.weight"]
    folds.assert_same(folded, model)


def test_bias_of_values_normed_in_shaped_attention_stays() -> None:
    shaped = replace(folds.NORMED, shaped=True, v_norm=rms(6, bias=True))
    folded = fold_norms(random_model(model_of([(shaped, None, False)])))
    attention = folded.spec.layers[0].attention
    assert isinstance(attention, Attention) and attention.v_norm == shaped.v_norm


def test_nothing_is_read_but_the_vectors_of_norms_until_somebody_reads() -> None:
    model = random_model(folds.MODELS["llama"])
    read: list[str] = []

    class Watched:
        def __init__(self, name: str) -> None:
            self.name, self.own = name, model.weights[name]
            self.shape, self.num_bytes = self.own.shape, self.own.num_bytes

        def refs(self) -> object:
            return self.own.refs()

        def read(self) -> torch.Tensor:
            read.append(self.name)
            return self.own.read()

    watched = replace(model, weights={name: Watched(name) for name in model.weights})  # type: ignore[misc]
    folded = fold_norms(watched)
    assert read and all("norm" in name or ".pre." in name for name in read)
    assert set(folded.weights) == set(weight_shapes(folded.spec))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "gpt_neox, parallel", "bitnet, sub norms"])
def test_half_precision_loses_no_more_than_a_rounding(name: str, dtype: torch.dtype) -> None:
    model = random_model(folds.MODELS[name], dtype)
    folded = fold_norms(centre_layer_norms(model))
    assert {each.read().dtype for each in folded.weights.values()} == {dtype}
    expected = folds.logits(model)
    assert ((folds.logits(folded) - expected) ** 2).mean() / (expected**2).mean() < 5e-4
