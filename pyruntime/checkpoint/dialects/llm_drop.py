"""LLM-Drop's lists: `drop_attn_list` and `drop_mlp_list`, of layer ids in any order or of one bool per layer."""

from __future__ import annotations

from typing import Any, Final

from pyruntime.checkpoint.dialects.declared import Declared, in_words, shown
from pyruntime.checkpoint.fields import Fields
from pyruntime.errors import UsageError
from pyruntime.spec import DropPlan

_KEYS: Final = ("drop_attn_list", "drop_mlp_list")


def llm_drop(fields: Fields, num_layers: int) -> Declared:
    """What the lists name, and notes on what had to be interpreted. null, [] and absence mean nothing is dropped.

    Raises UsageError DROP for ids out of range and for lists that are neither ids nor one bool per layer.
    """
    notes: list[str] = []
    attention, mlp = (_layers(key, fields.raw(key, []), num_layers, notes) for key in _KEYS)
    origin = "drop_attn_list and drop_mlp_list" if attention or mlp else ""
    said = in_words(_KEYS[0], DropPlan(attention)) + in_words(_KEYS[1], DropPlan((), mlp))
    return Declared(drops=DropPlan(attention, mlp, origin), said=said, notes=tuple(notes))


def _layers(key: str, value: Any, num_layers: int, notes: list[str]) -> tuple[int, ...]:
    if not isinstance(value, list):
        raise UsageError("DROP", f"config.json: {key} is {shown(value)}; expected a list of layer ids")
    # a bool is an int in Python, so bools must be told apart first
    if value and all(isinstance(each, bool) for each in value):
        if len(value) != num_layers:
            raise UsageError("DROP", f"config.json: {key} has {len(value)} bools; the model has {num_layers} layers")
        notes.append(f"{key} holds one bool per layer; read as the ids of the true ones")
        return tuple(index for index, dropped in enumerate(value) if dropped)
    for each in value:
        if isinstance(each, bool) or not isinstance(each, int) or not 0 <= each < num_layers:
            raise UsageError(
                "DROP", f"config.json: {key} holds {shown(each)}; expected layer ids from 0 to {num_layers - 1}"
            )
    if len(value) == num_layers and len(set(value)) < len(value) and set(value) <= {0, 1}:
        raise UsageError(
            "DROP",
            f"config.json: {key} holds {num_layers} times 0 or 1, one per layer; write true and false, or the ids of "
            "the layers to drop",
        )
    if len(set(value)) != len(value):
        notes.append(f"{key} names a layer twice; counted once")
    return tuple(value)
