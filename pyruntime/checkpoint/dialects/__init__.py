"""How checkpoints say what they go without: a file per dialect, each giving what it declares over original layers.

Most dialects are keys of config.json; `plan_file` finds out which dialect a file of its own is written in.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from pyruntime.checkpoint.dialects.block_configs import block_configs
from pyruntime.checkpoint.dialects.declared import Declared, merged
from pyruntime.checkpoint.dialects.flash_norm import FLASH_NORM_KEYS
from pyruntime.checkpoint.dialects.layer_lists import layer_lists
from pyruntime.checkpoint.dialects.llm_drop import llm_drop
from pyruntime.checkpoint.dialects.per_layer import per_layer_config
from pyruntime.checkpoint.fields import Fields

DIALECTS: Final[tuple[Callable[[Fields, int], Declared], ...]] = (
    per_layer_config,
    llm_drop,
    block_configs,
    layer_lists,
)
# how Puzzletron's exports name the modules of another engine; model_type says the same
_HARMLESS: Final = frozenset({"anymodel_arch_info", "anymodel_descriptor", "base_architecture"})


def read_dialects(fields: Fields, num_layers: int) -> Declared:
    """What the configuration declares in all dialects together. Raises UsageError CONFIG or DROP."""
    # as_stored.py holds FlashNorm's flags against the tensors
    fields.ignore(_HARMLESS | FLASH_NORM_KEYS)
    return merged(dialect(fields, num_layers) for dialect in DIALECTS)


__all__ = ["DIALECTS", "Declared", "read_dialects"]
