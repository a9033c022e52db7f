"""A checkpoint folder to a Model: configuration first, then headers, then names and shapes; no tensor byte is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pyruntime.checkpoint.as_stored import Stored, as_stored
from pyruntime.checkpoint.bind import bind
from pyruntime.checkpoint.config_keys import notes_on_keys, refuse_unsupported
from pyruntime.checkpoint.dialects import Declared, read_dialects
from pyruntime.checkpoint.dialects.effect import check_overrides, readable
from pyruntime.checkpoint.dialects.names import looks_wrong, names_of
from pyruntime.checkpoint.families import FAMILIES, Family, with_shared_keys
from pyruntime.checkpoint.fields import Fields
from pyruntime.checkpoint.files import listed
from pyruntime.checkpoint.folder import ReadOptions, StoredTensor, open_tensors, unread_files
from pyruntime.checkpoint.manifest import check_manifest
from pyruntime.checkpoint.model import Model
from pyruntime.checkpoint.native import MAX_NATIVE_BYTES, NATIVE_TYPES, is_native, read_native
from pyruntime.checkpoint.strict_json import MAX_CONFIG_BYTES, parse, read_bytes
from pyruntime.errors import CheckpointError, UsageError
from pyruntime.spec import Linear, ModelSpec, Replacement, drop_sublayers, weight_shapes
from pyruntime.spec.bounds import MAX_LAYERS


def read_model(folder: Path, options: ReadOptions = ReadOptions()) -> Model:
    """The model in `folder`, with the drops that its config.json declares.

    Raises UsageError CONFIG or DROP for what config.json says, CheckpointError for what the files hold, RunError IO.
    """
    check_manifest(folder)
    config = _config(folder / "config.json")
    model = read_native(folder, config, options) if is_native(config) else read_as(folder, config, options)
    conflict = model.dtype_conflict
    return model if conflict is None else replace(model, notes=(*model.notes, conflict))


def _config(path: Path) -> dict[str, Any]:
    text = read_bytes(path, "CONFIG", MAX_NATIVE_BYTES)
    # a long one may hold column maps; any other is no configuration
    if len(text) > MAX_CONFIG_BYTES and b'"format_version"' not in text:
        raise CheckpointError("CONFIG", f"{path.name}: has {len(text)} bytes; at most {MAX_CONFIG_BYTES} are read")
    config = parse(text, path.name, "CONFIG")
    if not isinstance(config, dict):
        raise CheckpointError("CONFIG", f"{path.name}: holds a {type(config).__name__}; expected a JSON object")
    return config


def read_as(folder: Path, config: Mapping[str, Any], options: ReadOptions) -> Model:
    """The weights in `folder` as `config`, which is of one of the families, describes them. Raises as `read_model`."""
    fields = Fields(with_shared_keys(config))
    family = _family(config).of(fields)
    refuse_unsupported(fields)
    num_layers = fields.integer("num_hidden_layers", 1, MAX_LAYERS)
    declared = read_dialects(fields, num_layers)
    whole = _whole_spec(family, fields, declared)
    dense = drop_sublayers(whole, declared.no_ops)
    spec = drop_sublayers(dense, declared.drops)
    notes = declared.notes + looks_wrong(names_of(folder, config), declared.gone) + _context(fields, spec)
    notes += notes_on_keys(fields, family, spec, options.ignore_config_keys)
    found = _open(folder, options, declared)
    notes += unread_files(folder, found.values())
    # what never was there by the configuration may lie in the files all the same, as what was dropped may
    stored = Stored(spec=spec, dense=dense, whole=whole, family=family, tensors=found)
    stored = as_stored(stored, fields, declared.overrides)
    weights, dtype = bind(stored)
    return Model(
        spec=stored.spec,
        dense_spec=stored.dense,
        weights=weights,
        dtype=dtype,
        path=folder,
        config=config,
        notes=notes + stored.notes,
        declared=declared.said,
        unread_bytes=_unread_bytes(stored),
    )


def _family(config: Mapping[str, Any]) -> Family:
    model_type, base = config.get("model_type"), config.get("base_architecture")
    if isinstance(model_type, str) and model_type in FAMILIES:
        return FAMILIES[model_type]
    # exports of Puzzletron that name a type of their own also name the class of the model they were made from
    of_base = {f"{name.replace('_', '')}forcausallm": family for name, family in FAMILIES.items()}
    if isinstance(base, str) and base.lower() in of_base:
        return of_base[base.lower()]
    raise UsageError(
        "CONFIG", f"model_type is {model_type!r}; supported: {', '.join(sorted((*FAMILIES, *NATIVE_TYPES)))}"
    )


def _open(folder: Path, options: ReadOptions, declared: Declared) -> dict[str, StoredTensor]:
    try:
        return open_tensors(folder, options)
    except CheckpointError as error:
        # LLM-Drop publishes folders of a configuration alone
        if not declared.drops or any(name.endswith(".safetensors") for name in listed(folder)):
            raise
        advice = f"{error}, or name the base model and this folder as its drop plan (--drop-plan {folder})"
        raise CheckpointError(error.code, advice) from None


def _unread_bytes(stored: Stored) -> int:
    """Bytes that the files hold of sublayers that the model goes without."""
    gone = weight_shapes(stored.whole).keys() - weight_shapes(stored.spec).keys()
    names = {stored.family.tensor_name(weight) for weight in gone}
    return sum(stored.tensors[name].info.num_bytes for name in names & stored.tensors.keys())


def _whole_spec(family: Family, fields: Fields, declared: Declared) -> ModelSpec:
    """The model with everything that its layers could have, no-ops included."""
    try:
        spec = family.spec(fields.with_layer_overrides(readable(declared.sizes, family)))
        check_overrides(spec, declared.overrides, declared.replaced)
    except UsageError as error:
        # what each value may be is checked by Fields; how they fit together, by the specification
        raise UsageError("CONFIG", f"config.json: {error}" if error.code == "SPEC" else str(error)) from None
    layers = list(spec.layers)
    for index, kind in declared.linear:
        if f"layers.{{}}.{kind}.linear" not in family.names:
            raise UsageError("CONFIG", f"{spec.family} has no name for a linear map in place of a sublayer")
        sublayer = getattr(layers[index], kind)
        whole = Linear(in_features=sublayer.in_size, out_features=sublayer.out_size)
        one = Replacement(linear=whole, pre=sublayer.pre, post=sublayer.post)
        layer = layers[index]
        layers[index] = replace(layer, attention=one) if kind == "attention" else replace(layer, mlp=one)
    return replace(spec, layers=tuple(layers))


def _context(fields: Fields, spec: ModelSpec) -> tuple[str, ...]:
    said = fields.raw("max_position_embeddings", spec.max_position)
    if said == spec.max_position:
        return ()
    return (
        f"the context is {spec.max_position} tokens, not {said}: beyond that longrope changes keys that are cached",
    )
