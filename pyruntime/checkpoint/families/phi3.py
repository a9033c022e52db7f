"""Phi-3, Phi-3.5 and Phi-4: q, k and v in one tensor, gate and up in another; long contexts through longrope."""

from typing import Final

from pyruntime.checkpoint.families.decoder import Decoder, Window
from pyruntime.checkpoint.families.family import Family, Fused
from pyruntime.checkpoint.families.keys import Key
from pyruntime.checkpoint.families.llama import HARMLESS, NAMES
from pyruntime.checkpoint.families.rope import RopeKeys

PHI3: Final = Family(
    model_types=("phi3",),
    decoder=Decoder(
        norm_eps=Key("rms_norm_eps", 1e-5),
        rope=RopeKeys(fraction="partial_rotary_factor", trained_context=4096),
        window=Window(Key("sliding_window")),
    ),
    names={
        **NAMES,
        **{f"layers.{{}}.attention.{role}": "model.layers.{}.self_attn.qkv_proj" for role in "qkv"},
        **{f"layers.{{}}.mlp.{role}": "model.layers.{}.mlp.gate_up_proj" for role in ("gate", "up")},
    },
    fused=(Fused(("attention.q", "attention.k", "attention.v")), Fused(("mlp.gate", "mlp.up"))),
    # there are no biases, whatever attention_bias says
    harmless=HARMLESS | {"resid_pdrop", "embd_pdrop", "original_max_position_embeddings", "attention_bias"},
)
