"""MatShrink: the same attention with an identity in its map of values, found again where it stands."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from pyruntime.bench.random_model import random_model as shaped_model
from pyruntime.bench.shapes import shape_spec
from pyruntime.passes.fold import identity_blocks, shrink_values
from pyruntime.spec import Attention, Cached
from tests.passes import folds
from tests.specs import ATTENTION, PLAIN_MLP, lin, model_of, random_model, rms

SPECS = {
    "grouped": model_of([(ATTENTION, PLAIN_MLP, False)] * 2),
    "multi-head": model_of([(folds.MULTI_HEAD, PLAIN_MLP, False)]),
    "biases": model_of([(folds.biased(ATTENTION), PLAIN_MLP, True)]),
    "window, softcap": model_of([(replace(ATTENTION, window=3, softcap=2.0, q_norm=rms(6)), PLAIN_MLP, False)]),
}


@pytest.mark.parametrize("name", SPECS)
def test_shrinking_changes_no_logit(name: str) -> None:
    model = random_model(SPECS[name])
    shrunk = shrink_values(model)
    assert len(shrunk.reports[-1].notes) == 1 and "identity blocks" in shrunk.reports[-1].notes[0]
    folds.assert_same(shrunk, model, limit=1e-11)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_identity_is_found_again(dtype: torch.dtype) -> None:
    model = random_model(SPECS["grouped"], dtype)
    assert identity_blocks(model) == {}
    found = identity_blocks(shrink_values(model))
    assert found == {f"layers.{i}.attention.v.weight": 2 for i in range(2)}


def test_identity_of_the_published_form_is_found_along_the_outputs() -> None:
    model = random_model(SPECS["multi-head"])

    def leading(name: str, each: torch.Tensor) -> torch.Tensor:
        if not name.endswith("attention.o.weight"):
            return each
        # W_B* = [I | rest] of each head, [outputs, head_dim] as stored
        heads = [head @ torch.linalg.inv(head[:6]) for head in each.split(6, dim=1)]
        for head in heads:
            head[:6] = torch.eye(6)
        return torch.cat(heads, dim=1)

    assert identity_blocks(folds.changed(model, leading)) == {"layers.0.attention.o.weight": 4}


@pytest.mark.parametrize(
    "attention, reason",
    [
        (replace(ATTENTION, v_norm=rms(6)), "a norm stands between v and o"),
        (replace(ATTENTION, sub=rms(24)), "a norm stands between v and o"),
        (replace(ATTENTION, o=None), "it has no v or no o of its own"),
        (replace(folds.MULTI_HEAD, v=lin(24, 24), cached=Cached.KEYS), "its values are made of its keys"),
    ],
)
def test_what_cannot_be_shrunk_says_why(attention: Attention, reason: str) -> None:
    model = random_model(model_of([(attention, None, False)]))
    kept = shrink_values(model)
    assert kept.reports[-1].notes == (f"attention 0: {reason}",) and dict(kept.weights) == dict(model.weights)


@pytest.mark.parametrize("planted", [0.0, torch.nan])
def test_head_without_full_rank_is_refused(planted: float) -> None:
    def plant(name: str, each: torch.Tensor) -> torch.Tensor:
        if name.endswith("v.weight"):
            each = each.clone()
            each[4] = planted
        return each

    model = folds.changed(random_model(SPECS["grouped"]), plant)
    kept = shrink_values(model)
    assert dict(kept.weights) == dict(model.weights) and len(kept.reports[-1].notes) == 1


def test_pivoting_keeps_half_precision_usable_where_the_first_columns_are_nearly_dependent() -> None:
    """The leading block ruins bfloat16; columns chosen by pivoting do not."""

    def nearly(name: str, each: torch.Tensor) -> torch.Tensor:
        if not name.endswith("v.weight"):
            return each
        each = each.clone()
        each[:, 1:6] = each[:, :1] + 1e-4 * each[:, 1:6]
        return each

    model = folds.changed(random_model(SPECS["grouped"]), nearly)
    shrunk = shrink_values(model, dtype="bfloat16")
    assert len(shrunk.reports[-1].notes) == 1 and "identity blocks" in shrunk.reports[-1].notes[0]


def test_grouped_queries_leave_little_to_save() -> None:
    """Mistral-7B: 8 groups of 128^2 weights in attention matrices of 41.9 million, 0.3 %."""
    spec = shape_spec("mistral-7b")
    spec = replace(spec, layers=tuple(replace(layer, mlp=None) for layer in spec.layers[:1]))
    (note,) = shrink_values(shaped_model(spec)).reports[-1].notes
    assert "8 identity blocks hold 131,072 weights" in note
    assert round(100 * 131_072 / (2 * 4096 * 4096 + 2 * 4096 * 1024), 1) == 0.3


@pytest.mark.parametrize("gain, kept", [(1.0, False), (1e5, True)])
def test_gate_hears_the_gain_of_the_norm_before_it(gain: float, kept: bool) -> None:
    """What a loud channel writes is a five hundredth of what the new basis of a head rounds."""

    def change(name: str, each: torch.Tensor) -> torch.Tensor:
        each = each.clone()
        if name.endswith("attention.pre.weight"):
            each[5] = gain
        if name.endswith("v.weight"):
            each[5::6] *= 0.002
            each[:, 5] = 0.0
            # too small to be a column of the basis
            each[5::6, 5] = 4e-5
        return each

    model = folds.changed(random_model(SPECS["grouped"]), change)
    notes = shrink_values(model, dtype="bfloat16").reports[-1].notes
    # one for each of two layers, or one on the blocks of both
    assert [("refused in bfloat16 (NMSE" in note) for note in notes] == ([True, True] if kept else [False])
