"""One small file per architecture family, and the table that finds a family by its model_type."""

from collections.abc import Mapping
from typing import Any, Final

from pyruntime.checkpoint.families.baichuan import BAICHUAN
from pyruntime.checkpoint.families.bitnet import BITNET
from pyruntime.checkpoint.families.family import Family
from pyruntime.checkpoint.families.gemma import GEMMA2, GEMMA3
from pyruntime.checkpoint.families.gpt2 import GPT2
from pyruntime.checkpoint.families.gpt_neox import GPT_NEOX
from pyruntime.checkpoint.families.llama import LLAMA
from pyruntime.checkpoint.families.mistral import MISTRAL
from pyruntime.checkpoint.families.moe import DEEPSEEK, MIXTRAL, QWEN2_MOE
from pyruntime.checkpoint.families.nemotron import NEMOTRON
from pyruntime.checkpoint.families.nemotron_nas import NEMOTRON_NAS
from pyruntime.checkpoint.families.olmo2 import OLMO2
from pyruntime.checkpoint.families.phi3 import PHI3
from pyruntime.checkpoint.families.qwen import QWEN2, QWEN3
from pyruntime.errors import UsageError

_ALL: Final = (
    LLAMA,
    MISTRAL,
    QWEN2,
    QWEN3,
    PHI3,
    GEMMA2,
    GEMMA3,
    GPT_NEOX,
    BITNET,
    NEMOTRON,
    NEMOTRON_NAS,
    OLMO2,
    GPT2,
    BAICHUAN,
    MIXTRAL,
    QWEN2_MOE,
    DEEPSEEK,
)
FAMILIES: Final[dict[str, Family]] = {name: family for family in _ALL for name in family.model_types}


def with_shared_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """`config` with the names of keys that all families share in place of its family's own (`n_layer` of GPT-2).

    Raises UsageError CONFIG where it says the same thing under both names, and not alike.
    """
    model_type = config.get("model_type")
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    own = {} if family is None else {name: shared for shared, name in family.keys.items()}
    found: dict[str, Any] = {}
    for key, value in config.items():
        shared = own.get(key, key)
        known = found.get(shared)
        if known is not None and value is not None and known != value:
            raise UsageError(
                "CONFIG",
                f"config.json gives two values of {shared}: {str(known)[:80]} and {str(value)[:80]}; remove one",
            )
        found[shared] = value if known is None else known
    return found


__all__ = ["FAMILIES", "Family", "with_shared_keys"]
