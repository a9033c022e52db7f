"""transformers' `per_layer_config`: a sparse map from layer to overridden keys, with `skip` for absent sublayers."""

from __future__ import annotations

from typing import Any, Final

from pyruntime.checkpoint.dialects.declared import Declared, in_words
from pyruntime.checkpoint.dialects.effect import SUPPORTED
from pyruntime.checkpoint.fields import Fields
from pyruntime.errors import UsageError
from pyruntime.spec import DropPlan

_SKIPS: Final = ("attention", "mlp")


def per_layer_config(fields: Fields, num_layers: int) -> Declared:
    """The sublayers that `skip` names, and the other overrides by layer.

    Raises UsageError CONFIG for layers that do not exist, unknown keys and unknown sublayers.
    """
    table = fields.raw("per_layer_config", {})
    if not isinstance(table, dict):
        raise UsageError("CONFIG", f"config.json: per_layer_config is a {type(table).__name__}; expected an object")
    overrides: dict[int, dict[str, Any]] = {}
    skipped: dict[str, list[int]] = {kind: [] for kind in _SKIPS}
    for key, entry in table.items():
        index = _layer_index(key, num_layers)
        where = f"config.json: per_layer_config[{key!r}]"
        if index in overrides or not isinstance(entry, dict):
            raise UsageError("CONFIG", f"{where} is no object, or layer {index} is listed twice")
        for kind in _skip(entry.get("skip"), where):
            skipped[kind].append(index)
        overrides[index] = {name: value for name, value in entry.items() if name != "skip"}
        unknown = sorted(set(overrides[index]) - SUPPORTED)
        if unknown:
            raise UsageError("CONFIG", f"{where} overrides {unknown}; supported: skip, {', '.join(sorted(SUPPORTED))}")
    origin = "per_layer_config" if any(skipped.values()) else ""
    drops = DropPlan(tuple(skipped["attention"]), tuple(skipped["mlp"]), origin)
    return Declared(drops=drops, overrides=overrides, said=in_words("per_layer_config", drops, overrides))


def _layer_index(key: str, num_layers: int) -> int:
    if not key.isdecimal() or not key.isascii() or len(key) > 6 or int(key) >= num_layers:
        raise UsageError(
            "CONFIG", f"config.json: per_layer_config names layer {key!r}; the model has {num_layers} layers"
        )
    return int(key)


def _skip(value: Any, where: str) -> list[str]:
    if value is None:
        return []
    if not isinstance(value, list) or not all(each in _SKIPS for each in value):
        raise UsageError("CONFIG", f"{where} skips {value!r}; expected a list of {' and '.join(_SKIPS)}")
    return value
