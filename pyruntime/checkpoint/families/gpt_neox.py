"""GPT-NeoX and Pythia: parallel sublayers, LayerNorm, a quarter of each head turns, q, k and v interleaved by head."""

from typing import Final

from pyruntime.checkpoint.families.decoder import Decoder
from pyruntime.checkpoint.families.family import Family, Fused
from pyruntime.checkpoint.families.keys import Key
from pyruntime.checkpoint.families.llama import HARMLESS
from pyruntime.checkpoint.families.rope import RopeKeys
from pyruntime.spec import Activation, NormKind

GPT_NEOX: Final = Family(
    model_types=("gpt_neox",),
    decoder=Decoder(
        norm=NormKind.LAYER,
        norm_eps=Key("layer_norm_eps", 1e-5),
        norm_bias=True,
        gated=False,
        activation=Key("hidden_act", Activation.GELU),
        qkv_bias=Key("attention_bias", True),
        o_bias=Key("attention_bias", True),
        mlp_bias=True,
        parallel=Key("use_parallel_residual", True),
        rope=RopeKeys(theta="rotary_emb_base", fraction="rotary_pct", default_fraction=0.25),
    ),
    names={
        "embedding": "gpt_neox.embed_in",
        "layers.{}.attention.pre": "gpt_neox.layers.{}.input_layernorm",
        **{f"layers.{{}}.attention.{role}": "gpt_neox.layers.{}.attention.query_key_value" for role in "qkv"},
        "layers.{}.attention.o": "gpt_neox.layers.{}.attention.dense",
        "layers.{}.mlp.pre": "gpt_neox.layers.{}.post_attention_layernorm",
        "layers.{}.mlp.up": "gpt_neox.layers.{}.mlp.dense_h_to_4h",
        "layers.{}.mlp.down": "gpt_neox.layers.{}.mlp.dense_4h_to_h",
        "final_norm": "gpt_neox.final_layer_norm",
        "head": "embed_out",
    },
    fused=(Fused(("attention.q", "attention.k", "attention.v"), interleaved=True),),
    harmless=HARMLESS | {"hidden_dropout", "classifier_dropout", "attention_probs_dropout_prob", "hidden_dropout_prob"},
    # masks and frequencies that old checkpoints store
    stale=("attention.rotary_emb.inv_freq", "attention.masked_bias", "attention.bias"),
)
