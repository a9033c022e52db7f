"""Families are tables: a made-up one takes a few lines, and what a table cannot honour is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from pyruntime.checkpoint import families, read_model
from pyruntime.checkpoint.families import FAMILIES, Family
from pyruntime.checkpoint.families.decoder import Decoder, Key, Window
from pyruntime.checkpoint.families.family import Fused
from pyruntime.checkpoint.fields import Fields
from pyruntime.errors import UsageError
from pyruntime.graph import build, fuse
from pyruntime.plan import lower
from pyruntime.spec import Activation, ModelSpec, NormKind, weight_shapes
from tests import naive
from tests.families import LONGROPE, SIZES
from tests.helpers import TARGETS, all_logits, relative_error
from tests.specs import as_arrays, random_weights

CONFIG: dict[str, Any] = {**SIZES, "num_key_value_heads": 2, "model_type": "quokka", "eps": 1e-4, "reach": 5}
# a whole new architecture: no class of transformers, names of its own, keys and values in one tensor, head by head
QUOKKA = Family(
    model_types=("quokka",),
    decoder=Decoder(
        norm=NormKind.LAYER,
        norm_eps=Key("eps"),
        activation=Key("act", Activation.GELU),
        qkv_bias=True,
        sub_norms=True,
        parallel=Key("side_by_side", True),
        window=Window(Key("reach"), lambda fields, index: index == 1),
        scaled_embedding=True,
    ),
    names={
        "embedding": "wte",
        "final_norm": "out.norm",
        "head": "out.map",
        **{f"layers.{{}}.attention.{role}": f"blocks.{{}}.att.{role}" for role in ("pre", "q", "sub", "o")},
        **{f"layers.{{}}.attention.{role}": "blocks.{}.att.kv" for role in ("k", "v")},
        **{f"layers.{{}}.mlp.{role}": f"blocks.{{}}.ff.{role}" for role in ("pre", "gate", "up", "sub", "down")},
    },
    fused=(Fused(("attention.k", "attention.v"), interleaved=True),),
    harmless=frozenset({"pad_token_id"}),
)


def stored(spec: ModelSpec, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights under the names that a checkpoint of the made-up family has."""
    found = {}
    for name, weight in weights.items():
        end = name.rpartition(".")[2]
        match name.split("."):
            case ["layers", index, "attention", "k", _]:
                values = weights[f"layers.{index}.attention.v.{end}"]
                heads = [torch.cat(pair) for pair in zip(weight.chunk(2), values.chunk(2), strict=True)]
                found[f"blocks.{index}.att.kv.{end}"] = torch.cat(heads)
            case ["layers", index, "attention", role, _] if role != "v":
                found[f"blocks.{index}.att.{role}.{end}"] = weight
            case ["layers", index, "mlp", role, _]:
                found[f"blocks.{index}.ff.{role}.{end}"] = weight
    ends = {"embedding.weight": "wte.weight", "final_norm.weight": "out.norm.weight", "head.weight": "out.map.weight"}
    return found | {file_name: weights[name] for name, file_name in ends.items()}


@pytest.mark.parametrize("target", TARGETS)
def test_a_made_up_family_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str) -> None:
    monkeypatch.setitem(families.FAMILIES, "quokka", QUOKKA)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    spec = QUOKKA.spec(Fields(CONFIG))
    weights = random_weights(spec, torch.float32)
    save_file(stored(spec, weights), tmp_path / "model.safetensors")
    model = read_model(tmp_path)
    assert model.notes == ()
    tokens = [(7 * i * i + 3 * i) % 61 for i in range(37)]
    expected = torch.from_numpy(naive.logits(spec, as_arrays(weights), tokens))
    (found,) = all_logits(lower(fuse(build(model.spec)), model, target=target), [tokens], 7)
    assert relative_error(found, expected) < 1e-5


def test_the_made_up_family_is_what_its_configuration_says() -> None:
    spec = QUOKKA.spec(Fields(CONFIG))
    windows = [attention.window for _, attention in spec.attentions()]
    assert windows == [None, 5, None, None]
    assert all(layer.parallel for layer in spec.layers)
    assert spec.embedding.scale == pytest.approx(32**0.5)
    assert weight_shapes(spec)["layers.2.attention.sub.weight"] == (32,)
    assert spec.family == "quokka"


LONG = {"rope_parameters": LONGROPE}


@pytest.mark.parametrize(
    "model_type, changes, words",
    [
        ("qwen2", {"layer_types": ["full_attention"] * 3}, ["layer_types", "4"]),
        ("qwen2", {"layer_types": "full_attention"}, ["layer_types", "4"]),
        ("qwen3", {"layer_types": ["full_attention"] * 3 + ["chunked_attention"]}, ["chunked_attention", "supported"]),
        ("mistral", {"sliding_window": -1}, ["sliding_window", "-1"]),
        ("mistral", {"sliding_window": True}, ["sliding_window", "True"]),
        ("mistral", {"partial_rotary_factor": 0.5}, ["partial_rotary_factor"]),
        ("gemma2", {"use_bidirectional_attention": True}, ["use_bidirectional_attention"]),
        ("gemma2", {"final_logit_softcapping": "30"}, ["final_logit_softcapping"]),
        ("gemma2", {"query_pre_attn_scalar": 0}, ["query_pre_attn_scalar"]),
        ("gemma3_text", {"rope_parameters": {"rope_theta": 5.0}}, ["rope_theta", "sliding_attention"]),
        ("gemma3_text", {"rope_parameters": {"full_attention": 3}}, ["full_attention"]),
        ("mistral", {"rope_parameters": {"full_attention": {"rope_theta": 5.0}}}, ["layer type"]),
        ("phi3", {"rope_parameters": {**LONGROPE, "short_factor": [1.0]}}, ["short_factor", "4"]),
        ("phi3", {"rope_parameters": {**LONGROPE, "long_factor": None}}, ["long_factor", "4"]),
        ("phi3", {"rope_parameters": {**LONGROPE, "short_factor": [1.0, 1.0, 0.0, 1.0]}}, ["short_factor"]),
        ("phi3", {"rope_parameters": {**LONGROPE, "long_factor": [1.0, 1.0, "2", 1.0]}}, ["long_factor"]),
        ("gpt_neox", {"rotary_pct": 1.5}, ["rotary_pct"]),
        ("gpt_neox", {"use_parallel_residual": 1}, ["use_parallel_residual"]),
        ("nemotron", {"hidden_act": "swiglu"}, ["hidden_act", "relu2"]),
    ],
)
def test_what_a_family_cannot_honour_is_refused_by_name(
    model_type: str, changes: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(UsageError) as caught:
        FAMILIES[model_type].spec(Fields({**SIZES, "model_type": model_type, **changes}))
    assert caught.value.code in ("CONFIG", "SPEC")
    assert all(word in str(caught.value) for word in words)


def test_longrope_ends_where_it_would_change_cached_keys() -> None:
    config = {**SIZES, "model_type": "phi3", "original_max_position_embeddings": 48, **LONG}
    assert FAMILIES["phi3"].spec(Fields(config)).max_position == 48
