"""Writes seeds/: tiny checkpoints as transformers would save them, each a config.json and the shapes of its tensors.

Run `python -m tests.fuzz.make_seeds` after adding a line below. Nothing here comes from our own reader.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any, Final

SEEDS: Final = Path(__file__).parent / "seeds"

_SIZES: Final[dict[str, Any]] = {
    "vocab_size": 7,
    "hidden_size": 8,
    "intermediate_size": 6,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 16,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_LLAMA3: Final = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8,
}
_YARN: Final = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8, "beta_fast": 20.0, "mscale": 1.0}
_TYPES: Final = (
    "mistral qwen2 qwen3 gemma2 gemma3_text phi3 gpt_neox nemotron bitnet olmo2 gpt2 mixtral qwen2_moe".split()
)
# a quarter of so small a head is no pair that could turn; GPT-NeoX has as many key heads as heads
_MORE: Final[dict[str, dict[str, Any]]] = {
    "gpt_neox": {"rotary_pct": 0.5, "num_key_value_heads": 2},
    "gpt2": {"n_inner": 6, "intermediate_size": None, "num_key_value_heads": None, "head_dim": None},
    "mixtral": {"num_local_experts": 2},
    "qwen2_moe": {
        "num_hidden_layers": 2,
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 3,
        "shared_expert_intermediate_size": 5,
        "decoder_sparse_step": 2,
    },
}
# seeds of type llama: what their config.json says beyond the sizes
_LLAMAS: Final[dict[str, dict[str, Any]]] = {
    "llama": {"tie_word_embeddings": False, "attention_bias": True},
    "llama-tied": {"tie_word_embeddings": True, "head_dim": 2, "rope_theta": 500.0, "rope_scaling": _LLAMA3},
    "llama-yarn": {"rope_theta": 1e4, "rope_scaling": _YARN, "hidden_act": "gelu", "mlp_bias": True},
    "llama-drop-lists": {"num_hidden_layers": 3, "drop_attn_list": [2, 0], "drop_mlp_list": [False, True, False]},
    "llama-layer-lists": {
        "num_hidden_layers": 2,
        "layer_inter_size": [6, 6],
        "num_key_value_heads_per_layer": [1, 1],
    },
    "llama-per-layer": {
        "num_hidden_layers": 2,
        "per_layer_config": {"1": {"skip": ["attention"], "intermediate_size": 6}, "0": {"num_key_value_heads": 1}},
    },
}
_DECI: Final[dict[str, Any]] = {
    "model_type": "nemotron-nas",
    "num_hidden_layers": 2,
    "num_key_value_heads": None,
    "intermediate_size": None,
    "block_configs": [
        {
            "attention": {"n_heads_in_group": 2, "no_op": False, "replace_with_linear": False},
            "ffn": {"ffn_mult": 1.0, "no_op": False, "replace_with_linear": False},
        },
        {
            "attention": {"n_heads_in_group": None, "no_op": True, "replace_with_linear": False},
            "ffn": {"ffn_mult": 1.0, "no_op": False, "replace_with_linear": False},
        },
    ],
}
_PUZZLETRON: Final[dict[str, Any]] = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "block_configs": [
        {
            "attention": {"num_key_value_heads": 1, "no_op": False, "replace_with_linear": False},
            "ffn": {"intermediate_size": 6, "no_op": False, "replace_with_linear": False},
        },
        {"subblock_configs": [{"kind": "attention", "no_op": True}, {"kind": "ffn", "intermediate_size": 6}]},
    ],
}
# models that transformers does not have: keys beyond the sizes, and what is stored in place of a Llama's tensors
_QKV: Final = ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight")
_NORMS: Final = ("input_layernorm.weight", "post_attention_layernorm.weight")
_Shapes = dict[str, list[int]]
_OTHERS: Final[dict[str, tuple[dict[str, Any], tuple[str, ...], _Shapes]]] = {
    "baichuan": (
        {"model_type": "baichuan", "max_position_embeddings": None, "model_max_length": 16, "z_loss_weight": 0},
        _QKV,
        {"self_attn.W_pack.weight": [24, 8]},
    ),
    "deepseek": (
        {
            "model_type": "deepseek",
            "n_routed_experts": [1],
            "num_experts_per_tok": 1,
            "moe_intermediate_size": 3,
            "n_shared_experts": 2,
        },
        ("mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight"),
        {
            "mlp.gate.weight": [1, 8],
            **{f"mlp.experts.0.{role}_proj.weight": [3, 8] for role in ("gate", "up")},
            "mlp.experts.0.down_proj.weight": [8, 3],
            **{f"mlp.shared_experts.{role}_proj.weight": [6, 8] for role in ("gate", "up")},
            "mlp.shared_experts.down_proj.weight": [8, 6],
        },
    ),
    "llama-flap": (
        {"model_type": "llama"},
        (),
        {
            **{name: [4, 8] for name in _QKV},
            "self_attn.o_proj.weight": [8, 4],
            "self_attn.o_proj.bias": [8],
            "mlp.down_proj.bias": [8],
        },
    ),
    "llama-slicegpt": (
        {"model_type": "llama"},
        ("input_layernorm.weight",),
        {
            **{name: [8, 6] for name in _QKV},
            "self_attn.o_proj.weight": [5, 8],
            **{f"mlp.{role}_proj.weight": [6, 5] for role in ("gate", "up")},
            "post_attention_layernorm.weight": [1],
            "attn_shortcut_Q": [6, 5],
            "mlp_shortcut_Q": [5, 8],
        },
    ),
    "llama-flashnorm": ({"model_type": "llama", "flashnorm": True, "flashnorm_mode": "strict"}, _NORMS, {}),
}


def main() -> None:
    """Write every seed."""
    for name, more in _LLAMAS.items():
        # a configuration as old checkpoints have it, so that both styles are seeds
        _write(name, {"model_type": "llama", **_SIZES, "rms_norm_eps": 1e-5, **more}, _saved("llama", more)[1])
    for model_type in _TYPES:
        _write(model_type, *_saved(model_type, _MORE.get(model_type, {})))
    absent = ("model.layers.1.self_attn", "model.layers.1.input_layernorm")
    for name, blocks, width in (("nemotron-nas", _DECI, 256), ("puzzletron", _PUZZLETRON, 6)):
        _, stored = _saved("llama", {"num_hidden_layers": 2, "intermediate_size": width})
        kept = {tensor: shape for tensor, shape in stored.items() if not tensor.startswith(absent)}
        _write(name, {**_SIZES, "rms_norm_eps": 1e-5, **blocks}, kept)
    for name, (keys, gone, new) in _OTHERS.items():
        _, stored = _saved("llama", {"num_key_value_heads": 2})
        layer = "model.layers.0."
        kept = {tensor: shape for tensor, shape in stored.items() if tensor.removeprefix(layer) not in gone}
        kept |= {layer + tensor: shape for tensor, shape in new.items()}
        if name == "llama-slicegpt":
            del kept["model.norm.weight"]
            kept["model.embed_tokens.weight"] = [7, 6]
        _write(name, {**_SIZES, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, **keys}, kept)


def _saved(model_type: str, more: dict[str, Any]) -> tuple[dict[str, Any], dict[str, list[int]]]:
    """config.json and the shapes of the stored tensors, both as transformers writes them."""
    # imported here: nobody but this script waits for it
    from transformers import AutoConfig, AutoModelForCausalLM

    # what transformers does not know, or would write in its own way
    known = {key: value for key, value in more.items() if not isinstance(value, list | dict) and key != "rope_theta"}
    config = AutoConfig.for_model(model_type, **{**_SIZES, "head_dim": 4, **known})
    with tempfile.TemporaryDirectory() as folder:
        model: Any = AutoModelForCausalLM
        model.from_config(config).save_pretrained(folder)
        file = (Path(folder) / "model.safetensors").read_bytes()
        written = json.loads((Path(folder) / "config.json").read_text())
    header = json.loads(file[8 : 8 + int.from_bytes(file[:8], "little")])
    return written, {name: entry["shape"] for name, entry in header.items() if name != "__metadata__"}


def _write(name: str, config: dict[str, Any], tensors: dict[str, list[int]]) -> None:
    SEEDS.mkdir(exist_ok=True)
    lines = ",\n".join(f" {json.dumps(key)}: {json.dumps(shape)}" for key, shape in sorted(tensors.items()))
    (SEEDS / f"{name}.json").write_text(f'{{"config": {json.dumps(config, indent=1)},\n"tensors": {{\n{lines}\n}}}}\n')


if __name__ == "__main__":
    main()
