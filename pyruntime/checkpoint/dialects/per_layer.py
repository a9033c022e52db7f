"""transformers' `per_layer_config`: a sparse map from layer to overridden keys, with `skip` for absent sublayers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from pyruntime.checkpoint.dialects.declared import KIND_OF, Declared, in_words, plan_of, shown
from pyruntime.checkpoint.fields import Fields, some
from pyruntime.errors import UsageError

_SKIPS: Final = ("attention", "mlp")


def per_layer_config(fields: Fields, num_layers: int) -> Declared:
    """The sublayers that `skip` names, and the other overrides by layer.

    Sizes of a sublayer that is skipped mean nothing, which a note says. Raises UsageError CONFIG for layers that do not
    exist, unknown keys and unknown sublayers.
    """
    table = fields.raw("per_layer_config", {})
    if not isinstance(table, dict):
        raise UsageError("CONFIG", f"config.json: per_layer_config is {shown(table)}; expected an object")
    overrides: dict[int, dict[str, Any]] = {}
    skipped: list[tuple[int, str]] = []
    idle: list[str] = []
    for key, entry in table.items():
        index = _layer_index(key, num_layers)
        where = f"config.json: per_layer_config[{shown(key)}]"
        if index in overrides:
            raise UsageError("CONFIG", f"{where} lists layer {index} a second time; merge the two")
        if not isinstance(entry, dict):
            raise UsageError("CONFIG", f"{where} is {shown(entry)}; expected an object of what differs in it")
        skips = _skip(entry.get("skip"), where)
        skipped += [(index, kind) for kind in skips]
        sizes = _sizes(entry, where)
        overrides[index] = {name: value for name, value in sizes.items() if KIND_OF[name] not in skips}
        idle += [f"{name} of layer {index}" for name in sizes if KIND_OF[name] in skips]
    drops = plan_of(skipped, "per_layer_config")
    # a layer that is only skipped overrides nothing
    overrides = {index: sizes for index, sizes in overrides.items() if sizes}
    said = in_words("per_layer_config", drops, num_layers, overrides)
    notes = (f"per_layer_config sizes what it skips, which means nothing: {some(idle)}",) if idle else ()
    return Declared(drops=drops, overrides=overrides, said=said, notes=notes)


def _layer_index(key: str, num_layers: int) -> int:
    if not key.isdecimal() or not key.isascii() or len(key) > 6 or int(key) >= num_layers:
        raise UsageError(
            "CONFIG", f"config.json: per_layer_config names layer {shown(key)}; the model has {num_layers} layers"
        )
    return int(key)


def _sizes(entry: Mapping[str, Any], where: str) -> dict[str, Any]:
    """What the entry overrides."""
    sizes = {name: value for name, value in entry.items() if name != "skip"}
    unknown = sorted(sizes.keys() - KIND_OF.keys())
    if unknown:
        raise UsageError("CONFIG", f"{where} overrides {some(unknown)}; supported: skip, {', '.join(sorted(KIND_OF))}")
    for name, value in sizes.items():
        # a layer without a window is one that sees everything
        if value is None and name != "sliding_window":
            raise UsageError(
                "CONFIG", f"{where} has {name} null; expected a value; remove it to keep what the model has"
            )
    return sizes


def _skip(value: Any, where: str) -> list[str]:
    if value is None:
        return []
    if not isinstance(value, list) or not all(each in _SKIPS for each in value):
        raise UsageError("CONFIG", f'{where} skips {shown(value)}; expected a list of "attention" and "mlp"')
    return value
