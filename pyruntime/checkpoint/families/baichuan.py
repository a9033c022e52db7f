"""Baichuan: one model_type for 7B (rope) and 13B (ALiBi); Baichuan 2 divides each row of its head by its length."""

from dataclasses import replace
from typing import Final

from pyruntime.checkpoint.families.decoder import Decoder
from pyruntime.checkpoint.families.family import Family, Fused
from pyruntime.checkpoint.families.llama import HARMLESS, NAMES
from pyruntime.checkpoint.fields import Fields
from pyruntime.errors import UsageError

# of all published models of 7B and of 13B
_WIDTH_WITH_ROPE: Final = 4096
_WIDTH_WITH_ALIBI: Final = 5120
# of all published models of the second generation
_VOCAB_OF_2: Final = 125696
_CONTEXT: Final = "max_position_embeddings"
_CONTEXT_WITH_ALIBI: Final = "model_max_length"


def _variant(fields: Fields) -> Family:
    rope = fields.raw(_CONTEXT) is not None
    width = fields.raw("hidden_size")
    if width == (_WIDTH_WITH_ALIBI if rope else _WIDTH_WITH_ROPE):
        raise UsageError(
            "CONFIG",
            f"config.json: hidden_size is {width}, as in models with {'ALiBi' if rope else 'rope'}, and {_CONTEXT} is "
            f"{'there' if rope else 'not'}, as in models with {'rope' if rope else 'ALiBi'}; get the published one",
        )
    family = _WITH_ROPE if rope else _WITH_ALIBI
    # only configurations of the second generation have this key of its training
    if fields.raw("z_loss_weight") is None and fields.raw("vocab_size") != _VOCAB_OF_2:
        return family
    if fields.boolean("tie_word_embeddings", False):
        raise UsageError("CONFIG", "config.json: tie_word_embeddings is true; a head of unit rows cannot be tied")
    return replace(family, unit_rows=frozenset({"head"}))


_WITH_ROPE: Final = Family(
    model_types=("baichuan",),
    decoder=Decoder(),
    names={**NAMES, **{f"layers.{{}}.attention.{role}": "model.layers.{}.self_attn.W_pack" for role in "qkv"}},
    fused=(Fused(("attention.q", "attention.k", "attention.v")),),
    harmless=HARMLESS | {"z_loss_weight", "gradient_checkpointing"},
    stale=("rotary_emb.inv_freq",),
)
_WITH_ALIBI: Final = replace(_WITH_ROPE, decoder=Decoder(rope=None, alibi=True, context=_CONTEXT_WITH_ALIBI), stale=())
BAICHUAN: Final = replace(_WITH_ROPE, variant=_variant)
