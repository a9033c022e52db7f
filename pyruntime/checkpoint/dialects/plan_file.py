"""One door for files that say which sublayers go: what a file is shows from what it holds, not from its name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from pyruntime.checkpoint.dialects import read_dialects
from pyruntime.checkpoint.dialects.effect import check_overrides
from pyruntime.checkpoint.dialects.layer_files import block_pruner, layer_mapping, reserved_layers
from pyruntime.checkpoint.dialects.mergekit import mergekit, parse_yaml
from pyruntime.checkpoint.dialects.names import looks_wrong, names_of
from pyruntime.checkpoint.families import FAMILIES, with_shared_keys
from pyruntime.checkpoint.fields import Fields, some
from pyruntime.checkpoint.files import is_there
from pyruntime.checkpoint.strict_json import MAX_CONFIG_BYTES, parse, read_bytes, read_object
from pyruntime.errors import CheckpointError, UsageError
from pyruntime.spec import DropPlan, ModelSpec
from pyruntime.spec.bounds import MAX_LAYERS

_CONFIG: Final = "config.json"
_MAPPING: Final = "layer_mapping.json"
_CODE: Final = "DROP_PLAN"
_MAX_STEP_DIGITS: Final = 6


def read_plan(said: str | Path, spec: ModelSpec | None = None) -> DropPlan:
    """The plan in the file `said`, or in config.json of the folder `said`, for the model that `spec` describes.

    `said` may end in #choice where a file holds several. Without `spec`, files that need the number of layers or sizes
    of the model are refused. Raises UsageError DROP_PLAN, or RunError IO.
    """
    try:
        path, choice = _choice(Path(said))
        return _read(path, choice, spec)
    except (CheckpointError, UsageError) as error:
        raise UsageError(_CODE, f"{said}: {error}") from None


def _choice(path: Path) -> tuple[Path, str | None]:
    name, mark, choice = path.name.rpartition("#")
    if not mark or not name or is_there(path):
        return path, None
    return path.with_name(name), choice


def _read(path: Path, choice: str | None, spec: ModelSpec | None) -> DropPlan:
    if path.is_dir():
        path = path / _CONFIG
    text = read_bytes(path, _CODE, MAX_CONFIG_BYTES)
    is_json = text.lstrip()[:1] in (b"{", b"[", b"")
    data = parse(text, path.name, _CODE) if is_json else parse_yaml(text)
    if is_json and _is_numbered(data, list):
        return block_pruner(data, choice)
    if is_json and isinstance(data, list):
        return reserved_layers(data, _mapping_beside(path), len(_needed(spec).layers), choice)
    if choice is not None:
        raise UsageError(
            _CODE, f"#{choice[:80]} chooses nothing here; only BlockPruner's files and kept layers need it"
        )
    if is_json and _is_numbered(data, int):
        return layer_mapping(data, len(_needed(spec).layers))
    if is_json and isinstance(data, dict) and "num_hidden_layers" in with_shared_keys(data):
        return _of_config(with_shared_keys(data), path, spec)
    if not is_json and isinstance(data, dict) and "slices" in data:
        known = _needed(spec)
        return mergekit(data, known, FAMILIES.get(known.family))
    if is_json and isinstance(data, dict) and "format" in data:
        return DropPlan.from_json(data)
    raise UsageError(
        _CODE,
        "this is no drop plan; expected pyruntime's own, a config.json, lists of BlockPruner or LLM-Drop, or slices of "
        "mergekit (docs/dropping.md)",
    )


def _is_numbered(data: Any, kind: type) -> bool:
    """Whether `data` is an object whose keys are numbers and whose values are all of `kind`."""
    return (
        isinstance(data, dict)
        and bool(data)
        and all(key.isascii() and key.isdecimal() and len(key) <= _MAX_STEP_DIGITS for key in data)
        and all(type(value) is kind for value in data.values())
    )


def _needed(spec: ModelSpec | None) -> ModelSpec:
    if spec is None:
        raise UsageError(_CODE, "what this file drops depends on the number of layers; read it for a model")
    return spec


def _mapping_beside(path: Path) -> Mapping[str, Any] | None:
    beside = path.with_name(_MAPPING)
    return read_object(beside, _CODE) if is_there(beside) else None


def _of_config(config: Mapping[str, Any], path: Path, spec: ModelSpec | None) -> DropPlan:
    """What a configuration leaves out of its base model; the name of its folder is checked against it."""
    fields = Fields(config)
    num_layers = fields.integer("num_hidden_layers", 1, MAX_LAYERS)
    if spec is not None and num_layers != len(spec.layers):
        raise UsageError(
            _CODE,
            f"num_hidden_layers is {num_layers}; the model has {len(spec.layers)} layers; use the plan of this model",
        )
    declared = read_dialects(fields, num_layers)
    if not declared.gone:
        raise UsageError(_CODE, "this configuration drops nothing; expected drop lists, skips or no-ops")
    if declared.linear:
        raise UsageError(_CODE, "this configuration also replaces sublayers by linear maps; load its own weights")
    if spec is None and declared.overrides:
        raise UsageError(_CODE, "this configuration also gives sizes by layer; read it for a model")
    if spec is not None:
        check_overrides(spec, declared.overrides)
    folder = path.absolute().parent
    wrong = looks_wrong(names_of(folder, config), declared.gone)
    origin = f"{declared.gone.origin} of {some([folder.name])}/{path.name}"
    return DropPlan(declared.gone.attention, declared.gone.mlp, " - ".join([origin, *wrong]))
