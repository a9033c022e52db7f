"""The linear maps and norms of a sublayer by what they do: read its input, write its output."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from pyruntime.spec import MLP, Attention, Cached, Linear, MoE, Norm, Replacement, Sublayer, norm_names

# a function of a map's name, such as layers.0.mlp.up, and the map
MapLinear = Callable[[str, Linear], Linear]
MapNorm = Callable[[str, Norm], Norm]


def raw_inputs(sublayer: Sublayer) -> str | None:
    """Why a factor on the normed input cannot move into the maps behind it: something uses the input as it is."""
    if not isinstance(sublayer, Attention):
        return None
    if sublayer.columns is not None:
        return "columns of the input are queries, keys or values as they are"
    names = [name for name in "qkv" if getattr(sublayer, name) is None]
    return f"the input itself serves as {', '.join(names)}" if names else None


def map_inputs(sublayer: Sublayer, prefix: str, change: MapLinear) -> Sublayer:
    """`sublayer` with `change` applied to each map that reads its normed input; `raw_inputs` must be None."""
    match sublayer:
        case Attention():
            # values that are made of keys read no input
            names = ("q", "k") if sublayer.cached is Cached.KEYS else ("q", "k", "v")
            return replace(sublayer, **_each(sublayer, prefix, names, change))
        case MLP():
            return replace(sublayer, **_each(sublayer, prefix, ("gate", "up"), change))
        case MoE():
            found = _each(sublayer, prefix, ("router", "shared_gate"), change) | {
                name: _experts(sublayer, prefix, name, change) for name in ("gate", "up")
            }
            if sublayer.shared is not None:
                found["shared"] = map_inputs(sublayer.shared, f"{prefix}shared.", change)
            return replace(sublayer, **found)
        case Replacement():
            return replace(sublayer, linear=change(f"{prefix}linear", sublayer.linear))


def map_outputs(sublayer: Sublayer, prefix: str, change: MapLinear) -> Sublayer:
    """`sublayer` with `change` applied to each map that writes its output; an attention must have its `o`."""
    match sublayer:
        case Attention():
            assert sublayer.o is not None
            return replace(sublayer, o=change(f"{prefix}o", sublayer.o))
        case MLP():
            return replace(sublayer, down=change(f"{prefix}down", sublayer.down))
        case MoE():
            down = _experts(sublayer, prefix, "down", change)
            shared = sublayer.shared
            if shared is not None:
                shared = replace(shared, down=change(f"{prefix}shared.down", shared.down))
            return replace(sublayer, down=down, shared=shared)
        case Replacement():
            return replace(sublayer, linear=change(f"{prefix}linear", sublayer.linear))


def map_norms(sublayer: Sublayer, prefix: str, change: MapNorm) -> Sublayer:
    """`sublayer` with `change` applied to each of its norms."""
    found: dict[str, Any] = {
        name: change(prefix + name, norm)
        for name in norm_names(sublayer)
        if (norm := getattr(sublayer, name)) is not None
    }
    if isinstance(sublayer, MoE) and sublayer.shared is not None:
        found["shared"] = map_norms(sublayer.shared, f"{prefix}shared.", change)
    return replace(sublayer, **found)


def _each(sublayer: Sublayer, prefix: str, names: tuple[str, ...], change: MapLinear) -> dict[str, Any]:
    return {name: change(prefix + name, linear) for name in names if (linear := getattr(sublayer, name)) is not None}


def _experts(moe: MoE, prefix: str, name: str, change: MapLinear) -> Linear:
    """Every expert's map; they are alike, so one description stands for all."""
    linear: Linear = getattr(moe, name)
    changed = {change(f"{prefix}experts.{expert}.{name}", linear) for expert in range(moe.num_experts)}
    assert len(changed) == 1
    return changed.pop()
