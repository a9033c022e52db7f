"""How a compact checkpoint says what is gone: config.json in each dialect, made from the one it came with."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Any, Final

from pyruntime.checkpoint.dialects import read_dialects
from pyruntime.checkpoint.dialects.declared import KIND_OF, plan_of
from pyruntime.checkpoint.families import with_shared_keys
from pyruntime.checkpoint.fields import Fields
from pyruntime.errors import UsageError
from pyruntime.spec import DropPlan
from pyruntime.spec.bounds import MAX_LAYERS


class WriteDialect(StrEnum):
    """What a written checkpoint says of its drops, and to whom (docs/formats.md)."""

    HF = "hf"
    LLM_DROP = "llm-drop"
    ZEROS = "zeros"


WRITE_DIALECTS: Final = tuple(str(each) for each in WriteDialect)
# what LLM-Drop has classes for, and which of them number the attentions in the cache anew
_LLM_DROP_TYPES: Final = ("llama", "mistral", "gemma2", "baichuan", "deepseek")
_LLM_DROP_SHIFTED: Final = ("llama", "mistral")
# they name code that is not copied
_CODE_KEYS: Final = ("auto_map", "trust_remote_code")
_LISTS: Final = {"drop_attn_list": "attention", "drop_mlp_list": "mlp"}
_TABLE: Final = "per_layer_config"


def write_dialect(name: str) -> WriteDialect:
    """The dialect called `name`. Raises UsageError DIALECT."""
    if name not in WRITE_DIALECTS:
        raise UsageError("DIALECT", f"dialect is {name!r}; expected one of {', '.join(WRITE_DIALECTS)}")
    return WriteDialect(name)


def silenced(config: Mapping[str, Any], plan: DropPlan) -> DropPlan:
    """What goes from a dense model: what `config` declares and what `plan` names, but not what never was there."""
    declared = read_dialects(Fields(with_shared_keys(config)), _num_layers(config))
    gone = declared.drops | plan
    never = {(kind, index) for kind in ("attention", "mlp") for index in getattr(declared.no_ops, kind)}
    left = (
        (index, kind) for kind in ("attention", "mlp") for index in getattr(gone, kind) if (kind, index) not in never
    )
    return plan_of(left, gone.origin)


def config_in(dialect: WriteDialect, config: Mapping[str, Any], gone: DropPlan) -> dict[str, Any]:
    """`config` as it says in `dialect` that `gone`, and nothing else, is dropped; sizes by layer stay."""
    lists = {key: list(getattr(gone, kind)) for key, kind in _LISTS.items()}
    new = {key: value for key, value in config.items() if key not in (*_CODE_KEYS, *_LISTS, _TABLE)}
    table = _layers(config, gone, say_skip=dialect is WriteDialect.HF, keep_sizes=dialect is WriteDialect.ZEROS)
    if table:
        # as wide as transformers writes them: sorted as texts, they are sorted as numbers
        width = len(str(max(table)))
        new[_TABLE] = {str(index).zfill(width): entry for index, entry in sorted(table.items())}
    if dialect is WriteDialect.LLM_DROP:
        new |= _older_rope(new)
    return new if dialect is WriteDialect.ZEROS else {**new, **lists}


def exact_in(dialect: WriteDialect, config: Mapping[str, Any], gone: DropPlan) -> tuple[str, ...]:
    """Who computes the pruned model from a folder with this `config`, which drops `gone` and nothing else.

    Others may compute something else, or fail.
    """
    if dialect is WriteDialect.ZEROS:
        return ("every reader of the unpruned model",)
    return ("pyruntime", "LLM-Drop") if _is_known(config, gone) else ("pyruntime",)


def _is_known(config: Mapping[str, Any], gone: DropPlan) -> bool:
    """Whether LLM-Drop's classes compute this model: its type and drops, its rope, and layers that are all alike."""
    if config.get("model_type") not in _LLM_DROP_TYPES:
        return False
    new, old = (config.get(key) or {} for key in ("rope_parameters", "rope_scaling"))
    # they read neither a theta nor a type in `rope_parameters`
    rope = new.get("rope_type", "default") == "default" and new.get("rope_theta") in (None, config.get("rope_theta"))
    rope = rope and old.keys() <= {"type", "factor"} and old.get("type", "linear") in ("linear", "dynamic")
    return (
        rope
        and _can_generate(config, gone)
        and not read_dialects(Fields(with_shared_keys(config)), _num_layers(config)).sizes
    )


def _can_generate(config: Mapping[str, Any], gone: DropPlan) -> bool:
    """Whether LLM-Drop's classes have a cache that fits the attentions that are left.

    Baichuan's and DeepSeek's read a variable that a dropped attention does not set. Gemma 2's chooses the window of a
    layer by its place in the cache, which an attention dropped before it shifts. Without any attention there is no
    cache that could count the tokens.
    """
    if config["model_type"] not in _LLM_DROP_SHIFTED:
        return not gone.attention
    return len(set(gone.attention)) < _num_layers(config)


def _older_rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """The rope where LLM-Drop's classes, which are older than `rope_parameters`, look for it."""
    parameters = config.get("rope_parameters") if config.get("model_type") in _LLM_DROP_TYPES else None
    if parameters is None or "rope_theta" not in parameters or "rope_theta" in config:
        return {}
    return {"rope_theta": parameters["rope_theta"]}


def _layers(
    config: Mapping[str, Any], gone: DropPlan, *, say_skip: bool, keep_sizes: bool
) -> dict[int, dict[str, Any]]:
    """`per_layer_config` by layer number; without `keep_sizes`, sublayers that are gone have none."""
    found: dict[int, dict[str, Any]] = {}
    said = {int(key): entry for key, entry in (config.get(_TABLE) or {}).items()}
    for index in range(_num_layers(config)):
        skip = [kind for kind in ("attention", "mlp") if index in getattr(gone, kind)]
        entry = {
            key: value
            for key, value in said.get(index, {}).items()
            if key != "skip" and (keep_sizes or KIND_OF.get(key) not in skip)
        }
        if skip and say_skip:
            entry["skip"] = skip
        if entry:
            found[index] = entry
    return found


def _num_layers(config: Mapping[str, Any]) -> int:
    return int(Fields(with_shared_keys(config)).integer("num_hidden_layers", 1, MAX_LAYERS))
