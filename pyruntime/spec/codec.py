"""ModelSpec to plain JSON data and back, driven by the dataclasses themselves."""

from __future__ import annotations

import dataclasses
import types
import typing
from enum import StrEnum
from typing import Any

from pyruntime.errors import UsageError
from pyruntime.spec.attention import Attention
from pyruntime.spec.model import MLP, ModelSpec, MoE, Replacement

# where a field may hold more than one class, its JSON object carries the class under this key
_TAG = "kind_of_sublayer"
_TAGGED: dict[str, type] = {"attention": Attention, "mlp": MLP, "moe": MoE, "replacement": Replacement}


def spec_to_json(spec: ModelSpec) -> dict[str, Any]:
    """Plain dicts, lists, numbers, strings and None; `spec_from_json` gives back an equal ModelSpec."""
    data = _encode(spec)
    assert isinstance(data, dict)
    return data


def spec_from_json(data: Any) -> ModelSpec:
    """The ModelSpec in `data`. Raises UsageError SPEC for unknown, missing or ill-typed fields."""
    spec = _decode(ModelSpec, data, "model")
    assert isinstance(spec, ModelSpec)
    return spec


def _encode(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        fields = {field.name: _encode(getattr(value, field.name)) for field in dataclasses.fields(value)}
        tag = next((tag for tag, cls in _TAGGED.items() if type(value) is cls), None)
        return fields if tag is None else {_TAG: tag, **fields}
    if isinstance(value, tuple):
        return [_encode(each) for each in value]
    return value.value if isinstance(value, StrEnum) else value


def _decode(kind: Any, data: Any, where: str) -> Any:
    if isinstance(kind, types.UnionType):
        return _decode_union(typing.get_args(kind), data, where)
    if typing.get_origin(kind) is tuple:
        if not isinstance(data, list):
            raise UsageError("SPEC", f"{where} is {type(data).__name__}; expected a list")
        return tuple(_decode(typing.get_args(kind)[0], each, f"{where}[{i}]") for i, each in enumerate(data))
    if dataclasses.is_dataclass(kind):
        return _decode_dataclass(kind, data, where)
    if isinstance(kind, type) and issubclass(kind, StrEnum):
        if data not in [member.value for member in kind]:
            raise UsageError("SPEC", f"{where} is {data!r}; expected one of {', '.join(kind)}")
        return kind(data)
    accepted = (int, float) if kind is float else kind
    if not isinstance(data, accepted) or (isinstance(data, bool) and kind is not bool):
        raise UsageError("SPEC", f"{where} is {data!r}; expected {kind.__name__}")
    return data


def _decode_union(kinds: tuple[Any, ...], data: Any, where: str) -> Any:
    if data is None and type(None) in kinds:
        return None
    classes = [kind for kind in kinds if kind is not type(None)]
    if len(classes) == 1:
        return _decode(classes[0], data, where)
    tag = data.get(_TAG) if isinstance(data, dict) else None
    chosen = _TAGGED.get(tag) if isinstance(tag, str) else None
    if chosen not in classes:
        raise UsageError("SPEC", f"{where} has {_TAG} {tag!r}; expected one of {', '.join(_TAGGED)}")
    return _decode(chosen, data, where)


def _decode_dataclass(kind: Any, data: Any, where: str) -> Any:
    if not isinstance(data, dict):
        raise UsageError("SPEC", f"{where} is {type(data).__name__}; expected an object")
    hints = typing.get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    tags = {_TAG} if kind in _TAGGED.values() else set()
    unknown = sorted(set(data) - set(fields) - tags)
    if unknown:
        raise UsageError("SPEC", f"{where} has unknown fields {unknown}; expected {', '.join(fields)}")
    missing = [name for name, field in fields.items() if name not in data and field.default is dataclasses.MISSING]
    if missing:
        raise UsageError("SPEC", f"{where} lacks {', '.join(missing)}")
    return kind(**{name: _decode(hints[name], data[name], f"{where}.{name}") for name in fields if name in data})
