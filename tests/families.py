"""Tiny random models of every family in Hugging Face form, and their transformers twins without what is dropped."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers

from pyruntime.spec import DropPlan
from tests.helpers import silence

NUM_LAYERS = 4
SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# windows narrower than the sequences, in pages of 4 and of 16
WINDOW = 5
LONGROPE: dict[str, Any] = {
    "rope_type": "longrope",
    "rope_theta": 500.0,
    "short_factor": [1.0, 1.3, 1.7, 2.5],
    "long_factor": [2.0, 3.0, 4.0, 5.0],
}
_QWEN: dict[str, Any] = {"moe_intermediate_size": 20, "shared_expert_intermediate_size": 24}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}


# dense, and of mixtures: all experts in one tensor, and the one that all tokens pass
_MLPS = ("mlp.down_proj", "mlp.experts", "mlp.shared_expert.down_proj")


@dataclass(frozen=True)
class Variant:
    """One configuration of a family.

    `stored` are keys that config.json holds instead of what transformers writes today, where `...` removes; where
    `bare`, it holds nothing but sizes, so that every default counts. `outputs` are the last maps of attention and of
    MLP, whichever of them a layer has: zeros there silence the sublayer.
    """

    name: str
    config: dict[str, Any] = field(default_factory=dict)
    stored: dict[str, Any] = field(default_factory=dict)
    layers: str = "model.layers"
    outputs: tuple[tuple[str, ...], tuple[str, ...]] = (("self_attn.o_proj",), _MLPS)
    bare: bool = False


def _neox(stored: dict[str, Any] | None = None, **config: Any) -> Variant:
    return Variant("GPTNeoX", config, stored or {}, "gpt_neox.layers", (("attention.dense",), ("mlp.dense_4h_to_h",)))


def _gpt2(stored: dict[str, Any] | None = None, **config: Any) -> Variant:
    own: dict[str, Any] = {"intermediate_size": ..., **config}
    return Variant("GPT2", own, stored or {}, "transformer.h", (("attn.c_proj",), ("mlp.c_proj",)))


def _grouped(name: str, stored: dict[str, Any] | None = None, **config: Any) -> Variant:
    return Variant(name, {"num_key_value_heads": 2, **config}, stored or {})


VARIANTS: dict[str, Variant] = {
    "mistral": _grouped("Mistral", sliding_window=WINDOW),
    "mistral without window": _grouped("Mistral", sliding_window=None, head_dim=12),
    "mistral, old keys": _grouped(
        "Mistral", {"sliding_window": ..., "rope_parameters": ..., "rope_theta": 500.0, "head_dim": ...}
    ),
    "qwen2": _grouped("Qwen2"),
    "qwen2 with windows": _grouped("Qwen2", use_sliding_window=True, sliding_window=WINDOW, max_window_layers=2),
    "qwen2 with windows, old keys": _grouped(
        "Qwen2",
        {"layer_types": ..., "rope_parameters": ..., "rope_scaling": YARN},
        use_sliding_window=True,
        sliding_window=WINDOW,
        max_window_layers=3,
    ),
    "qwen2 whose windows are switched off": _grouped("Qwen2", {"sliding_window": WINDOW, "max_window_layers": 0}),
    "qwen3": _grouped("Qwen3", head_dim=12, tie_word_embeddings=True),
    "qwen3 with biases and windows": _grouped(
        "Qwen3",
        head_dim=10,
        attention_bias=True,
        use_sliding_window=True,
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention", "full_attention", "sliding_attention"],
    ),
    "phi3": _grouped("Phi3", sliding_window=WINDOW),
    "phi3 multi-head, partial rope": Variant(
        "Phi3", {"rope_parameters": {"rope_theta": 500.0, "partial_rotary_factor": 0.75}}
    ),
    "phi3 longrope": _grouped("Phi3", rope_parameters=LONGROPE, original_max_position_embeddings=48),
    "phi3 longrope, old keys": _grouped(
        "Phi3",
        {
            "rope_parameters": ...,
            "rope_theta": 500.0,
            "rope_scaling": {"type": "longrope", **{key: LONGROPE[key] for key in ("short_factor", "long_factor")}},
        },
        original_max_position_embeddings=48,
    ),
    "gemma2": _grouped(
        "Gemma2",
        head_dim=12,
        sliding_window=WINDOW,
        query_pre_attn_scalar=20,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=3.0,
    ),
    "gemma2, old keys": _grouped(
        "Gemma2",
        {"layer_types": ..., "rope_parameters": ..., "tie_word_embeddings": ..., "hidden_act": "relu"},
        head_dim=8,
        sliding_window=WINDOW,
    ),
    "gemma2 with biases, no caps": _grouped(
        "Gemma2",
        head_dim=8,
        sliding_window=WINDOW,
        attention_bias=True,
        attn_logit_softcapping=None,
        final_logit_softcapping=None,
        tie_word_embeddings=False,
    ),
    "gemma3": _grouped(
        "Gemma3",
        head_dim=12,
        sliding_window=WINDOW,
        query_pre_attn_scalar=20,
        layer_types=["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 3.0, "rope_theta": 5000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
        },
    ),
    "gemma3, old keys": _grouped(
        "Gemma3",
        {
            "layer_types": ...,
            "rope_parameters": ...,
            "_sliding_window_pattern": ...,
            "sliding_window_pattern": 2,
            "rope_theta": 5000.0,
            "rope_local_base_freq": 50.0,
            "rope_scaling": {"rope_type": "linear", "factor": 3.0},
        },
        head_dim=12,
        sliding_window=WINDOW,
        final_logit_softcapping=3.0,
    ),
    "gpt_neox": _neox(rotary_pct=0.5),
    "gpt_neox, old keys": _neox({"rope_parameters": ..., "rotary_pct": 0.75, "rotary_emb_base": 500}),
    "gpt_neox serial, no biases": _neox(use_parallel_residual=False, attention_bias=False, hidden_act="gelu_new"),
    "bitnet": _grouped("BitNet", hidden_act="silu"),
    "bitnet, squared relu": _grouped("BitNet", {"rope_parameters": ...}),
    "nemotron": _grouped("Nemotron", head_dim=12),
    "nemotron with biases, old keys": _grouped(
        "Nemotron",
        {"rope_parameters": ..., "partial_rotary_factor": 1.0, "rope_theta": 500.0, "head_dim": ...},
        attention_bias=True,
        mlp_bias=True,
    ),
    "olmo2": _grouped("Olmo2"),
    "olmo2 with biases, old keys": _grouped(
        "Olmo2", {"rope_parameters": ..., "rope_theta": 500.0}, attention_bias=True, tie_word_embeddings=True
    ),
    "gpt2": _gpt2(n_inner=40),
    "gpt2 scaled by layer": _gpt2(
        scale_attn_by_inverse_layer_idx=True, scale_attn_weights=False, activation_function="relu"
    ),
    "gpt2, bare": replace(_gpt2(), bare=True),
    "mixtral": _grouped("Mixtral", num_local_experts=5, num_experts_per_tok=3),
    "mixtral with a window, old keys": _grouped(
        "Mixtral", {"rope_parameters": ..., "head_dim": ...}, sliding_window=WINDOW, num_local_experts=4
    ),
    "qwen2_moe": _grouped("Qwen2Moe", **_QWEN, num_experts=6, norm_topk_prob=True, mlp_only_layers=[1]),
    "qwen2_moe with windows, every other layer dense": _grouped(
        "Qwen2Moe",
        {"layer_types": ..., "sliding_window": WINDOW},
        **_QWEN,
        num_experts=4,
        num_experts_per_tok=1,
        decoder_sparse_step=2,
        qkv_bias=False,
        use_sliding_window=True,
        sliding_window=WINDOW,
        max_window_layers=3,
    ),
}
MIXTURES = ("Mixtral", "Qwen2Moe")


VARIANTS |= {
    f"{name}, bare": replace(VARIANTS[name], config={"num_key_value_heads": 2}, bare=True)
    for name in "mistral qwen2 qwen3 phi3 gemma2 gemma3 bitnet nemotron olmo2".split()
} | {"gpt_neox, bare": replace(VARIANTS["gpt_neox"], config={}, bare=True)}


def make(variant: Variant, folder: Path) -> Any:
    """The transformers model of `variant` with random weights, as transformers reads it from `folder`."""
    prefix = "Gemma3Text" if variant.name == "Gemma3" else variant.name
    sizes = {key: value for key, value in (SIZES | variant.config).items() if value is not ...}
    config = getattr(transformers, f"{prefix}Config")(**sizes)
    torch.manual_seed(0)
    end = "LMHeadModel" if variant.name == "GPT2" else "ForCausalLM"
    model = getattr(transformers, f"{variant.name}{end}")._from_config(config)
    # where the gain is 1 + weight, the weight is about zero
    gain = 0.0 if prefix.startswith(("Gemma", "Nemotron")) else 1.0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # transformers starts with gains of one and biases of zero, which would hide mistakes
            spread = 0.15 if parameter.dim() > 1 else 0.3
            parameter.copy_(torch.randn_like(parameter) * spread + (gain if "norm" in name or ".ln_" in name else 0.0))
    model.save_pretrained(folder)
    whole = {**json.loads((folder / "config.json").read_text()), **variant.stored}
    if variant.bare:
        whole = sizes | {"model_type": whole["model_type"]}
    (folder / "config.json").write_text(json.dumps({key: value for key, value in whole.items() if value is not ...}))
    plain = {"experts_implementation": "eager"} if variant.name in MIXTURES else {}
    return type(model).from_pretrained(folder, attn_implementation="eager", **plain).eval()


def without(variant: Variant, hf_model: Any, plan: DropPlan) -> Any:
    """A copy of the model whose dropped sublayers add exactly zero to the stream."""
    pruned = copy.deepcopy(hf_model)
    layers: Sequence[Any] = pruned.get_submodule(variant.layers)
    for indices, outputs in zip((plan.attention, plan.mlp), variant.outputs, strict=True):
        for layer in (layers[index] for index in indices):
            found = [module for name, module in layer.named_modules() if name in outputs]
            assert found
            for module in found:
                _silence(module)
    return pruned


def _silence(module: Any) -> None:
    """A linear map of either kind, or the experts of a mixture."""
    if hasattr(module, "weight"):
        silence(module)
        return
    with torch.no_grad():
        module.down_proj.zero_()
