"""BitNet b1.58 with its ternary weights written out: Llama with a norm before o and one before down."""

from typing import Final

from pyruntime.checkpoint.families.decoder import Decoder
from pyruntime.checkpoint.families.family import Family
from pyruntime.checkpoint.families.keys import Key
from pyruntime.checkpoint.families.llama import HARMLESS, NAMES
from pyruntime.checkpoint.families.rope import RopeKeys
from pyruntime.spec import Activation

BITNET: Final = Family(
    model_types=("bitnet",),
    decoder=Decoder(
        norm_eps=Key("rms_norm_eps", 1e-5),
        activation=Key("hidden_act", Activation.RELU2),
        qkv_bias=Key("attention_bias", False),
        o_bias=Key("attention_bias", False),
        sub_norms=True,
        rope=RopeKeys(default_theta=500000.0),
    ),
    names={
        **NAMES,
        "layers.{}.attention.sub": "model.layers.{}.self_attn.attn_sub_norm",
        "layers.{}.mlp.sub": "model.layers.{}.mlp.ffn_sub_norm",
    },
    harmless=HARMLESS,
)
