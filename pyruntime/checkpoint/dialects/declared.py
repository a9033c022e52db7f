"""What a configuration says about its sublayers, whatever the dialect it says it in."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

from pyruntime.errors import UsageError
from pyruntime.spec import DropPlan

Overrides = Mapping[int, Mapping[str, Any]]
# the keys that may differ by layer, and the sublayer that each one sizes
KIND_OF: Final = {
    "num_attention_heads": "attention",
    "num_key_value_heads": "attention",
    "head_dim": "attention",
    "sliding_window": "attention",
    "intermediate_size": "mlp",
    "hidden_act": "mlp",
    "num_local_experts": "mlp",
    "num_experts": "mlp",
    "n_routed_experts": "mlp",
}
# those of them that only mixtures of experts have, by the names of three families
EXPERT_COUNTS: Final = ("num_local_experts", "num_experts", "n_routed_experts")
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
    lists: list[DropPlan] = []
    for part in parts:
        if part.drops:
            lists.append(part.drops)
        found = Declared(
            drops=found.drops | part.drops,
            no_ops=found.no_ops | part.no_ops,
            linear=found.linear | part.linear,
            overrides=joined(found.overrides, part.overrides),
            said=found.said + part.said,
            notes=found.notes + part.notes,
        )
    if len({(each.attention, each.mlp) for each in lists}) < 2:
        return found
    each_said = "; ".join(f"{each.origin}: {layers_in_words(each)}" for each in lists)
    note = f"looks wrong: what is dropped differs ({each_said}); everything that either drops is dropped"
    return replace(found, notes=(*found.notes, note))


def joined(first: Overrides, second: Overrides) -> dict[int, Mapping[str, Any]]:
    """Both overrides. Raises UsageError CONFIG where they give a key of a layer two values."""
    layers = {index: dict(keys) for index, keys in first.items()}
    for index, keys in second.items():
        own = layers.setdefault(index, {})
        for name, value in keys.items():
            if own.setdefault(name, value) != value:
                raise UsageError(
                    "CONFIG",
                    f"config.json gives layer {index} two values of {name}: {shown(own[name])} and {shown(value)}; "
                    "remove the wrong one",
                )
    return dict(layers)


def in_words(
    key: str,
    gone: DropPlan,
    num_layers: int = 0,
    overrides: Overrides | None = None,
    linear: frozenset[tuple[int, str]] = frozenset(),
    *,
    gone_as: str = "",
) -> tuple[str, ...]:
    """One line on what `key` says, or none: "block_configs: no-op attention 2, 3; linear map for MLP 1"."""
    maps = plan_of(linear)
    parts = [layers_in_words(gone, gone_as)] if gone else []
    parts += [layers_in_words(maps, "linear map for ")] if maps else []
    if names := _differing(overrides or {}, num_layers, Declared(no_ops=gone, linear=linear).replaced):
        parts.append(f"{', '.join(names)} by layer")
    return (f"{key}: {'; '.join(parts)}",) if parts else ()


def plan_of(sublayers: Iterable[tuple[int, str]], origin: str = "") -> DropPlan:
    """The plan that names these (layer, "attention" | "mlp"); `origin` counts where there are any."""
    found = list(sublayers)
    attention, mlp = (tuple(index for index, each in found if each == kind) for kind in ("attention", "mlp"))
    return DropPlan(attention, mlp, origin if found else "")


def layers_in_words(plan: DropPlan, before: str = "") -> str:
    """The sublayers of `plan`: "attention 1, 3; MLP 0", or "nothing"."""
    kinds = (("attention", plan.attention), ("MLP", plan.mlp))
    return "; ".join(f"{before}{name} {', '.join(map(str, layers))}" for name, layers in kinds if layers) or "nothing"


def shown(value: Any) -> str:
    """`value` of a JSON file as JSON writes it, cut to a line."""
    return json.dumps(value)[:80]


def _differing(overrides: Overrides, num_layers: int, without: Iterable[tuple[int, str]]) -> list[str]:
    """The overridden keys that do not have one and the same value in all layers; those in `without` have none."""
    absent = frozenset(without)

    def values(name: str) -> set[str]:
        there = (index for index in range(num_layers) if (index, KIND_OF[name]) not in absent)
        # what a layer does not override is what config.json says for all
        return {repr(overrides.get(index, {}).get(name, ...)) for index in there}

    return [name for name in sorted({name for keys in overrides.values() for name in keys}) if len(values(name)) > 1]
