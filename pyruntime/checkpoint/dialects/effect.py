"""Whether a family does what the overrides of a configuration ask for; one that it would not read must not be lost."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, Final

from pyruntime.checkpoint.dialects.declared import Overrides
from pyruntime.checkpoint.families import Family
from pyruntime.checkpoint.families.decoder import ACTIVATIONS
from pyruntime.errors import UsageError
from pyruntime.spec import MLP, Attention, ModelSpec

# by the key: the sublayer it sizes, what the sublayer has, and what the key's value means there
_FOUND: Final[dict[str, tuple[str, Callable[[Any], Any]]]] = {
    "num_attention_heads": ("attention", lambda attention: attention.num_heads),
    "num_key_value_heads": ("attention", lambda attention: attention.num_kv_heads),
    "head_dim": ("attention", lambda attention: attention.head_dim),
    "sliding_window": ("attention", lambda attention: attention.window),
    "intermediate_size": ("mlp", lambda mlp: mlp.up.out_features),
    "hidden_act": ("mlp", lambda mlp: mlp.activation),
}
SUPPORTED: Final = frozenset(_FOUND)


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

    Sublayers that are gone or replaced, and those listed in `but`, have no sizes to compare.
    """
    for index, keys in overrides.items():
        for name, value in keys.items():
            kind, found_in = _FOUND[name]
            sublayer = getattr(spec.layers[index], kind)
            if not isinstance(sublayer, Attention | MLP) or (index, kind) in but:
                continue
            found = found_in(sublayer)
            wanted = value
            if name == "hidden_act":
                wanted = ACTIVATIONS.get(value) if isinstance(value, str) else None
            # true is 1 in Python, and 4.0 is 4
            if found != wanted or type(found) is not type(wanted):
                raise UsageError(
                    "CONFIG", f"{name} of layer {index} is {value!r}; {spec.family} has {found} there and cannot differ"
                )
