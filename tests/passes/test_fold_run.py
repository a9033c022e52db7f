"""Rewritten models as they run: whole, token by token, in chunks, ragged; real families, and half precision."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import reduce
from pathlib import Path

import pytest
import torch

from pyruntime.checkpoint import Model, read_model
from pyruntime.graph import build, fuse
from pyruntime.passes.fold import (
    centre_layer_norms,
    fold_biases,
    fold_mlp_prefix,
    fold_norms,
    shrink_values,
    slim,
    stored_as,
    tabulate_first_layer,
)
from pyruntime.plan import lower
from pyruntime.spec import Cached, weight_shapes
from tests.families import VARIANTS, make
from tests.helpers import TARGETS, all_logits, hf_logits, nmse, relative_error
from tests.passes import folds
from tests.specs import model_of, random_model

Pass = Callable[[Model], Model]
MEMORY_FREE: tuple[Pass, ...] = (fold_mlp_prefix, centre_layer_norms, fold_norms, fold_biases)
CHAINS: dict[str, tuple[Pass, ...]] = {
    "norms": (centre_layer_norms, fold_norms),
    "norms and biases": MEMORY_FREE,
    "first layer": (tabulate_first_layer, *MEMORY_FREE),
    "inputs": (*MEMORY_FREE, lambda model: slim(model, Cached.INPUTS)),
    "shrunk": (*MEMORY_FREE, shrink_values),
}
KEYS = model_of([(folds.MULTI_HEAD, folds.MLP_, False), (folds.biased(folds.MULTI_HEAD), folds.MLP_, False)])


def rewritten(model: Model, chain: str) -> Model:
    return reduce(lambda found, apply: apply(found), CHAINS[chain], model)


@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("name", folds.MODELS)
def test_reference_runs_what_was_rewritten(name: str, chain: str) -> None:
    model = random_model(folds.MODELS[name])
    folds.assert_same_when_run(rewritten(model, chain), model, limit=1e-11 if chain == "shrunk" else folds.EXACT)


def test_reference_runs_a_cache_of_keys() -> None:
    model = random_model(KEYS)
    folds.assert_same_when_run(slim(model, Cached.KEYS), model, limit=1e-11)
    folds.assert_same_when_run(fold_norms(slim(fold_biases(model), Cached.KEYS)), model, limit=1e-11)


FAMILIES = ("mistral", "qwen2", "qwen3", "phi3", "gemma2", "gemma3", "gpt_neox", "bitnet", "nemotron")


@pytest.mark.parametrize("family", FAMILIES)
def test_families_give_the_logits_of_transformers(family: str, tmp_path: Path) -> None:
    ids = [(7 * i * i + 3 * i) % 61 for i in range(23)]
    expected = hf_logits(make(VARIANTS[family], tmp_path).double(), ids)
    for chain in CHAINS:
        model = rewritten(stored_as(read_model(tmp_path), "float64"), chain)
        plan = lower(fuse(build(model.spec)), model, dtype="float64")
        # norms and ropes of transformers compute in float32, whatever the dtype of the model
        assert relative_error(all_logits(plan, [ids], 7)[0], expected) < 1e-5, chain


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("name", ["llama", "gpt_neox, parallel", "qwen, biases", "bitnet, sub norms"])
def test_bfloat16_stays_near_the_model_as_it_was(name: str, chain: str, target: str) -> None:
    """The oracle has the unrewritten weights in bfloat16 and computes in float64."""
    model = random_model(folds.MODELS[name], torch.bfloat16)
    after = rewritten(model, chain)
    plan = lower(fuse(build(after.spec)), after, dtype="bfloat16", target=target)
    for ids, found in zip(folds.RAGGED, all_logits(plan, folds.RAGGED, 3), strict=True):
        assert nmse(found, torch.from_numpy(folds.logits(model, ids))) < 5e-4


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("chain", CHAINS)
def test_float32_stays_near_float64(chain: str, target: str) -> None:
    model = random_model(folds.MODELS["gpt_neox, parallel"], torch.float32)
    after = rewritten(model, chain)
    plan = lower(fuse(build(after.spec)), after, dtype="float32", target=target)
    for ids, found in zip(folds.RAGGED, all_logits(plan, folds.RAGGED, 3), strict=True):
        assert relative_error(found, torch.from_numpy(folds.logits(model, ids))) < 1e-4


@pytest.mark.parametrize("chain", CHAINS)
def test_what_is_computed_counts_as_itself(chain: str) -> None:
    """Not as what it is made of: a table is larger, and several weights share their sources."""
    model = rewritten(random_model(folds.MODELS["gpt_neox, parallel"], torch.bfloat16), chain)
    sizes = [math.prod(shape) for shape in weight_shapes(model.spec).values()]
    assert (model.num_values, model.weight_bytes) == (sum(sizes), 2 * sum(sizes))


def test_shared_weights_count_once_in_another_dtype_too() -> None:
    model = random_model(folds.MODELS["llama"], torch.float32)
    shared = replace(model, weights={**model.weights, "head.weight": model.weights["embedding.weight"]})
    assert model.num_values - shared.num_values == math.prod(model.weights["head.weight"].shape)
    narrow = stored_as(shared, "bfloat16")
    assert (narrow.num_values, narrow.weight_bytes) == (shared.num_values, shared.weight_bytes // 2)
    assert narrow.weights["head.weight"] is narrow.weights["embedding.weight"]
