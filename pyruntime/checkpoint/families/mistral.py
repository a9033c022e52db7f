"""Mistral 7B and its descendants: Llama with grouped queries and a sliding window in every layer."""

from typing import Final

from pyruntime.checkpoint.families.decoder import Decoder, Window
from pyruntime.checkpoint.families.family import Family
from pyruntime.checkpoint.families.keys import Key
from pyruntime.checkpoint.families.llama import HARMLESS, NAMES

MISTRAL: Final = Family(
    model_types=("mistral",),
    decoder=Decoder(window=Window(Key("sliding_window", 4096))),
    names=NAMES,
    harmless=HARMLESS,
    stale=("rotary_emb.inv_freq",),
)
