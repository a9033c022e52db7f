"""What one architecture family tells the reader: how to read its config.json, and what its tensors are called."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from pyruntime.checkpoint.families.decoder import Decoder
from pyruntime.checkpoint.fields import Fields
from pyruntime.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class Fused:
    """Weights that lie in one stored tensor, one below the other in the order of `parts`.

    Where they are `interleaved`, each key-value head has its rows of all parts together (GPT-NeoX).
    """

    parts: tuple[str, ...]
    interleaved: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """A family of architectures.

    `names` maps the start of our weight names to the checkpoint's ("layers.{}.attention.q" -> ...); `.weight` and
    `.bias` follow on both sides, but not where `bare` maps a whole name. The parts of a `fused` tensor all have its
    name. `transposed` are matrices stored as [in_features, out_features], whose fused parts lie side by side; rows of
    `unit_rows` are divided by their lengths. Files may lack the `prefix` of all names.

    `keys` maps the names that configurations share to the family's own; `harmless` are configuration keys without
    influence on the result; `stale` are parts of tensor names that old checkpoints carry for nothing. `variant` gives
    the family that a configuration really means, where one model_type stands for several.
    """

    model_types: tuple[str, ...]
    decoder: Decoder
    names: Mapping[str, str]
    bare: Mapping[str, str] = field(default_factory=dict)
    fused: tuple[Fused, ...] = ()
    transposed: frozenset[str] = frozenset()
    unit_rows: frozenset[str] = frozenset()
    prefix: str = ""
    keys: Mapping[str, str] = field(default_factory=dict)
    harmless: frozenset[str] = field(default_factory=frozenset)
    stale: tuple[str, ...] = ()
    variant: Callable[[Fields], Family] | None = None

    def of(self, fields: Fields) -> Family:
        """The family of one configuration. Raises UsageError CONFIG."""
        return self if self.variant is None else self.variant(fields)

    def spec(self, fields: Fields) -> ModelSpec:
        """The specification that a config.json of this family describes. Raises UsageError CONFIG."""
        model_type = fields.raw("model_type")
        # exports of another program may carry a type of their own
        name = model_type if model_type in self.model_types else self.model_types[0]
        return self.of(fields).decoder.spec(fields, name)

    def tensor_name(self, weight: str) -> str:
        """Name in the checkpoint of our weight `weight`, such as "layers.3.mlp.up.weight"."""
        stem, _, end = weight.rpartition(".")
        pattern, numbers = _pattern(stem)
        whole = self.bare.get(f"{pattern}.{end}")
        return f"{self.names[pattern].format(*numbers)}.{end}" if whole is None else whole.format(*numbers)

    def fused_with(self, weight: str) -> tuple[tuple[str, ...], bool]:
        """The weights that lie in one tensor with `weight`, in order, and whether their heads are interleaved."""
        stem, _, end = weight.rpartition(".")
        start, _, role = stem.rpartition(".")
        for fused in self.fused:
            kind = fused.parts[0].rpartition(".")[0]
            if start.endswith(f".{kind}") and f"{kind}.{role}" in fused.parts:
                outer = start.removesuffix(kind)
                return tuple(f"{outer}{part}.{end}" for part in fused.parts), fused.interleaved
        return (weight,), False

    def is_transposed(self, weight: str) -> bool:
        """Whether `weight` is stored with its dimensions exchanged."""
        return weight.endswith(".weight") and _role(weight) in self.transposed

    def has_unit_rows(self, weight: str) -> bool:
        """Whether the rows of `weight` are divided by their lengths."""
        return weight.endswith(".weight") and _role(weight) in self.unit_rows


def _pattern(stem: str) -> tuple[str, list[str]]:
    """`stem` with a pair of braces in place of each number, and the numbers."""
    parts = stem.split(".")
    return ".".join("{}" if part.isdecimal() else part for part in parts), [part for part in parts if part.isdecimal()]


def _role(weight: str) -> str:
    """A weight's place within its layer, such as "attention.q"."""
    stem = weight.rpartition(".")[0]
    return stem.split(".", 2)[2] if stem.startswith("layers.") else stem
