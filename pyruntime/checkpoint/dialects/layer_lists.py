"""Sizes listed layer by layer: `layer_head_num`, `num_key_value_heads_per_layer`, and plain keys that hold a list.

Counts of experts too, as expert drop leaves them (He et al., "Demystifying the Compression of Mixture-of-Experts
Through a Unified Framework", arXiv 2406.02500).
"""

from __future__ import annotations

from typing import Final

from pyruntime.checkpoint.dialects.declared import EXPERT_COUNTS, Declared, in_words, shown
from pyruntime.checkpoint.fields import Fields
from pyruntime.errors import UsageError
from pyruntime.spec import DropPlan

# a list of 0s and sizes -> the key that it overrides, and the sublayer that is not there where it says 0
_LISTS: Final[dict[str, tuple[str, str | None]]] = {
    "num_attention_heads": ("num_attention_heads", "attention"),
    "num_key_value_heads": ("num_key_value_heads", "attention"),
    "head_dim": ("head_dim", None),
    "intermediate_size": ("intermediate_size", "mlp"),
    "num_key_value_heads_per_layer": ("num_key_value_heads", "attention"),
    "layer_head_num": ("num_attention_heads", "attention"),
    "layer_inter_size": ("intermediate_size", "mlp"),
    # a mixture without experts may still have a shared one, so 0 has no one meaning
    **{name: (name, None) for name in EXPERT_COUNTS},
}


def layer_lists(fields: Fields, num_layers: int) -> Declared:
    """What the lists say. A count or width of 0 is a sublayer that is not there; it has no weights to weigh.

    Raises UsageError CONFIG for lists of another length than the model, for what is no size, and for two lists that
    differ.
    """
    found: dict[int, dict[str, int]] = {index: {} for index in range(num_layers)}
    gone: dict[str, set[int]] = {"attention": set(), "mlp": set()}
    said: tuple[str, ...] = ()
    for key, (name, kind) in _LISTS.items():
        sizes = _listed(fields, key, name, num_layers)
        if sizes is None:
            continue
        names = (name, "num_key_value_heads") if key == "layer_head_num" and _multi_head(fields) else (name,)
        own = {index: dict.fromkeys(names, size) for index, size in enumerate(sizes) if size is not None}
        absent = tuple(index for index, size in enumerate(sizes) if size == 0)
        if absent and kind is None:
            raise UsageError("CONFIG", f"config.json: {key} is 0 in layer {absent[0]}; expected a size")
        if kind is not None:
            gone[kind].update(absent)
        for index, values in own.items():
            _take(found[index], values, f"config.json: {key}[{index}]")
        empty = DropPlan(absent) if kind == "attention" else DropPlan((), absent)
        said += in_words(key, empty, num_layers, own, gone_as="no-op ")
    # what has a size of 0 is not built, so it overrides nothing
    overrides = {index: {name: size for name, size in sizes.items() if size} for index, sizes in found.items()}
    origin = "a size of 0" if any(gone.values()) else ""
    no_ops = DropPlan(tuple(gone["attention"]), tuple(gone["mlp"]), origin)
    return Declared(no_ops=no_ops, overrides={i: keys for i, keys in overrides.items() if keys}, said=said)


def _listed(fields: Fields, key: str, name: str, num_layers: int) -> list[int | None] | None:
    """The sizes by layer, or None where the key is no list; a layer without a mixture may have null experts."""
    value = fields.raw(key)
    if value is None or (key == name and not isinstance(value, list)):
        return None
    if not isinstance(value, list) or len(value) != num_layers:
        found = f"has {len(value)} entries" if isinstance(value, list) else f"is {shown(value)}"
        raise UsageError("CONFIG", f"config.json: {key} {found}; expected a list of {num_layers}, one per layer")
    for index, size in enumerate(value):
        if size is None and key in EXPERT_COUNTS:
            continue
        if isinstance(size, bool) or not isinstance(size, int) or size < 0:
            raise UsageError("CONFIG", f"config.json: {key}[{index}] is {shown(size)}; expected a size, or 0 for none")
    if key == "num_attention_heads" and fields.raw("head_dim") is None:
        raise UsageError("CONFIG", "config.json: num_attention_heads differs by layer; add head_dim")
    # the writers of layer_head_num repeat the number of layers
    fields.integer("layer_num", num_layers, num_layers, num_layers)
    return value


def _multi_head(fields: Fields) -> bool:
    """Whether each query head has its own key-value head, so that they are pruned together."""
    return fields.raw("num_key_value_heads") in (None, fields.raw("num_attention_heads"))


def _take(known: dict[str, int], values: dict[str, int], where: str) -> None:
    for name, value in values.items():
        if known.setdefault(name, value) != value:
            raise UsageError("CONFIG", f"{where} is {value}; another list says {known[name]}; remove the wrong one")
