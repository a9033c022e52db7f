"""Nemotron-NAS (Llama 3.x Nemotron 49B, 51B, 253B) and DeciLM-7B: Llamas whose layers differ, or are linear maps."""

from dataclasses import replace
from typing import Final

from pyruntime.checkpoint.families.decoder import Window
from pyruntime.checkpoint.families.keys import Key
from pyruntime.checkpoint.families.llama import LLAMA, NAMES

NEMOTRON_NAS: Final = replace(
    LLAMA,
    model_types=("nemotron-nas", "deci"),
    # no such model has a window but in single layers
    decoder=replace(LLAMA.decoder, window=Window(Key("sliding_window"))),
    names={
        **NAMES,
        "layers.{}.attention.linear": "model.layers.{}.self_attn.linear_attn",
        "layers.{}.mlp.linear": "model.layers.{}.mlp.linear_mlp",
    },
)
