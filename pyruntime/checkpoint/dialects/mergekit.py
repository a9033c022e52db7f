"""mergekit's `slices` that take layers of one model in order: what is not taken, or scaled to nothing, is gone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, Final

import yaml

from pyruntime.checkpoint.dialects.declared import plan_of
from pyruntime.checkpoint.families import Family
from pyruntime.checkpoint.strict_json import nesting
from pyruntime.errors import UsageError
from pyruntime.spec import (
    MLP,
    Attention,
    DropPlan,
    ModelSpec,
    MoE,
    NormKind,
    Replacement,
    sublayer_prefix,
    weight_shapes,
)
from pyruntime.spec.model import Sublayer

_MAX_BYTES: Final = 1 << 16
_MAX_DEPTH: Final = 16
# without influence on the weights where all of them come from one model
_HARMLESS: Final = frozenset(
    "base_model dtype out_dtype tokenizer_source tokenizer chat_template name merge_method slices parameters".split()
)
# norms that give zero where their weight is zero
_PLAIN_NORMS: Final = (NormKind.RMS, NormKind.LAYER)
# what a part of a tensor's name ("" for every tensor) scales it by; the first that fits counts
_Scales = tuple[tuple[str, float], ...]


class _Texts(yaml.BaseLoader):  # type: ignore[misc]
    """Objects, lists and texts: no number, date or merge key is made of a text, and no key may stand twice."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        found: dict[Any, Any] = super().construct_mapping(node, deep)
        if len(found) != len(node.value):
            raise yaml.constructor.ConstructorError(None, None, "a key stands twice in one object", node.start_mark)
        return found


def parse_yaml(text: bytes) -> Any:
    """The YAML in `text` as objects, lists and texts. Raises UsageError DROP_PLAN."""
    # its parser needs ten seconds for a megabyte, and one for a thousand lists inside each other
    if len(text) > _MAX_BYTES:
        raise UsageError("DROP_PLAN", f"is no JSON, and has {len(text)} bytes; at most {_MAX_BYTES} of YAML are read")
    if nesting(text, _MAX_DEPTH) > _MAX_DEPTH:
        raise UsageError("DROP_PLAN", f"is nested deeper than {_MAX_DEPTH} levels; a merge needs five")
    try:
        return _Texts(text).get_single_data()
    # a number in an escape may be no character
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        where = "" if mark is None else f", line {mark.line + 1}: {getattr(error, 'problem', None)}"
        raise UsageError("DROP_PLAN", f"is neither JSON nor YAML ({type(error).__name__}{where})") from None


def mergekit(data: Mapping[Any, Any], spec: ModelSpec, family: Family | None) -> DropPlan:
    """What the merge `data` leaves out of the model that `spec` describes; `family` knows what its tensors are called.

    Raises UsageError DROP_PLAN for merges that do more: repeat, reorder, mix or scale.
    """
    _refuse_unknown(data, _HARMLESS, "the merge")
    if data.get("merge_method") != "passthrough":
        raise _more(f"merge_method is {_shown(data.get('merge_method'))}, which changes weights")
    model: str | None = None
    taken: dict[int, _Scales] = {}
    for part, source in _sources(data):
        name = _model_of(source)
        if model not in (None, name):
            raise _more(f"it takes layers of {_shown(model)} and of {_shown(name)}")
        model = name
        begin, end = _layer_range(source, len(spec.layers))
        last = max(taken, default=-1)
        if begin <= last:
            raise _more(f"layer {begin} is taken behind layer {last}, so layers repeat or change places")
        places = [each.get("parameters") for each in (source, part, data)]
        taken.update(dict.fromkeys(range(begin, end), tuple(_scales(places))))
    not_taken = tuple(index for index in range(len(spec.layers)) if index not in taken)
    silent = _silent(spec, family, taken) if any(taken.values()) else DropPlan()
    return DropPlan(not_taken + silent.attention, not_taken + silent.mlp, "mergekit slices")


def _more(why: str) -> UsageError:
    return UsageError("DROP_PLAN", f"this merge does more than leave sublayers out: {why}; run it and load its result")


def _shown(value: Any) -> str:
    # not the value of an object: aliases can make it endless
    if isinstance(value, str):
        return ascii(value[:80])
    return "nothing" if value is None else "an object" if isinstance(value, dict) else "a list"


def _refuse_unknown(entry: Mapping[Any, Any], known: frozenset[str], where: str) -> None:
    unknown = [key for key in entry if key not in known]
    if unknown:
        raise _more(f"{where} has {_shown(unknown[0])}")


def _sources(data: Mapping[Any, Any]) -> Iterator[tuple[Mapping[Any, Any], Mapping[Any, Any]]]:
    slices = data.get("slices")
    if not isinstance(slices, list) or not slices:
        raise UsageError("DROP_PLAN", "slices is no list of slices; expected mergekit's form")
    for index, part in enumerate(slices):
        sources = part.get("sources") if isinstance(part, dict) else None
        if not isinstance(sources, list) or not sources or not all(isinstance(each, dict) for each in sources):
            raise UsageError("DROP_PLAN", f"slices[{index}] has no list of sources; expected mergekit's form")
        if len(sources) > 1:
            raise _more(f"slices[{index}] mixes {len(sources)} sources")
        _refuse_unknown(part, frozenset({"sources", "parameters"}), f"slices[{index}]")
        _refuse_unknown(sources[0], frozenset({"model", "layer_range", "parameters"}), f"a source of slices[{index}]")
        yield part, sources[0]


