"""Tiny random checkpoints of models that transformers has no class for, as their authors store them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.families import NUM_LAYERS, SIZES

Shapes = dict[str, tuple[int, ...]]
WIDTH, FFN, HEADS, VOCAB = (
    SIZES[key] for key in ("hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
)
HEAD_DIM = WIDTH // HEADS
BASE: dict[str, Any] = {**SIZES, "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "hidden_act": "silu"}
# models with ALiBi say how long they are under another name
_ALIBI = {key: value for key, value in BASE.items() if key != "max_position_embeddings"} | {"model_max_length": 64}
_DEEPSEEK = {
    **BASE,
    "model_type": "deepseek",
    "num_key_value_heads": 2,
    "n_routed_experts": 5,
    "n_shared_experts": 2,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 12,
    "moe_layer_freq": 1,
    "first_k_dense_replace": 1,
    "scoring_func": "softmax",
    "aux_loss_alpha": 0.001,
    "seq_aux": True,
    "norm_topk_prob": False,
}
_LLAMA = {**BASE, "model_type": "llama", "num_key_value_heads": HEADS}

CONFIGS: dict[str, dict[str, Any]] = {
    "baichuan 7b": {**BASE, "model_type": "baichuan"},
    "baichuan2 7b": {**BASE, "model_type": "baichuan", "z_loss_weight": 0},
    "baichuan 13b": {**_ALIBI, "model_type": "baichuan"},
    "baichuan2 13b, 6 heads": {
        **_ALIBI,
        "model_type": "baichuan",
        "z_loss_weight": 0,
        "hidden_size": 36,
        "num_attention_heads": 6,
    },
    "deepseek": _DEEPSEEK,
    "deepseek, normalized, every other layer dense": {
        **_DEEPSEEK,
        "norm_topk_prob": True,
        "first_k_dense_replace": 0,
        "moe_layer_freq": 2,
        "n_shared_experts": None,
    },
    "deepseek, experts dropped by layer": {**_DEEPSEEK, "n_routed_experts": [None, 5, 2, 3]},
}


def shapes_of(config: Mapping[str, Any]) -> Shapes:
    """The tensors that the authors' code stores for `config`."""
    width = config["hidden_size"]
    found: Shapes = {
        "model.embed_tokens.weight": (VOCAB, width),
        "model.norm.weight": (width,),
        "lm_head.weight": (VOCAB, width),
    }
    for index in range(NUM_LAYERS):
        prefix = f"model.layers.{index}."
        own = {**_attention(config), **_mlp(config, index)}
        own |= {"input_layernorm.weight": (width,), "post_attention_layernorm.weight": (width,)}
        found |= {prefix + name: shape for name, shape in own.items()}
    return found


def _attention(config: Mapping[str, Any]) -> Shapes:
    width = config["hidden_size"]
    o: Shapes = {"self_attn.o_proj.weight": (width, width)}
    if config["model_type"] == "baichuan":
        return o | {"self_attn.W_pack.weight": (3 * width, width)}
    kv = config["num_key_value_heads"] * width // config["num_attention_heads"]
    rows = {"q": width, "k": kv, "v": kv}
    return o | {f"self_attn.{role}_proj.weight": (count, width) for role, count in rows.items()}


def _mlp(config: Mapping[str, Any], index: int) -> Shapes:
    first, every = config.get("first_k_dense_replace", 0), config.get("moe_layer_freq", 1)
    if "n_routed_experts" not in config or index < first or index % every:
        return gated("mlp", config["hidden_size"], config["intermediate_size"])
    width, own = config["hidden_size"], config["moe_intermediate_size"]
    count = config["n_routed_experts"]
    count = count[index] if isinstance(count, list) else count
    found: Shapes = {"mlp.gate.weight": (count, width)}
    for expert in range(count):
        found |= gated(f"mlp.experts.{expert}", width, own)
    return found | (gated("mlp.shared_experts", width, own * 2) if config["n_shared_experts"] else {})


def gated(name: str, width: int, ffn: int, out: int | None = None) -> Shapes:
    """Shapes of a gated MLP."""
    sizes = {"gate": (ffn, width), "up": (ffn, width), "down": (out or width, ffn)}
    return {f"{name}.{role}_proj.weight": shape for role, shape in sizes.items()}


def random_tensors(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """Values in the order of the names: gains about one, biases that show."""
    generator = torch.Generator().manual_seed(0)

    def value(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        spread, middle = (0.2, 0.0) if len(shape) > 1 else (0.3, 1.0 if "norm" in name else 0.0)
        return torch.randn(shape, generator=generator) * spread + middle

    return {name: value(name, shape) for name, shape in sorted(shapes.items())}


def write(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Path:
    """The checkpoint folder."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(dict(config)))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return folder


def llama_shapes() -> Shapes:
    """A Llama with as many key-value heads as heads."""
    return shapes_of(_LLAMA)


LLAMA = _LLAMA
