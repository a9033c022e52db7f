"""Families are tables: a made-up one takes a few lines, and what a table cannot honour is refused by name."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file

from pyruntime.checkpoint import families, read_model
from pyruntime.checkpoint.families import FAMILIES, Family
from pyruntime.checkpoint.families.decoder import ACTIVATIONS, Decoder, Window
from pyruntime.checkpoint.families.family import Fused
from pyruntime.checkpoint.families.keys import Key
from pyruntime.checkpoint.fields import Fields
from pyruntime.errors import UsageError
from pyruntime.graph import build, fuse
from pyruntime.plan import lower
from pyruntime.spec import (
    MLP,
    Activation,
    Attention,
    Embedding,
    Head,
    Layer,
    Linear,
    ModelSpec,
    Norm,
    NormKind,
    Rope,
    RopeKind,
)
from tests import naive
from tests.families import LONGROPE, SIZES, YARN
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
    norm = Norm(kind=NormKind.LAYER, size=32, eps=1e-4)
    attention = Attention(
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        q=Linear(in_features=32, out_features=32, bias=True),
        k=Linear(in_features=32, out_features=16, bias=True),
        v=Linear(in_features=32, out_features=16, bias=True),
        o=Linear(in_features=32, out_features=32),
        scale=8**-0.5,
        rope=Rope(kind=RopeKind.DEFAULT, dim=8, theta=10000.0),
        pre=norm,
        sub=norm,
    )
    wide = Linear(in_features=32, out_features=56)
    mlp = MLP(
        gate=wide,
        up=wide,
        down=Linear(in_features=56, out_features=32),
        activation=Activation.GELU,
        pre=norm,
        sub=replace(norm, size=56),
    )
    layers = [Layer(index=i, attention=attention, mlp=mlp, parallel=True) for i in range(4)]
    layers[1] = replace(layers[1], attention=replace(attention, window=5))
    assert spec == ModelSpec(
        family="quokka",
        embedding=Embedding(vocab_size=61, size=32, scale=32**0.5),
        layers=tuple(layers),
        final_norm=norm,
        head=Head(linear=Linear(in_features=32, out_features=61), tied=False),
        max_position=64,
    )


CLASSES: dict[str, Any] = {
    "llama": transformers.LlamaConfig,
    "mistral": transformers.MistralConfig,
    "qwen2": transformers.Qwen2Config,
    "qwen3": transformers.Qwen3Config,
    "phi3": transformers.Phi3Config,
    "gemma2": transformers.Gemma2Config,
    "gemma3_text": transformers.Gemma3TextConfig,
    "gpt_neox": transformers.GPTNeoXConfig,
    "bitnet": transformers.BitNetConfig,
    "nemotron": transformers.NemotronConfig,
    "olmo2": transformers.Olmo2Config,
    "gpt2": transformers.GPT2Config,
    "mixtral": transformers.MixtralConfig,
    "qwen2_moe": transformers.Qwen2MoeConfig,
}


@pytest.mark.parametrize("model_type", CLASSES)
def test_defaults_are_those_of_transformers(model_type: str) -> None:
    """Every value that a table takes for an absent key, beside the attribute of transformers' own configuration."""
    decoder, judge = FAMILIES[model_type].decoder, CLASSES[model_type]()
    tables: list[Any] = [decoder] if decoder.experts is None else [decoder, decoder.experts]
    for key in (getattr(table, field.name) for table in tables for field in dataclasses.fields(table)):
        # a width that is required has no default
        if isinstance(key, Key) and key.name != "intermediate_size":
            expected = getattr(judge, key.name)
            assert key.default == (ACTIVATIONS[expected] if isinstance(key.default, Activation) else expected), key
    assert decoder.tied == judge.tie_word_embeddings
    assert decoder.max_position in (None, judge.max_position_embeddings)
    if decoder.head_dim is not None:
        assert decoder.head_dim == judge.head_dim
    if decoder.rope is None:
        assert not hasattr(judge, "rope_parameters")
        return
    ropes = judge.rope_parameters
    whole = ropes.get("full_attention", ropes)
    assert decoder.rope.default_theta == whole["rope_theta"]
    assert decoder.rope.default_fraction == whole.get("partial_rotary_factor", 1.0)
    if "sliding_attention" in ropes:
        assert decoder.rope.default_local_theta == ropes["sliding_attention"]["rope_theta"]
    assert decoder.rope.trained_context == getattr(judge, "original_max_position_embeddings", None)


