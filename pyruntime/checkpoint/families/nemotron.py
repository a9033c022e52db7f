"""Nemotron-4 and Minitron: LayerNorm with gains of 1 + w, squared relu without a gate, half of each head turns."""

from typing import Final

from pyruntime.checkpoint.families.decoder import Decoder
from pyruntime.checkpoint.families.family import Family
from pyruntime.checkpoint.families.keys import Key
from pyruntime.checkpoint.families.llama import HARMLESS, NAMES
from pyruntime.checkpoint.families.rope import RopeKeys
from pyruntime.spec import Activation, NormKind

NEMOTRON: Final = Family(
    model_types=("nemotron",),
    decoder=Decoder(
        norm=NormKind.LAYER_ONE_PLUS,
        norm_eps=Key("norm_eps", 1e-5),
        norm_bias=True,
        gated=False,
        activation=Key("hidden_act", Activation.RELU2),
        qkv_bias=Key("attention_bias", False),
        o_bias=Key("attention_bias", False),
        mlp_bias=Key("mlp_bias", False),
        rope=RopeKeys(fraction="partial_rotary_factor", default_fraction=0.5),
    ),
    names=NAMES,
    # what other programs read: kv_channels repeats head_dim, layer_norm_eps norm_eps
    harmless=HARMLESS | {"pretraining_tp", "kv_channels", "layer_norm_eps"},
)