def _model_of(source: Mapping[Any, Any]) -> str:
    model = source.get("model")
    if isinstance(model, dict) and isinstance(model.get("model"), dict) and len(model) == 1:
        # the long form: {"model": {"path": ...}}
        model = model["model"].get("path")
    if not isinstance(model, str):
        raise UsageError("DROP_PLAN", f"a source has {_shown(model)} for its model; expected the name of one")
    return model


def _layer_range(source: Mapping[Any, Any], num_layers: int) -> tuple[int, int]:
    ends = source.get("layer_range")
    texts = ends if isinstance(ends, list) and all(isinstance(each, str) for each in ends) else []
    numbers = [int(each) for each in texts if each.isascii() and each.isdecimal() and len(each) <= 6]
    if len(numbers) != 2 or len(texts) != 2 or not numbers[0] < numbers[1] <= num_layers:
        said = f"[{', '.join(map(_shown, texts))}]" if texts else _shown(ends)
        raise UsageError(
            "DROP_PLAN", f"layer_range is {said[:200]}; expected [first, end] with first < end <= {num_layers}"
        )
    return numbers[0], numbers[1]


def _scales(places: list[Any]) -> Iterator[tuple[str, float]]:
    """What the places say of scales, from the innermost outwards."""
    for parameters in places:
        if parameters is None:
            continue
        if not isinstance(parameters, dict):
            raise UsageError("DROP_PLAN", f"parameters is {_shown(parameters)}; expected an object")
        _refuse_unknown(parameters, frozenset({"scale"}), "parameters")
        setting = parameters.get("scale", [])
        for condition in setting if isinstance(setting, list) else [{"value": setting}]:
            if not isinstance(condition, dict):
                raise _more("a scale changes from layer to layer")
            _refuse_unknown(condition, frozenset({"filter", "value"}), "a scale")
            wanted = condition.get("filter", "*")
            if not isinstance(wanted, str):
                raise UsageError("DROP_PLAN", f"a scale is filtered by {_shown(wanted)}; expected a part of a name")
            yield "" if wanted == "*" else wanted, _number(condition.get("value"))


def _number(value: Any) -> float:
    try:
        number = float(value) if isinstance(value, str) and len(value) < 40 else math.nan
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise _more(f"a scale is {_shown(value)}")
    return number


def _silent(spec: ModelSpec, family: Family | None, taken: Mapping[int, _Scales]) -> DropPlan:
    """The sublayers that add zero because of the scales in the layers that are `taken`. No other tensor may change."""
    if family is None:
        raise _more(f"it scales, and what the tensors of {spec.family} are called is not known here")
    names = {weight: family.tensor_name(weight) for weight in weight_shapes(spec)}
    _refuse_lost(taken, names)
    scales = {weight: _scale(name, _of_weight(weight, taken)) for weight, name in names.items()}
    silent = {
        (layer.index, kind)
        for layer in spec.layers
        for kind, sublayer in layer.sublayers()
        if _adds_zero(sublayer, sublayer_prefix(layer.index, kind), scales)
    }
    prefixes = tuple(sublayer_prefix(*each) for each in silent)
    for weight, scale in scales.items():
        # what else a sublayer that adds zero has may be zero too
        if scale != 1 and not (scale == 0 and weight.startswith(prefixes)):
            raise _more(f"{names[weight]} is scaled by {scale:g}")
    return plan_of(silent)


def _refuse_lost(taken: Mapping[int, _Scales], names: Mapping[str, str]) -> None:
    for wanted in dict.fromkeys(wanted for scales in taken.values() for wanted, _ in scales):
        if not any(wanted in name for name in names.values()):
            raise UsageError(
                "DROP_PLAN",
                f"a scale is filtered by {_shown(wanted)}, which no tensor of this model has in its name (one is "
                f"{list(names.values())[len(names) // 2]}); correct or remove it",
            )


def _of_weight(weight: str, taken: Mapping[int, _Scales]) -> _Scales:
    """The scales that count for `weight`: the embedding's are the first slice's, those behind the layers the last's."""
    stem, _, rest = weight.partition(".")
    if stem == "layers":
        # a layer that is not taken is gone whatever it is scaled by
        return taken.get(int(rest.split(".")[0]), ())
    return taken[min(taken) if stem == "embedding" else max(taken)]


def _scale(name: str, scales: _Scales) -> float:
    return next((scale for wanted, scale in scales if wanted in name), 1.0)


def _adds_zero(sublayer: Sublayer, prefix: str, scales: Mapping[str, float]) -> bool:
    """Whether the last maps give zero and no norm behind them adds to that, or that norm itself gives zero."""
    post = sublayer.post
    if post is not None and post.kind in _PLAIN_NORMS and _is_zero(f"{prefix}post", scales):
        return True
    if post is not None and post.bias:
        return False
    return all(_is_zero(prefix + name, scales) for name in _last_maps(sublayer))


def _last_maps(sublayer: Sublayer) -> list[str]:
    match sublayer:
        case Attention():
            return ["o"]
        case Replacement():
            return ["linear"]
        case MLP():
            return ["down"]
        case MoE():
            experts = [f"experts.{index}.down" for index in range(sublayer.num_experts)]
            return [*experts, "shared.down"] if sublayer.shared is not None else experts


def _is_zero(stem: str, scales: Mapping[str, float]) -> bool:
    own = [scales[weight] for weight in (f"{stem}.weight", f"{stem}.bias") if weight in scales]
    return bool(own) and not any(own)
