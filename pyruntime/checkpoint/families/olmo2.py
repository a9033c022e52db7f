"""OLMo 2: norms behind attention and MLP instead of before them, and norms on q and k over all heads together."""

from typing import Final

from pyruntime.checkpoint.families.decoder import Decoder
from pyruntime.checkpoint.families.family import Family
from pyruntime.checkpoint.families.keys import Key
from pyruntime.checkpoint.families.llama import HARMLESS, NAMES

OLMO2: Final = Family(
    model_types=("olmo2",),
    decoder=Decoder(
        norm_eps=Key("rms_norm_eps", 1e-5),
        qkv_bias=Key("attention_bias", False),
        o_bias=Key("attention_bias", False),
        qk_norm="all",
        pre_norms=False,
        post_norms=True,
        max_position=2048,
    ),
    names={
        **NAMES,
        "layers.{}.attention.q_norm": "model.layers.{}.self_attn.q_norm",
        "layers.{}.attention.k_norm": "model.layers.{}.self_attn.k_norm",
        "layers.{}.attention.post": "model.layers.{}.post_attention_layernorm",
        "layers.{}.mlp.post": "model.layers.{}.post_feedforward_layernorm",
    },
    harmless=HARMLESS,
)
