"""GPT-2: learned positions, LayerNorm, matrices stored [in_features, out_features], q, k and v side by side."""

from typing import Final

from pyruntime.checkpoint.families.decoder import Decoder
from pyruntime.checkpoint.families.family import Family, Fused
from pyruntime.checkpoint.families.keys import Key
from pyruntime.checkpoint.fields import Fields
from pyruntime.spec import Activation, NormKind


def _scale(fields: Fields, index: int, head_dim: int) -> float:
    scale = float(head_dim**-0.5) if fields.boolean("scale_attn_weights", True) else 1.0
    return scale / (index + 1) if fields.boolean("scale_attn_by_inverse_layer_idx", False) else scale


GPT2: Final = Family(
    model_types=("gpt2",),
    decoder=Decoder(
        norm=NormKind.LAYER,
        norm_eps=Key("layer_norm_epsilon", 1e-5),
        norm_bias=True,
        gated=False,
        activation=Key("activation_function", Activation.GELU_TANH),
        qkv_bias=True,
        o_bias=True,
        mlp_bias=True,
        rope=None,
        learned_positions=True,
        score_scale=_scale,
        tied=True,
        ffn_multiple=4,
        max_position=1024,
        refused=("add_cross_attention",),
    ),
    names={
        "embedding": "transformer.wte",
        "embedding.position": "transformer.wpe",
        "layers.{}.attention.pre": "transformer.h.{}.ln_1",
        **{f"layers.{{}}.attention.{role}": "transformer.h.{}.attn.c_attn" for role in "qkv"},
        "layers.{}.attention.o": "transformer.h.{}.attn.c_proj",
        "layers.{}.mlp.pre": "transformer.h.{}.ln_2",
        "layers.{}.mlp.up": "transformer.h.{}.mlp.c_fc",
        "layers.{}.mlp.down": "transformer.h.{}.mlp.c_proj",
        "final_norm": "transformer.ln_f",
        "head": "lm_head",
    },
    fused=(Fused(("attention.q", "attention.k", "attention.v")),),
    transposed=frozenset({"attention.q", "attention.k", "attention.v", "attention.o", "mlp.up", "mlp.down"}),
    prefix="transformer.",
    keys={
        "hidden_size": "n_embd",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "max_position_embeddings": "n_positions",
        "intermediate_size": "n_inner",
    },
    # n_ctx repeats n_positions; the order of the products and other heads' summaries change no logits
    harmless=frozenset(
        "initializer_range n_ctx reorder_and_upcast_attn summary_activation summary_first_dropout "
        "summary_proj_to_labels summary_type summary_use_proj".split()
    ),
    # causal masks that old checkpoints store
    stale=(".attn.bias", ".attn.masked_bias"),
)
