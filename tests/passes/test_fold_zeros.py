"""Sublayers that add zero are found and dropped, whatever makes them zero."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pyruntime.checkpoint import read_model
from pyruntime.passes.fold import drop_zero_sublayers
from tests.conftest import TINY
from tests.passes import folds
from tests.specs import ATTENTION, PLAIN_MLP, REPLACEMENT, model_of, random_model, rms

POST = (replace(ATTENTION, post=rms()), replace(PLAIN_MLP, post=folds.ONE_PLUS))
MODELS = {
    "plain": model_of([(ATTENTION, PLAIN_MLP, False)] * 2),
    "biases": model_of([(folds.biased(ATTENTION), folds.biased_mlp(PLAIN_MLP), False)] * 2),
    "parallel": model_of([(ATTENTION, PLAIN_MLP, True)] * 2),
    "post norms": model_of([(*POST, False)] * 2),
    "experts": model_of([(ATTENTION, folds.MOE, False)] * 2),
    "replaced": model_of([(REPLACEMENT, REPLACEMENT, False)] * 2),
}
# the ends of names of weights whose zeros silence sublayers of layer 1, and which they are
SILENT: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "attention": ("plain", ("attention.o.weight",), ("attention 1",)),
    "mlp": ("plain", ("mlp.down.weight",), ("mlp 1",)),
    "both, parallel": ("parallel", ("attention.o.weight", "mlp.down.weight"), ("attention 1", "mlp 1")),
    "with biases": ("biases", ("o.weight", "o.bias", "down.weight", "down.bias"), ("attention 1", "mlp 1")),
    "bias left": ("biases", ("o.weight", "down.bias"), ()),
    "zeros through a post norm": ("post norms", ("o.weight",), ("attention 1",)),
    "gain of a post norm": ("post norms", ("attention.post.weight",), ("attention 1",)),
    "gain of one plus zero": ("post norms", ("mlp.post.weight",), ()),
    "all experts": ("experts", ("down.weight",), ("mlp 1",)),
    "all experts but the shared one": ("experts", tuple(f"experts.{i}.down.weight" for i in range(5)), ()),
    "replacement": ("replaced", ("attention.linear.weight", "attention.linear.bias"), ("attention 1",)),
}  # fmt: skip


@pytest.mark.parametrize("name", SILENT)
def test_what_adds_zero_is_dropped_and_nothing_else(name: str) -> None:
    base, ends, removed = SILENT[name]

    def silence(weight: str, each: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(each) if weight.startswith("layers.1.") and weight.endswith(ends) else each

    model = folds.changed(random_model(MODELS[base]), silence)
    pruned = drop_zero_sublayers(model)
    assert pruned.reports[-1].removed == removed
    folds.assert_same(pruned, model, limit=1e-14)


def test_one_plus_minus_one_is_zero() -> None:
    def silence(weight: str, each: torch.Tensor) -> torch.Tensor:
        return torch.full_like(each, -1.0) if weight == "layers.0.mlp.post.weight" else each

    model = folds.changed(random_model(MODELS["post norms"]), silence)
    pruned = drop_zero_sublayers(model)
    assert pruned.reports[-1].removed == ("mlp 0",)
    folds.assert_same(pruned, model, limit=1e-14)


def test_a_single_value_keeps_the_sublayer() -> None:
    def nearly(weight: str, each: torch.Tensor) -> torch.Tensor:
        if weight != "layers.0.mlp.down.weight":
            return each
        zeros = torch.zeros_like(each)
        zeros[-1, -1] = 1e-30
        return zeros

    model = folds.changed(random_model(MODELS["plain"]), nearly)
    assert drop_zero_sublayers(model).reports[-1].removed == ()


def test_zero_without_residual_stays() -> None:
    spec = model_of([(ATTENTION, replace(PLAIN_MLP, residual=False), False)])
    model = folds.changed(random_model(spec), lambda name, each: each * (0 if "down" in name else 1))
    pruned = drop_zero_sublayers(model)
    assert pruned.spec == spec
    assert pruned.reports[-1].notes == ("mlp 0: gives zeros, but the stream does not pass it unchanged",)


def test_only_what_can_show_it_is_read(tmp_path: Path) -> None:
    """A scaled merge of mergekit, in files: of matrices that are not zero one row is read."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**TINY)).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.2.mlp.down_proj.weight"
    tensors[name] = tensors[name] * 0
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    model = read_model(tmp_path)
    pruned = drop_zero_sublayers(model)
    assert pruned.reports[-1].removed == ("mlp 2",)
    hidden, ffn, layers = TINY["hidden_size"], TINY["intermediate_size"], TINY["num_hidden_layers"]
    rows = layers * (hidden + ffn) * 4
    assert model.bytes_read == rows + hidden * ffn * 4


def test_bias_of_a_post_norm_keeps_the_sublayer() -> None:
    post = (replace(ATTENTION, post=rms(bias=True)), replace(PLAIN_MLP, post=rms(bias=True)))

    def silence(weight: str, each: torch.Tensor) -> torch.Tensor:
        silent = weight.endswith(("attention.o.weight", "mlp.post.weight"))
        return torch.zeros_like(each) if silent or weight == "layers.1.mlp.post.bias" else each

    model = folds.changed(random_model(model_of([(*post, False)] * 2)), silence)
    pruned = drop_zero_sublayers(model)
    assert pruned.reports[-1].removed == ("mlp 1",)
    folds.assert_same(pruned, model, limit=1e-14)
