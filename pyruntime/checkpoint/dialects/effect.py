"""Whether a family does what the overrides of a configuration ask for; one that it would not read must not be lost."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, Final

from pyruntime.checkpoint.dialects.declared import EXPERT_COUNTS, KIND_OF, Overrides, shown
from pyruntime.checkpoint.families import Family
from pyruntime.checkpoint.families.decoder import ACTIVATIONS
from pyruntime.errors import UsageError
from pyruntime.spec import MLP, Attention, ModelSpec, MoE

# by the key: what the sublayer that it sizes has
_FOUND: Final[dict[str, Callable[[Any], Any]]] = {
    "num_attention_heads": lambda attention: attention.num_heads,
    "num_key_value_heads": lambda attention: attention.num_kv_heads,
    "head_dim": lambda attention: attention.head_dim,
    "sliding_window": lambda attention: attention.window,
    "intermediate_size": lambda mlp: mlp.up.out_features,
    "hidden_act": lambda mlp: mlp.activation,
    **dict.fromkeys(EXPERT_COUNTS, lambda mlp: mlp.num_experts if isinstance(mlp, MoE) else None),
}


def readable(overrides: Overrides, family: Family) -> Overrides:
    """`overrides` without windows where a family's layers differ in more than the window's width."""
    window = family.decoder.window
    if window is not None and not window.listed:
        return overrides
    return {
        index: {name: value for name, value in keys.items() if name != "sliding_window"}
        for index, keys in overrides.items()
    }


def check_overrides(spec: ModelSpec, overrides: Overrides, but: Collection[tuple[int, str]] = ()) -> None:
    """Raise UsageError CONFIG where a layer of `spec` is not what `overrides` say.

    Sublayers that are gone or replaced, and those listed in `but`, have no sizes to compare; nor have the dense layers
    of a model with experts any count of them.
    """
    has_experts = any(isinstance(layer.mlp, MoE) for layer in spec.layers)
    for index, keys in overrides.items():
        for name, value in keys.items():
            kind = KIND_OF[name]
            sublayer = getattr(spec.layers[index], kind)
            if not isinstance(sublayer, Attention | MLP | MoE) or (index, kind) in but:
                continue
            if name in EXPERT_COUNTS and has_experts and isinstance(sublayer, MLP):
                continue
            found = _FOUND[name](sublayer)
            wanted = value
            if name == "hidden_act":
                wanted = ACTIVATIONS.get(value) if isinstance(value, str) else None
            # true is 1 in Python, and 4.0 is 4
            if found != wanted or type(found) is not type(wanted):
                raise UsageError(
                    "CONFIG",
                    f"{name} of layer {index} is {shown(value)}; {spec.family} has {shown(found)} there and cannot "
                    "differ: remove it, or get the model that it was written for",
                )
