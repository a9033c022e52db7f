"""Names of the files that a checkpoint folder consists of."""

from __future__ import annotations

import fnmatch
from typing import Final

from pyruntime.checkpoint.manifest import MANIFEST

# never code, pickles or other weights; a README speaks of another model
_SIDE: Final = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "vocab.txt", "generation_config.json", "chat_template.json", "*.jinja",
    "LICENSE*", "LICENCE*", "COPYING*", "NOTICE*", "USE_POLICY*",
)  # fmt: skip
_NO_SIDE: Final = (".py", ".bin", ".safetensors")
_OTHERS: Final = (
    "config.json", MANIFEST, "*.safetensors", "*.safetensors.index.json", "README", "README.*", ".gitattributes",
)  # fmt: skip


def is_side_file(name: str) -> bool:
    """Whether the file `name` goes along when its model is written anew."""
    return _is_one_of(name, _SIDE) and not name.endswith(_NO_SIDE)


def is_checkpoint_file(name: str) -> bool:
    """Whether the file `name` is part of a checkpoint, so that whoever replaces that means it too."""
    return is_side_file(name) or _is_one_of(name, _OTHERS)


def _is_one_of(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
