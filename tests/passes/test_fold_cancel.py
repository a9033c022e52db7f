"""A pre-norm goes where queries, keys and values are normed again, unless eps would show."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from pyruntime.checkpoint import Model
from pyruntime.passes.fold import cancel_norms, fold_reports
from pyruntime.spec import Attention, ModelSpec, NormKind
from tests.passes import folds
from tests.specs import ATTENTION, LAYER_NORM, PLAIN_MLP, D, lin, model_of, random_model, rms

NAMES = ("pre", "q_norm", "k_norm", "v_norm")


def without_eps(attention: Attention) -> Attention:
    """The attention with norms whose eps is nothing beside what they read."""
    changes: dict[str, Any] = {name: replace(getattr(attention, name), eps=1e-18) for name in NAMES}
    return replace(attention, **changes)


NORMED = without_eps(folds.NORMED)
ONE_PLUS = without_eps(replace(NORMED, pre=folds.ONE_PLUS, v_norm=rms(6, kind=NormKind.RMS_ONE_PLUS)))
SPECS: dict[str, ModelSpec] = {
    "rms": model_of([(NORMED, PLAIN_MLP, False)] * 2),
    "one plus": model_of([(ONE_PLUS, PLAIN_MLP, False)] * 2),
    "weightless": model_of([(replace(NORMED, pre=rms(weight=False, eps=1e-18)), PLAIN_MLP, False)]),
    "over all heads": model_of([(without_eps(replace(NORMED, q_norm=rms(24), k_norm=rms(12))), PLAIN_MLP, False)]),
    "parallel": model_of([(NORMED, PLAIN_MLP, True)]),
}  # fmt: skip


def streams(model: Model) -> dict[int, torch.Tensor]:
    """Vectors of the size that streams have."""
    generator = torch.Generator().manual_seed(3)
    return {i: torch.randn(50, D, generator=generator) for i, _ in model.spec.attentions()}


@pytest.mark.parametrize("name", SPECS)
def test_cancelling_changes_no_logit_where_eps_is_nothing(name: str) -> None:
    model = random_model(SPECS[name])
    cancelled = cancel_norms(model, streams(model))
    assert all(each.pre is None for _, each in cancelled.spec.attentions())
    folds.assert_same(cancelled, model)


QK_NORMED = replace(ATTENTION, q_norm=rms(6), k_norm=rms(6))


@pytest.mark.parametrize(
    "attention, reason",
    [
        (QK_NORMED, "queries and keys are normed again, but values need its scale"),
        (replace(ATTENTION, q_norm=rms(6)), "there is no k_norm, v_norm behind it"),
        (replace(folds.NORMED, pre=LAYER_NORM), "it is no RMSNorm without bias"),
        (replace(folds.NORMED, pre=rms(bias=True)), "it is no RMSNorm without bias"),
        (replace(folds.NORMED, q=None), "its output is used as it is"),
        (replace(folds.NORMED, k=lin(D, 12, True)), "k add a bias to what it scales"),
        (replace(folds.NORMED, v_norm=replace(LAYER_NORM, size=6)), "a norm behind it is no RMSNorm"),
    ],
)  # fmt: skip
def test_what_needs_its_norm_says_why(attention: Attention, reason: str) -> None:
    model = random_model(model_of([(attention, None, False)]))
    kept = cancel_norms(model, streams(model), force=True)
    assert kept.spec == model.spec and kept.reports[-1].notes == (f"attention 0 pre: {reason}",)


def test_without_measured_streams_the_norm_stays() -> None:
    model = random_model(SPECS["rms"])
    kept = cancel_norms(model, {1: streams(model)[1]})
    first, second = (each.pre for _, each in kept.spec.attentions())
    assert first is not None and second is None
    assert "nothing is known of what it reads" in kept.reports[-1].notes[-1]


@pytest.mark.parametrize("eps", [1e-6, 1e-4, 1e-2])
@pytest.mark.parametrize("size", [1e-2, 1.0, 30.0])
def test_audit_bounds_what_the_norms_really_give(eps: float, size: float) -> None:
    """The change of queries, keys and values, computed with and without the norm by the plain formulas."""
    norms: dict[str, Any] = {"q_norm": rms(6, eps=eps), "k_norm": rms(6, eps=eps), "v_norm": rms(12, eps=eps)}
    attention = replace(folds.NORMED, pre=rms(eps=1e-6), **norms)
    model = random_model(model_of([(attention, None, False)]))
    x = torch.randn(40, D, dtype=torch.float64, generator=torch.Generator().manual_seed(4)) * size
    weights = {name.removeprefix("layers.0.attention."): each.read() for name, each in model.weights.items()}

    def normalised(y: torch.Tensor, width: int, eps: float) -> torch.Tensor:
        parts = y.reshape(len(y), -1, width)
        return parts / (parts.square().mean(-1, keepdim=True) + eps).sqrt()

    gained = x * weights["pre.weight"]
    scaled = gained / (x.square().mean(1, keepdim=True) + 1e-6).sqrt()
    worst = 0.0
    for name, width in (("q", 6), ("k", 6), ("v", 12)):
        with_norm, without = (normalised(y @ weights[f"{name}.weight"].T, width, eps) for y in (scaled, gained))
        worst = max(worst, float((without - with_norm).square().mean(-1).sqrt().max()))
    kept = cancel_norms(model, {0: x}, dtype="bfloat16")
    said = float(kept.reports[-1].notes[-1].split(" by ")[1].split(",")[0])
    assert said == pytest.approx(worst, rel=0.06)
    assert (kept.spec.layers[0].attention == attention) is (worst > 1e-3)


def test_force_takes_it_and_says_so() -> None:
    attention = replace(folds.NORMED, q_norm=rms(6, eps=0.1))
    model = random_model(model_of([(attention, None, False)]))
    forced = cancel_norms(model, streams(model), force=True)
    assert forced.spec.layers[0].attention is not None and forced.spec.layers[0].attention.pre is None
    assert "forced, normed values change by" in forced.reports[-1].notes[0]


def test_nan_is_refused() -> None:
    model = random_model(SPECS["rms"])
    poisoned = {i: torch.full_like(each, torch.nan) for i, each in streams(model).items()}
    assert cancel_norms(model, poisoned).spec == model.spec


def test_report_counts_norm_and_gain() -> None:
    model = random_model(SPECS["rms"])
    (report,) = fold_reports(cancel_norms(model, streams(model)))
    assert report.num_weights == 2 * D and report.flops_per_token == 2 * 4 * D
