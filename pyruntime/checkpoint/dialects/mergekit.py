"""mergekit's `slices` that take layers of one model in order: what is not taken, or scaled to nothing, is gone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

import yaml

from pyruntime.checkpoint.strict_json import nesting
from pyruntime.errors import UsageError
from pyruntime.spec import DropPlan

_MAX_BYTES: Final = 1 << 16
_MAX_DEPTH: Final = 16
# without influence on the weights where all of them come from one model
_HARMLESS: Final = frozenset(
    "base_model dtype out_dtype tokenizer_source tokenizer chat_template name merge_method slices parameters".split()
)
# the maps that end a sublayer, and the other tensors of a layer
_ENDS: Final = {"attention": "self_attn.o_proj.weight", "mlp": "mlp.down_proj.weight"}
_OTHERS: Final = (
    "self_attn.q_proj.weight self_attn.k_proj.weight self_attn.v_proj.weight mlp.gate_proj.weight mlp.up_proj.weight "
    "input_layernorm.weight post_attention_layernorm.weight"
).split()


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


def mergekit(data: Mapping[Any, Any], num_layers: int) -> DropPlan:
    """What the merge `data` leaves out of a model of `num_layers` layers.

    Raises UsageError DROP_PLAN for merges that do more: repeat, reorder, mix or scale.
    """
    _refuse_unknown(data, _HARMLESS, "the merge")
    if data.get("merge_method") != "passthrough":
        raise _more(f"merge_method is {_shown(data.get('merge_method'))}, which changes weights")
    model: str | None = None
    kept = {"attention": set[int](), "mlp": set[int]()}
    upto = 0
    for part, source in _sources(data):
        name = _model_of(source)
        if model not in (None, name):
            raise _more(f"it takes layers of {_shown(model)} and of {_shown(name)}")
        model = name
        begin, end = _layer_range(source, num_layers)
        if begin < upto:
            raise _more(f"layer {begin} is taken behind layer {upto - 1}, so layers repeat or change places")
        upto = end
        for kind in _kinds([source.get("parameters"), part.get("parameters"), data.get("parameters")]):
            kept[kind].update(range(begin, end))
    attention, mlp = (tuple(sorted(set(range(num_layers)) - kept[kind])) for kind in _ENDS)
    return DropPlan(attention, mlp, "mergekit slices")


def _more(why: str) -> UsageError:
    return UsageError("DROP_PLAN", f"this merge does more than leave sublayers out: {why}; run it and load its result")


def _shown(value: Any) -> str:
    # not the value of an object: aliases can make it endless
    return ascii(value[:80]) if isinstance(value, str) else f"a {type(value).__name__}"


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


def _kinds(places: list[Any]) -> Iterator[str]:
    """The sublayers that stay: those whose last map is not scaled to zero. Nothing else may be scaled."""
    settings = []
    for parameters in places:
        if parameters is None:
            continue
        if not isinstance(parameters, dict):
            raise UsageError("DROP_PLAN", f"parameters is {_shown(parameters)}; expected an object")
        _refuse_unknown(parameters, frozenset({"scale"}), "parameters")
        settings.append(parameters.get("scale"))
    for name in _OTHERS:
        if (scale := _scale(name, settings)) != 1:
            raise _more(f"{name} is scaled by {scale:g}")
    for kind, name in _ENDS.items():
        scale = _scale(name, settings)
        if scale not in (0, 1):
            raise _more(f"{name} is scaled by {scale:g}")
        if scale:
            yield kind


def _scale(name: str, settings: list[Any]) -> float:
    """The first setting that is for the tensor, from the innermost place outwards; 1 where there is none."""
    for setting in settings:
        for condition in setting if isinstance(setting, list) else [] if setting is None else [{"value": setting}]:
            if not isinstance(condition, dict):
                raise _more("a scale changes from layer to layer")
            _refuse_unknown(condition, frozenset({"filter", "value"}), "a scale")
            wanted = condition.get("filter", "*")
            if not isinstance(wanted, str) or any(letter.isdigit() for letter in wanted):
                raise _more(f"a scale is filtered by {_shown(wanted)}")
            if wanted == "*" or wanted in name:
                return _number(condition.get("value"))
    return 1.0


def _number(value: Any) -> float:
    try:
        return float(value) if isinstance(value, str) and len(value) < 40 else float("nan")
    except ValueError:
        raise _more(f"a scale is {_shown(value)}") from None
