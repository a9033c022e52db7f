"""The JSON schema of the native format's config.json, made from the dataclasses of the specification.

`python -m tests.checkpoint.schema` writes docs/skipless.schema.json anew.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import types
import typing
from enum import StrEnum
from pathlib import Path
from typing import Any

from pyruntime.checkpoint.native import FORMAT_VERSION, NATIVE_TYPES, TOKEN_KEYS, native_config
from pyruntime.spec import Embedding, Head, Layer, Linear, ModelSpec
from pyruntime.spec.codec import _TAG, _TAGGED

FILE = Path(__file__).parents[2] / "docs" / "skipless.schema.json"
_SIMPLE = {int: "integer", float: "number", bool: "boolean", str: "string", type(None): "null"}


def schema() -> dict[str, Any]:
    """The whole schema (JSON Schema, draft 2020-12)."""
    found: dict[str, Any] = {}
    spec = _of(ModelSpec, found)
    embedding = Embedding(vocab_size=1, size=1)
    head = Head(linear=Linear(in_features=1, out_features=1), tied=False)
    layers = (Layer(index=0, attention=None, mlp=None),)
    least = ModelSpec(family="", embedding=embedding, layers=layers, final_norm=None, head=head, max_position=1)
    told = native_config(least, "float32", {})
    ids = {"anyOf": [{"type": "integer"}, {"type": "array", "items": {"type": "integer"}}]}
    keys: dict[str, Any] = {
        name: {"type": _SIMPLE[type(value)]} for name, value in told.items() if type(value) in _SIMPLE
    }
    keys |= {
        "model_type": {"enum": list(NATIVE_TYPES)},
        "format_version": {"const": FORMAT_VERSION},
        "architectures": {"type": "array", "items": {"type": "string"}},
        **dict.fromkeys(TOKEN_KEYS, ids),
        "spec": spec,
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "config.json of a model in pyruntime's own format",
        "type": "object",
        "properties": keys,
        "required": ["model_type", "format_version", "spec"],
        "additionalProperties": False,
        "$defs": dict(sorted(found.items())),
    }


def text() -> str:
    """The schema as its file holds it."""
    return json.dumps(schema(), indent=1) + "\n"


def _of(kind: Any, found: dict[str, Any]) -> dict[str, Any]:
    """The schema of a type; dataclasses and enums go into `found`."""
    if isinstance(kind, types.UnionType):
        return {"anyOf": [_of(each, found) for each in typing.get_args(kind)]}
    if typing.get_origin(kind) is tuple:
        return {"type": "array", "items": _of(typing.get_args(kind)[0], found)}
    if kind in _SIMPLE:
        return {"type": _SIMPLE[kind]}
    if kind.__name__ not in found:
        found[kind.__name__] = {}
        found[kind.__name__] |= _enum(kind) if issubclass(kind, StrEnum) else _object(kind, found)
    return {"$ref": f"#/$defs/{kind.__name__}"}


def _enum(kind: type[StrEnum]) -> dict[str, Any]:
    return {"description": _told(kind), "enum": [each.value for each in kind]}


def _object(kind: Any, found: dict[str, Any]) -> dict[str, Any]:
    hints = typing.get_type_hints(kind)
    fields = dataclasses.fields(kind)
    properties = {field.name: _of(hints[field.name], found) for field in fields}
    required = [field.name for field in fields if field.default is dataclasses.MISSING]
    tag = next((tag for tag, cls in _TAGGED.items() if cls is kind), None)
    if tag is not None:
        properties, required = {_TAG: {"const": tag}, **properties}, [_TAG, *required]
    return {
        "description": _told(kind),
        "type": "object",
        "properties": properties,
        "required": required,
        "additionalProperties": False,
    }


def _told(kind: Any) -> str:
    return " ".join((inspect.getdoc(kind) or "").split())


def faults(value: Any, rule: dict[str, Any], whole: dict[str, Any], where: str = "config") -> list[str]:
    """Where `value` does not follow `rule`: as much of JSON Schema as the schema uses."""
    if "$ref" in rule:
        return faults(value, whole["$defs"][rule["$ref"].rpartition("/")[2]], whole, where)
    if "anyOf" in rule:
        every = [faults(value, each, whole, where) for each in rule["anyOf"]]
        return [] if [] in every else [f"{where}: none of {len(every)} forms"]
    if "enum" in rule or "const" in rule:
        return [] if value in rule.get("enum", [rule.get("const")]) else [f"{where}: {value!r} is not allowed"]
    if not _is(value, rule["type"]):
        return [f"{where}: {value!r} is no {rule['type']}"]
    if rule["type"] == "array":
        return [fault for i, each in enumerate(value) for fault in faults(each, rule["items"], whole, f"{where}[{i}]")]
    if rule["type"] != "object":
        return []
    found = [f"{where}: lacks {name}" for name in rule["required"] if name not in value]
    for name, each in value.items():
        if name not in rule["properties"]:
            found.append(f"{where}: has {name}")
        else:
            found += faults(each, rule["properties"][name], whole, f"{where}.{name}")
    return found


def _is(value: Any, kind: str) -> bool:
    classes: dict[str, Any] = {"integer": int, "number": (int, float), "boolean": bool, "string": str, "array": list}
    classes |= {"object": dict, "null": type(None)}
    return isinstance(value, classes[kind]) and (kind == "boolean" or not isinstance(value, bool))


if __name__ == "__main__":
    FILE.write_text(text())