@pytest.mark.parametrize("model_type", CLASSES)
def test_layers_slide_where_those_of_transformers_do(model_type: str) -> None:
    """40 layers, so that Qwen's 28 full ones and Gemma 3's pattern of six show."""
    sizes = SIZES | {"num_hidden_layers": 40}
    switched = {"use_sliding_window": True} if model_type.startswith("qwen") else {}
    judge = CLASSES[model_type](**sizes, **switched)
    window = getattr(judge, "sliding_window", None)
    kinds = getattr(judge, "layer_types", None) or ["sliding_attention"] * 40
    spec = FAMILIES[model_type].spec(Fields(sizes | switched | {"model_type": model_type}))
    expected = [window if kind == "sliding_attention" else None for kind in kinds]
    assert [attention.window for _, attention in spec.attentions()] == expected


LONG = {"rope_parameters": LONGROPE}
OUTER = {"original_max_position_embeddings": 16}
ALL_FULL = {"layer_types": ["full_attention"] * 4}


@pytest.mark.parametrize(
    "model_type, changes, words",
    [
        ("qwen2", {"layer_types": ["full_attention"] * 3}, ["layer_types", "4"]),
        ("qwen2", {"layer_types": "full_attention"}, ["layer_types", "4"]),
        ("qwen3", {"layer_types": ["full_attention"] * 3 + ["chunked_attention"]}, ["chunked_attention", "supported"]),
        ("mistral", {"sliding_window": -1}, ["sliding_window", "-1"]),
        ("mistral", {"sliding_window": True}, ["sliding_window", "True"]),
        ("mistral", {"partial_rotary_factor": 0.5}, ["partial_rotary_factor"]),
        ("qwen2", {"layer_types": ["sliding_attention"] * 4}, ["slides", "sliding_window"]),
        ("gemma2", {"sliding_window": None}, ["slides", "sliding_window"]),
        ("llama", {"is_causal": False}, ["is_causal"]),
        ("llama", {"partial_rotary_factor": 0.5}, ["partial_rotary_factor"]),
        ("llama", {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, ["partial_rotary_factor"]),
        ("llama", {"hidden_act": None}, ["hidden_act", "null"]),
        ("llama", {"rope_scaling": {"rope_type": "yarn"}}, ["rope_scaling", "factor", "required"]),
        ("llama", {"rope_scaling": {"factor": 2.0}}, ["factor", "rope_type"]),
        ("llama", {**OUTER, "rope_scaling": {**YARN, "original_max_position_embeddings": 32}}, ["16", "32"]),
        ("phi3", {"rope_parameters": {**LONGROPE, "original_max_position_embeddings": 48}}, ["4096", "48"]),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, ["attn_logit_softcapping"]),
        ("gemma3_text", {"rope_scaling": {"type": "linear", "factor": 2.0}, **ALL_FULL}, ["rope_type"]),
        ("gemma3_text", {"rope_parameters": {"full_attention": {"rope_theta": -1.0}}}, ["rope_theta"]),
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


def test_phi3_was_trained_on_4096_tokens_unless_it_says_otherwise() -> None:
    """transformers' factor of the angles is sqrt(1 + ln(8192 / 4096) / ln(4096)) then, and the context 4096."""
    spec = FAMILIES["phi3"].spec(Fields({**SIZES, "model_type": "phi3", "max_position_embeddings": 8192, **LONG}))
    assert spec.max_position == 4096
    (factor,) = {a.rope and a.rope.attention_factor for _, a in spec.attentions()}
    assert factor == pytest.approx(math.sqrt(1 + math.log(2) / math.log(4096)))


def test_longrope_ends_where_it_would_change_cached_keys() -> None:
    config = {**SIZES, "model_type": "phi3", "original_max_position_embeddings": 48, **LONG}
    assert FAMILIES["phi3"].spec(Fields(config)).max_position == 48
