"""What a configuration says about its sublayers, whatever the dialect it says it in."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

from pyruntime.errors import UsageError
from pyruntime.spec import DropPlan

Overrides = Mapping[int, Mapping[str, Any]]
# what a sublayer has that is taken out again before its weights are looked for: families need some size to build it
_STAND_INS: Final = {
    "attention": {"num_attention_heads": 1, "num_key_value_heads": 1},
    "mlp": {"intermediate_size": 1},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Declared:
    """One dialect's part of a configuration, over original layer numbers.

    `drops` are gone from a dense model that the rest of the configuration still describes; `no_ops` never existed in
    this architecture, so what they would weigh is unknown. `linear` holds (layer, "attention" | "mlp") of sublayers
    that are one linear map. `overrides` are the keys of the configuration that differ in a layer. `said` repeats all
    that in plain words, a line for each key of the configuration that says something.
    """

    drops: DropPlan = field(default_factory=DropPlan)
    no_ops: DropPlan = field(default_factory=DropPlan)
    linear: frozenset[tuple[int, str]] = frozenset()
    overrides: Overrides = field(default_factory=dict)
    said: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def gone(self) -> DropPlan:
        """Everything that is not there, be it dropped or never built."""
        return self.drops | self.no_ops

    @property
    def replaced(self) -> frozenset[tuple[int, str]]:
        """(layer, kind) of the sublayers that the configuration gives no sizes: no-ops and linear maps."""
        no_ops = {(index, kind) for kind in ("attention", "mlp") for index in getattr(self.no_ops, kind)}
        return self.linear | no_ops

    @property
    def sizes(self) -> Overrides:
        """The overrides, and stand-ins where a sublayer has no sizes."""
        layers = {index: dict(keys) for index, keys in self.overrides.items()}
        for index, kind in self.replaced:
            layers.setdefault(index, {}).update(_STAND_INS[kind])
        return layers


def merged(parts: Iterable[Declared]) -> Declared:
    """What all dialects of one configuration say together.

    Everything that any of them leaves out is left out, with a note where two of them differ. Raises UsageError CONFIG
    where two override the same key of a layer with different values.
    """
    found = Declared()
    lists: set[tuple[tuple[int, ...], tuple[int, ...]]] = set()
    for part in parts:
        if part.gone:
            lists.add((part.gone.attention, part.gone.mlp))
        found = Declared(
            drops=found.drops | part.drops,
            no_ops=found.no_ops | part.no_ops,
            linear=found.linear | part.linear,
            overrides=joined(found.overrides, part.overrides),
            said=found.said + part.said,
            notes=found.notes + part.notes,
        )
    if len(lists) < 2:
        return found
    note = f"looks wrong: the drops of {found.gone.origin} differ; everything that either drops is dropped"
    return replace(found, notes=(*found.notes, note))


def joined(first: Overrides, second: Overrides) -> dict[int, Mapping[str, Any]]:
    """Both overrides. Raises UsageError CONFIG where they give a key of a layer two values."""
    layers = {index: dict(keys) for index, keys in first.items()}
    for index, keys in second.items():
        own = layers.setdefault(index, {})
        for name, value in keys.items():
            if own.setdefault(name, value) != value:
                raise UsageError(
                    "CONFIG", f"config.json gives layer {index} two values of {name}: {own[name]!r} and {value!r}"
                )
    return dict(layers)


def in_words(
    key: str, gone: DropPlan, overrides: Overrides, linear: Iterable[tuple[int, str]] = (), *, gone_as: str = ""
) -> tuple[str, ...]:
    """One line on what `key` says, or none: "block_configs: no-op attention 2, 3; linear map for MLP 1"."""
    parts = []
    for kind, name in (("attention", "attention"), ("mlp", "MLP")):
        if layers := getattr(gone, kind):
            parts.append(f"{gone_as}{name} {_numbers(layers)}")
        if layers := sorted(index for index, each in linear if each == kind):
            parts.append(f"linear map for {name} {_numbers(layers)}")
    if names := sorted({name for keys in overrides.values() for name in keys}):
        parts.append(f"{', '.join(names)} by layer")
    return (f"{key}: {'; '.join(parts)}",) if parts else ()


def _numbers(layers: Iterable[int]) -> str:
    return ", ".join(map(str, layers))
