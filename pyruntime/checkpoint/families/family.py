"""What one architecture family tells the reader: how to read its config.json, and what its tensors are called."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from pyruntime.checkpoint.fields import Fields
from pyruntime.spec import ModelSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """A family of architectures.

    `names` maps the start of our weight names to the checkpoint's ("layers.{}.attention.q" -> ...); `.weight` and
    `.bias` follow on both sides. `harmless` are configuration keys without influence on the result; `stale` are parts
    of tensor names that old checkpoints carry for nothing.
    """

    model_types: tuple[str, ...]
    spec: Callable[[Fields], ModelSpec]
    names: Mapping[str, str]
    harmless: frozenset[str] = field(default_factory=frozenset)
    stale: tuple[str, ...] = ()

    def tensor_name(self, weight: str) -> str:
        """Name in the checkpoint of our weight `weight`, such as "layers.3.mlp.up.weight"."""
        stem, _, end = weight.rpartition(".")
        parts = stem.split(".")
        if parts[0] != "layers":
            return f"{self.names[stem]}.{end}"
        return f"{self.names['.'.join(['layers', '{}', *parts[2:]])].format(parts[1])}.{end}"
