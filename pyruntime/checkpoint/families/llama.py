"""Llama in all its forms: Llama 1-3, TinyLlama, Yi, SmolLM and everything else that says model_type llama."""

from __future__ import annotations

from typing import Final

from pyruntime.checkpoint.families.family import Family
from pyruntime.checkpoint.families.rope import rope_from
from pyruntime.checkpoint.fields import Fields
from pyruntime.errors import UsageError
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
)
from pyruntime.spec.bounds import MAX_HEAD_DIM, MAX_HEADS, MAX_LAYERS, MAX_POSITION, MAX_VOCAB, MAX_WIDTH

ACTIVATIONS: Final = {
    "silu": Activation.SILU,
    "swish": Activation.SILU,
    "gelu": Activation.GELU,
    "gelu_new": Activation.GELU_TANH,
    "gelu_pytorch_tanh": Activation.GELU_TANH,
    "relu": Activation.RELU,
    "relu2": Activation.RELU2,
}


def llama_spec(fields: Fields) -> ModelSpec:
    """The specification that a Llama config.json describes. Raises UsageError CONFIG."""
    hidden_size = fields.integer("hidden_size", 1, MAX_WIDTH)
    vocab_size = fields.integer("vocab_size", 1, MAX_VOCAB)
    max_position = fields.integer("max_position_embeddings", 1, MAX_POSITION, 2048)
    num_layers = fields.integer("num_hidden_layers", 1, MAX_LAYERS)
    head_dim = _head_dim(fields, hidden_size)
    return ModelSpec(
        family="llama",
        embedding=Embedding(vocab_size=vocab_size, size=hidden_size),
        layers=tuple(
            _layer(fields.layer(index), index, hidden_size, head_dim, max_position) for index in range(num_layers)
        ),
        final_norm=_norm(fields, hidden_size),
        head=Head(
            linear=Linear(in_features=hidden_size, out_features=vocab_size),
            tied=fields.boolean("tie_word_embeddings", False),
        ),
        max_position=max_position,
    )


def _layer(fields: Fields, index: int, hidden_size: int, head_dim: int, max_position: int) -> Layer:
    return Layer(
        index=index,
        attention=_attention(fields, hidden_size, head_dim, max_position),
        mlp=_mlp(fields, hidden_size),
    )


def _head_dim(fields: Fields, hidden_size: int) -> int:
    """Size of a head where no layer says otherwise; a layer that lost heads keeps the size of the others."""
    found: int | None = fields.integer("head_dim", 1, MAX_HEAD_DIM, None)
    if found is not None:
        return found
    num_heads = fields.integer("num_attention_heads", 1, MAX_HEADS)
    if hidden_size % num_heads:
        raise UsageError(
            "CONFIG", f"hidden_size {hidden_size} is no multiple of num_attention_heads {num_heads}; say head_dim"
        )
    return int(hidden_size // num_heads)


def _attention(fields: Fields, hidden_size: int, default_head_dim: int, max_position: int) -> Attention:
    num_heads = fields.integer("num_attention_heads", 1, MAX_HEADS)
    num_kv_heads = fields.integer("num_key_value_heads", 1, MAX_HEADS, num_heads)
    head_dim = fields.integer("head_dim", 1, MAX_HEAD_DIM, default_head_dim)
    rope = rope_from(fields, head_dim, max_position)
    if rope.dim != head_dim:
        # transformers' Llama ignores the key with default rope, and cannot run it with any other
        raise UsageError("CONFIG", "partial_rotary_factor is not 1; Llama turns whole heads: remove the key")
    bias = fields.boolean("attention_bias", False)

    def project(heads: int) -> Linear:
        return Linear(in_features=hidden_size, out_features=heads * head_dim, bias=bias)

    return Attention(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        q=project(num_heads),
        k=project(num_kv_heads),
        v=project(num_kv_heads),
        o=Linear(in_features=num_heads * head_dim, out_features=hidden_size, bias=bias),
        scale=head_dim**-0.5,
        rope=rope,
        pre=_norm(fields, hidden_size),
    )


def _mlp(fields: Fields, hidden_size: int) -> MLP:
    ffn_size = fields.integer("intermediate_size", 1, MAX_WIDTH)
    bias = fields.boolean("mlp_bias", False)
    widen = Linear(in_features=hidden_size, out_features=ffn_size, bias=bias)
    return MLP(
        gate=widen,
        up=widen,
        down=Linear(in_features=ffn_size, out_features=hidden_size, bias=bias),
        activation=fields.choice("hidden_act", ACTIVATIONS, Activation.SILU),
        pre=_norm(fields, hidden_size),
    )


def _norm(fields: Fields, size: int) -> Norm:
    return Norm(kind=NormKind.RMS, size=size, eps=fields.real("rms_norm_eps", 0.0, 1.0, 1e-6))


LLAMA: Final = Family(
    model_types=("llama",),
    spec=llama_spec,
    names={
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
    },
    # pretraining_tp splits a matrix product without changing it; the others steer training or other programs
    harmless=frozenset(
        {
            "pretraining_tp",
            "attention_dropout",
            "initializer_range",
            "rope_interleaved",
            "is_llama_config",
            "max_sequence_length",
        }
    ),
    stale=("rotary_emb.inv_freq",),
)
