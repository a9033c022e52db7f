"""Llama in all its forms: Llama 1-3, TinyLlama, Yi, SmolLM and everything else that says model_type llama."""

from typing import Final

from pyruntime.checkpoint.families.decoder import Decoder
from pyruntime.checkpoint.families.family import Family
from pyruntime.checkpoint.families.keys import Key

# many families kept Llama's names
NAMES: Final = {
    "embedding": "model.embed_tokens",
    "layers.{}.attention.pre": "model.layers.{}.input_layernorm",
    "layers.{}.attention.q": "model.layers.{}.self_attn.q_proj",
    "layers.{}.attention.k": "model.layers.{}.self_attn.k_proj",
    "layers.{}.attention.v": "model.layers.{}.self_attn.v_proj",
    "layers.{}.attention.o": "model.layers.{}.self_attn.o_proj",
    "layers.{}.mlp.pre": "model.layers.{}.post_attention_layernorm",
    "layers.{}.mlp.gate": "model.layers.{}.mlp.gate_proj",
    "layers.{}.mlp.up": "model.layers.{}.mlp.up_proj",
    "layers.{}.mlp.down": "model.layers.{}.mlp.down_proj",
    "final_norm": "model.norm",
    "head": "lm_head",
}
# they steer training or other programs
HARMLESS: Final = frozenset({"attention_dropout", "initializer_range"})

LLAMA: Final = Family(
    model_types=("llama",),
    decoder=Decoder(
        qkv_bias=Key("attention_bias", False),
        o_bias=Key("attention_bias", False),
        mlp_bias=Key("mlp_bias", False),
        max_position=2048,
    ),
    names=NAMES,
    # of SliceGPT, which multiplies from the right
    bare={
        f"layers.{{}}.{kind}.shortcut.weight": f"model.layers.{{}}.{name}_shortcut_Q"
        for kind, name in {"attention": "attn", "mlp": "mlp"}.items()
    },
    transposed=frozenset({"attention.shortcut", "mlp.shortcut"}),
    # pretraining_tp splits a matrix product without changing it
    harmless=HARMLESS | {"pretraining_tp", "rope_interleaved", "is_llama_config", "max_sequence_length"},
    stale=("rotary_emb.inv_freq",),
)
