"""A checkpoint folder to a Model: configuration first, then headers, then names and shapes; no tensor byte is read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from pyruntime.checkpoint.dialects import llm_drop_plan, per_layer_overrides
from pyruntime.checkpoint.families import FAMILIES, Family
from pyruntime.checkpoint.fields import Fields
from pyruntime.checkpoint.folder import StoredTensor, open_tensors
from pyruntime.checkpoint.model import Model
from pyruntime.checkpoint.strict_json import read_object
from pyruntime.checkpoint.weight import TORCH_DTYPES, TensorRef, Weight
from pyruntime.errors import CheckpointError, UsageError
from pyruntime.spec import DropPlan, ModelSpec, drop_sublayers, weight_shapes
from pyruntime.spec.bounds import MAX_LAYERS

_DTYPE_NAMES: Final = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
# present in every Hugging Face folder, without influence on the logits; tokens are generation's business
_COMMON_KEYS: Final = frozenset(
    "architectures model_type torch_dtype dtype transformers_version _name_or_path use_cache bos_token_id eos_token_id "
    "pad_token_id unk_token_id return_dict output_attentions output_hidden_states".split()
)
# said once when present: they would run code of the checkpoint's author elsewhere, never here
_CODE_KEYS: Final = ("auto_map", "trust_remote_code", "_attn_implementation_internal")
_REFUSED_KEYS: Final = {
    "quantization_config": "quantised weights are not supported; use the unquantised checkpoint",
    "block_configs": "the block_configs dialect is not supported yet; use per_layer_config",
}


def read_model(folder: Path) -> Model:
    """The model in `folder`, with the drops that its config.json declares.

    Raises UsageError CONFIG or DROP for what config.json says, CheckpointError for what the files hold.
    """
    config = read_object(folder / "config.json", "CONFIG")
    family = _family(config)
    fields = Fields(config)
    for key, why in _REFUSED_KEYS.items():
        if fields.raw(key) is not None:
            raise UsageError("CONFIG", f"config.json has {key}: {why}")
    num_layers = fields.integer("num_hidden_layers", 1, MAX_LAYERS)
    skipped, overrides = per_layer_overrides(fields, num_layers)
    listed, notes = llm_drop_plan(fields, num_layers)
    dense = _dense_spec(family, fields.with_layer_overrides(overrides))
    spec = drop_sublayers(dense, skipped | listed)
    notes += _agreement(skipped, listed) + _ignored(fields, family)
    stored: Mapping[str, StoredTensor] = open_tensors(folder)
    if spec.head.tied and family.tensor_name("head.weight") in stored:
        spec, dense, stored, head_note = _stored_head(spec, dense, family, stored)
        notes += (head_note,)
    weights, dtype = _bind(spec, dense, family, stored)
    return Model(spec=spec, dense_spec=dense, weights=weights, dtype=dtype, path=folder, config=config, notes=notes)


def _family(config: Mapping[str, Any]) -> Family:
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise UsageError("CONFIG", f"model_type is {model_type!r}; supported: {', '.join(sorted(FAMILIES))}")
    return FAMILIES[model_type]


def _dense_spec(family: Family, fields: Fields) -> ModelSpec:
    try:
        return family.spec(fields)
    except UsageError as error:
        # what each value may be is checked by Fields; how they fit together, by the specification
        raise UsageError("CONFIG", f"config.json: {error}" if error.code == "SPEC" else str(error)) from None


def _agreement(skipped: DropPlan, listed: DropPlan) -> tuple[str, ...]:
    if skipped and listed and (skipped.attention, skipped.mlp) != (listed.attention, listed.mlp):
        return ("per_layer_config and the drop lists differ; everything that either drops is dropped",)
    return ()


def _ignored(fields: Fields, family: Family) -> tuple[str, ...]:
    code = tuple(f"{key} is ignored: no code of a checkpoint is ever run" for key in _CODE_KEYS if fields.raw(key))
    fields.ignore(_COMMON_KEYS | family.harmless)
    unknown = [key[:80] if key.isprintable() else repr(key[:80]) for key in fields.unused()]
    return code + (
        (f"config.json has {len(unknown)} keys that pyruntime does not know: {_some(unknown)}",) if unknown else ()
    )


def _stored_head(
    spec: ModelSpec, dense: ModelSpec, family: Family, stored: Mapping[str, StoredTensor]
) -> tuple[ModelSpec, ModelSpec, Mapping[str, StoredTensor], str]:
    """What a tied head means where the files hold one all the same: as transformers reads them."""
    head, embedding = family.tensor_name("head.weight"), family.tensor_name("embedding.weight")
    if embedding not in stored:
        return spec, dense, {**stored, embedding: stored[head]}, f"the head is tied; {head} serves as embedding too"
    # transformers ties two stored tensors only if they are equal, so the stored head is right in either case
    untied = replace(spec.head, tied=False)
    note = f"config.json ties the head, but {head} is stored beside {embedding}; the stored head is used"
    return replace(spec, head=untied), replace(dense, head=untied), stored, note


def _bind(
    spec: ModelSpec, dense: ModelSpec, family: Family, stored: Mapping[str, StoredTensor]
) -> tuple[dict[str, Weight], str]:
    wanted = weight_shapes(spec)
    names = {weight: family.tensor_name(weight) for weight in wanted}
    _check_names(set(names.values()), dense, family, stored)
    weights: dict[str, Weight] = {}
    for weight, shape in wanted.items():
        name = names[weight]
        shard, info = stored[name].shard, stored[name].info
        if info.shape != shape:
            raise CheckpointError(
                "SHAPE", f"{shard.path.name}: {name} is {list(info.shape)}; config.json implies {list(shape)}"
            )
        if info.dtype not in TORCH_DTYPES:
            raise CheckpointError(
                "DTYPE", f"{shard.path.name}: {name} is {info.dtype}; supported: {', '.join(TORCH_DTYPES)}"
            )
        weights[weight] = TensorRef(shard, name, info.dtype, shape, info.start, info.num_bytes)
    # the dtype of most of the bytes: some checkpoints keep their norms in float32
    num_bytes: Counter[str] = Counter()
    for name in names.values():
        num_bytes[stored[name].info.dtype] += stored[name].info.num_bytes
    return weights, _DTYPE_NAMES[num_bytes.most_common(1)[0][0]]


def _check_names(wanted: set[str], dense: ModelSpec, family: Family, stored: Mapping[str, StoredTensor]) -> None:
    missing = sorted(wanted - set(stored))
    if missing:
        raise CheckpointError("MISSING_TENSOR", f"{len(missing)} tensors are missing: {_some(missing)}")
    known = {family.tensor_name(weight) for weight in weight_shapes(dense)} | {family.tensor_name("head.weight")}
    extra = sorted(name for name in set(stored) - known if not any(part in name for part in family.stale))
    if extra:
        raise CheckpointError(
            "UNEXPECTED_TENSOR", f"{len(extra)} tensors do not belong to this architecture: {_some(extra)}"
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
