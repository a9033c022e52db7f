"""What one architecture family tells the reader: how to read its config.json, and what its tensors are called."""

from __future__ import annotations

from collections.abc import Mapping
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
    `.bias` follow on both sides; the parts of a `fused` tensor all have its name. `harmless` are configuration keys
    without influence on the result; `stale` are parts of tensor names that old checkpoints carry for nothing.
    """

    model_types: tuple[str, ...]
    decoder: Decoder
    names: Mapping[str, str]
    fused: tuple[Fused, ...] = ()
    harmless: frozenset[str] = field(default_factory=frozenset)
    stale: tuple[str, ...] = ()

    def spec(self, fields: Fields) -> ModelSpec:
        """The specification that a config.json of this family describes. Raises UsageError CONFIG."""
        model_type = fields.raw("model_type")
        # exports of another program may carry a type of their own
        return self.decoder.spec(fields, model_type if model_type in self.model_types else self.model_types[0])

    def tensor_name(self, weight: str) -> str:
        """Name in the checkpoint of our weight `weight`, such as "layers.3.mlp.up.weight"."""
        stem, _, end = weight.rpartition(".")
        parts = stem.split(".")
        if parts[0] != "layers":
            return f"{self.names[stem]}.{end}"
        return f"{self.names['.'.join(['layers', '{}', *parts[2:]])].format(parts[1])}.{end}"

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
