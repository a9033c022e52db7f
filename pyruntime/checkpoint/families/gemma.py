"""Gemma 2 and Gemma 3 (text): gains of 1 + w, norms before and behind each sublayer, some layers slide."""

from dataclasses import replace
from typing import Final

from pyruntime.checkpoint.families.decoder import Decoder, Window
from pyruntime.checkpoint.families.family import Family
from pyruntime.checkpoint.families.keys import Key
from pyruntime.checkpoint.families.llama import HARMLESS, NAMES
from pyruntime.checkpoint.families.rope import RopeKeys
from pyruntime.checkpoint.fields import Fields
from pyruntime.spec import Activation, NormKind
from pyruntime.spec.bounds import MAX_LAYERS


def _slides_in_gemma3(fields: Fields, index: int) -> bool:
    """All layers but every sixth."""
    return (index + 1) % int(fields.integer("sliding_window_pattern", 1, MAX_LAYERS, 6)) != 0


# the square root of the width is exact here; transformers rounds it where the weights are bfloat16 (33.94 to 34.0)
_GEMMA2: Final = Decoder(
    norm=NormKind.RMS_ONE_PLUS,
    activation=Key("hidden_activation", Activation.GELU_TANH),
    qkv_bias=Key("attention_bias", False),
    o_bias=Key("attention_bias", False),
    post_norms=True,
    head_dim=256,
    window=Window(Key("sliding_window", 4096), lambda fields, index: index % 2 == 0, listed=True),
    score_scale=Key("query_pre_attn_scalar", 256),
    softcap=Key("attn_logit_softcapping", 50.0),
    head_softcap=Key("final_logit_softcapping", 30.0),
    scaled_embedding=True,
    tied=True,
    refused=("use_bidirectional_attention",),
)
_NAMES: Final = {
    **NAMES,
    "layers.{}.attention.post": "model.layers.{}.post_attention_layernorm",
    "layers.{}.mlp.pre": "model.layers.{}.pre_feedforward_layernorm",
    "layers.{}.mlp.post": "model.layers.{}.post_feedforward_layernorm",
}
# hidden_act is what the first releases wrote; transformers reads hidden_activation
_HARMLESS: Final = HARMLESS | {"hidden_act"}

GEMMA2: Final = Family(model_types=("gemma2",), decoder=_GEMMA2, names=_NAMES, harmless=_HARMLESS)
GEMMA3: Final = Family(
    model_types=("gemma3_text",),
    decoder=replace(
        _GEMMA2,
        qk_norm=True,
        rope=RopeKeys(default_theta=1e6, local_theta="rope_local_base_freq"),
        window=Window(Key("sliding_window", 4096), _slides_in_gemma3, listed=True),
        softcap=None,
        head_softcap=Key("final_logit_softcapping"),
        # transformers reads the cap of the scores and does not apply it
        refused=(*_GEMMA2.refused, "attn_logit_softcapping"),
    ),
    names={
        **_NAMES,
        "layers.{}.attention.q_norm": "model.layers.{}.self_attn.q_norm",
        "layers.{}.attention.k_norm": "model.layers.{}.self_attn.k_norm",
    },
    harmless=_HARMLESS | {"sliding_window_pattern", "_sliding_window_pattern", "rope_local_base_freq"},
)
