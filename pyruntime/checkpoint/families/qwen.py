"""Qwen2, Qwen2.5 and Qwen3: biases on q, k and v, or norms on q and k; windows only where they are switched on."""

from typing import Final

from pyruntime.checkpoint.families.decoder import Decoder, Window
from pyruntime.checkpoint.families.family import Family
from pyruntime.checkpoint.families.keys import Key
from pyruntime.checkpoint.families.llama import HARMLESS, NAMES
from pyruntime.checkpoint.fields import Fields
from pyruntime.spec.bounds import MAX_LAYERS


def _slides(fields: Fields, index: int) -> bool:
    return index >= int(fields.integer("max_window_layers", 0, MAX_LAYERS, 28))


# of no use beside layer_types
_HARMLESS: Final = HARMLESS | {"max_window_layers"}
_WINDOW: Final = Window(Key("sliding_window", 4096), _slides, listed=True, switch="use_sliding_window")

QWEN2: Final = Family(
    model_types=("qwen2",), decoder=Decoder(qkv_bias=True, window=_WINDOW), names=NAMES, harmless=_HARMLESS
)
QWEN3: Final = Family(
    model_types=("qwen3",),
    decoder=Decoder(
        qkv_bias=Key("attention_bias", False),
        o_bias=Key("attention_bias", False),
        qk_norm=True,
        head_dim=128,
        window=_WINDOW,
    ),
    names={
        **NAMES,
        "layers.{}.attention.q_norm": "model.layers.{}.self_attn.q_norm",
        "layers.{}.attention.k_norm": "model.layers.{}.self_attn.k_norm",
    },
    harmless=_HARMLESS,
)
