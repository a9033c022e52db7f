"""One small file per architecture family, and the table that finds a family by its model_type."""

from typing import Final

from pyruntime.checkpoint.families.bitnet import BITNET
from pyruntime.checkpoint.families.family import Family
from pyruntime.checkpoint.families.gemma import GEMMA2, GEMMA3
from pyruntime.checkpoint.families.gpt_neox import GPT_NEOX
from pyruntime.checkpoint.families.llama import LLAMA
from pyruntime.checkpoint.families.mistral import MISTRAL
from pyruntime.checkpoint.families.nemotron import NEMOTRON
from pyruntime.checkpoint.families.nemotron_nas import NEMOTRON_NAS
from pyruntime.checkpoint.families.phi3 import PHI3
from pyruntime.checkpoint.families.qwen import QWEN2, QWEN3

_ALL: Final = (LLAMA, MISTRAL, QWEN2, QWEN3, PHI3, GEMMA2, GEMMA3, GPT_NEOX, BITNET, NEMOTRON, NEMOTRON_NAS)
FAMILIES: Final[dict[str, Family]] = {name: family for family in _ALL for name in family.model_types}

__all__ = ["FAMILIES", "Family"]
