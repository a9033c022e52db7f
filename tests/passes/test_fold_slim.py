"""A cache of keys, or of inputs: the same attention, or a refusal with the number that forbids it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from pyruntime.bench.random_model import random_model as shaped_model
from pyruntime.bench.shapes import shape_spec
from pyruntime.checkpoint import Model
from pyruntime.errors import UsageError
from pyruntime.passes.fold import fold_norms, fold_reports, slim
from pyruntime.passes.fold.gate import judge_inverse
from pyruntime.spec import Attention, Cached, ModelSpec
from tests.passes import folds
from tests.passes.folds import MULTI_HEAD
from tests.specs import ATTENTION, PLAIN_MLP, D, lin, model_of, random_model, rms

WIDE_HEADS = replace(
    ATTENTION, num_heads=4, num_kv_heads=2, head_dim=12, q=lin(D, 48), k=lin(D, 24), v=lin(D, 24), o=lin(48, D)
)
SPECS: dict[str, ModelSpec] = {
    "multi-head": model_of([(MULTI_HEAD, PLAIN_MLP, False)] * 2),
    "biases": model_of([(folds.biased(MULTI_HEAD), PLAIN_MLP, False)] * 2),
    "bias of keys": model_of([(replace(MULTI_HEAD, k=lin(D, 24, True)), PLAIN_MLP, False)]),
    "bias of values": model_of([(replace(MULTI_HEAD, v=lin(D, 24, True)), PLAIN_MLP, False)]),
    "no rope, softcap, window": model_of([(replace(MULTI_HEAD, rope=None, softcap=2.0, window=4), PLAIN_MLP, False)]),
    "norms of heads": model_of([(replace(MULTI_HEAD, q_norm=rms(6), k_norm=rms(24), v_norm=rms(6)), PLAIN_MLP, False)]),
    "parallel": model_of([(*(replace(folds.biased(MULTI_HEAD), pre=folds.LAYER_NORM), folds.NEOX[1]), True)] * 2),
    "grouped, wide heads": model_of([(WIDE_HEADS, PLAIN_MLP, False)] * 2),
}  # fmt: skip


def attentions(model: Model) -> list[Attention]:
    return [attention for _, attention in model.spec.attentions()]


@pytest.mark.parametrize("name", SPECS)
def test_cache_of_keys_changes_no_logit(name: str) -> None:
    model = random_model(SPECS[name])
    slimmed = slim(model, Cached.KEYS)
    assert all(each.cached is Cached.KEYS for each in attentions(slimmed))
    # what the inverse may lose is its condition number
    worst = max(
        np.linalg.cond(each.read().numpy()) for name, each in model.weights.items() if name.endswith("k.weight")
    )
    folds.assert_same(slimmed, model, limit=1e-12 + 1e-15 * worst)
    folds.assert_same(slim(fold_norms(model), Cached.KEYS), model, limit=1e-11 + 1e-15 * worst)


@pytest.mark.parametrize("name", SPECS)
def test_cache_of_inputs_changes_no_weight(name: str) -> None:
    model = random_model(SPECS[name])
    slimmed = slim(model, Cached.INPUTS)
    assert all(each.cached is Cached.INPUTS for each in attentions(slimmed))
    assert dict(slimmed.weights) == dict(model.weights)


@pytest.mark.parametrize("cached, share", [(Cached.KEYS, 0.5), (Cached.INPUTS, 0.5)])
def test_half_of_the_cache_goes(cached: Cached, share: float) -> None:
    """Abstract of arXiv 2503.05840: multi-head attention needs half of its cache."""
    spec = shape_spec("llama-2-7b")
    spec = replace(spec, layers=spec.layers[:1])
    small = model_of([(MULTI_HEAD, None, False)])
    for model in [random_model(small)] + ([shaped_model(spec)] if cached is Cached.INPUTS else []):
        (report,) = fold_reports(slim(model, cached))
        assert report.kv_values_per_token == share * sum(2 * each.kv_size for each in attentions(model))


@pytest.mark.parametrize(
    "attention, cached, reason",
    [
        (ATTENTION, Cached.KEYS, "W_K is 12x24, and only a square one has an inverse"),
        (ATTENTION, Cached.INPUTS, "its 24 inputs are no less than 24 keys and values"),
        (replace(MULTI_HEAD, v=None), Cached.KEYS, "it has no k or no v of its own"),
        (replace(MULTI_HEAD, cached=Cached.INPUTS), Cached.KEYS, "its cache holds inputs already"),
        (replace(MULTI_HEAD, q=None, k=None, v=None, pre=None, table=True), Cached.KEYS, "it has no k or no v of"),
    ],
)  # fmt: skip
def test_what_cannot_be_slim_says_why(attention: Attention, cached: Cached, reason: str) -> None:
    model = random_model(model_of([(attention, PLAIN_MLP, False)]))
    kept = slim(model, cached)
    assert kept.spec == model.spec and kept.reports[-1].notes[0].startswith(f"attention 0: {reason}")


def test_cache_of_keys_and_values_is_no_request() -> None:
    with pytest.raises(UsageError, match="expected keys or inputs") as caught:
        slim(random_model(SPECS["multi-head"]), Cached.KEYS_VALUES)
    assert caught.value.code == "FOLD"
    with pytest.raises(UsageError, match="dtype 'int8'"):
        slim(random_model(SPECS["multi-head"]), Cached.KEYS, dtype="int8")


def with_condition(condition: float, layer: int = 0) -> Model:
    """Two multi-head layers, W_K of one of them having this condition number, the others one."""
    model = random_model(model_of([(MULTI_HEAD, None, False)] * 2))
    generator = torch.Generator().manual_seed(1)

    def change(name: str, each: torch.Tensor) -> torch.Tensor:
        if not name.endswith("k.weight"):
            return each
        u, _, v = torch.linalg.svd(torch.randn(D, D, generator=generator, dtype=torch.float64))
        top = condition if name.startswith(f"layers.{layer}.") else 1.0
        return (
            u @ torch.diag(torch.logspace(0, -np.log10(top), D, dtype=torch.float64)) @ v if top < np.inf else each * 0
        )

    return folds.changed(model, change)


# limits of condition numbers, by dtype
LIMITS = {"bfloat16": 1e3, "float16": 1e4, "float32": 1e6}


@pytest.mark.parametrize("dtype", LIMITS)
def test_condition_above_the_limit_of_the_dtype_is_refused(dtype: str) -> None:
    slimmed = slim(with_condition(1.01 * LIMITS[dtype]), Cached.KEYS, dtype=dtype)
    assert [each.cached for each in attentions(slimmed)] == [Cached.KEYS_VALUES, Cached.KEYS]
    assert any(f"attention 0: refused in {dtype} (condition number" in note for note in slimmed.reports[-1].notes)


def test_error_above_the_limit_is_refused_though_the_condition_is_not() -> None:
    """bfloat16 loses more than a thousandth of the values long before a condition number of a thousand."""
    model = with_condition(900.0)
    assert attentions(slim(model, Cached.KEYS, dtype="bfloat16"))[0].cached is Cached.KEYS_VALUES
    assert any("(NMSE" in note for note in slim(model, Cached.KEYS, dtype="bfloat16").reports[-1].notes)
    assert attentions(slim(model, Cached.KEYS, dtype="float32"))[0].cached is Cached.KEYS


def test_force_takes_it_and_says_so() -> None:
    model = with_condition(1e7)
    slimmed = slim(model, Cached.KEYS, dtype="bfloat16", force=True)
    assert all(each.cached is Cached.KEYS for each in attentions(slimmed))
    assert any(note.startswith("attention 0: forced, condition number 1.0e+07") for note in slimmed.reports[-1].notes)


@pytest.mark.parametrize("fault", ["singular", "nan", "infinite"])
@pytest.mark.parametrize("force", [False, True])
def test_what_has_no_inverse_is_refused_even_by_force(fault: str, force: bool) -> None:
    model = with_condition(np.inf if fault == "singular" else 1.0)

    def plant(name: str, each: torch.Tensor) -> torch.Tensor:
        if fault != "singular" and name == "layers.0.attention.k.weight":
            each = each.clone()
            each[3, 4] = torch.nan if fault == "nan" else torch.inf
        return each

    slimmed = slim(folds.changed(model, plant), Cached.KEYS, force=force)
    assert [each.cached for each in attentions(slimmed)] == [Cached.KEYS_VALUES, Cached.KEYS]


def test_what_is_gated_is_what_is_written() -> None:
    """In bfloat16 the values made of rounded keys are as near as the gate says."""
    model = random_model(SPECS["multi-head"], torch.bfloat16)
    model = folds.changed(model, lambda name, each: _orthogonal(each) if name.endswith("k.weight") else each)
    slimmed = slim(model, Cached.KEYS)
    assert all(each.cached is Cached.KEYS for each in attentions(slimmed))
    expected = folds.logits(model)
    assert ((folds.logits(slimmed) - expected) ** 2).mean() / (expected**2).mean() < 5e-4


def _orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    q: torch.Tensor = torch.linalg.qr(matrix.double())[0]
    return q.to(matrix.dtype)


def loud(channels: dict[int, float], attention: Attention = MULTI_HEAD) -> Model:
    """A layer whose pre-norm has these gains, to whose channels values are blind."""
    model = random_model(model_of([(attention, None, False)]))

    def change(name: str, each: torch.Tensor) -> torch.Tensor:
        each = _orthogonal(each) if name.endswith("k.weight") else each.clone()
        for channel, gain in channels.items():
            if name.endswith("attention.pre.weight"):
                each[channel] = gain
            if name.endswith("v.weight"):
                each[:, channel] = 0.0
        return each

    return folds.changed(model, change)


@pytest.mark.parametrize("folded", [False, True])
def test_gate_hears_the_gain_of_the_norm_before_it(folded: bool) -> None:
    """Two loud channels drown the values in the rounding of keys, wherever the gain stands."""
    model = loud({3: 150.0, 8: -150.0})
    slimmed = slim(fold_norms(model) if folded else model, Cached.KEYS, dtype="bfloat16")
    assert attentions(slimmed)[0].cached is Cached.KEYS_VALUES
    quiet = loud({3: 1.0, 8: -1.0})
    assert attentions(slim(quiet, Cached.KEYS, dtype="bfloat16"))[0].cached is Cached.KEYS


@pytest.mark.parametrize("name", ["k.bias", "pre.bias"])
def test_gate_hears_what_is_added_before_the_cache(name: str) -> None:
    attention = replace(MULTI_HEAD, k=lin(D, 24, True), pre=folds.LAYER_NORM)
    model = folds.changed(loud({}, attention), lambda own, each: each + 1000.0 * own.endswith(name))
    if name == "pre.bias":
        # keys carry it, and values would not
        model = folds.changed(model, lambda own, each: each - each.mean(1, True) if own.endswith("v.weight") else each)
    assert attentions(slim(model, Cached.KEYS, dtype="bfloat16"))[0].cached is Cached.KEYS_VALUES
    assert attentions(slim(model, Cached.KEYS, dtype="float32"))[0].cached is Cached.KEYS


def test_keys_are_judged_as_the_cache_rounds_them() -> None:
    """All weights are exact in bfloat16; k = 256 a +- b is not, and v = b is their difference."""
    key = torch.tensor([[256.0, 1.0], [256.0, -1.0]], dtype=torch.float64)
    made = torch.tensor([[0.5, -0.5], [0.25, -0.25]], dtype=torch.float64)
    value = torch.tensor([[0.0, 1.0], [0.0, 0.5]], dtype=torch.float64)
    assert torch.equal(made @ key, value)
    inputs = torch.randn(64, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    verdict = judge_inverse(key, made, value, "bfloat16", inputs)
    assert verdict.condition < 300 and verdict.refused is not None and "NMSE" in verdict.refused
