"""Dropping sublayers: the pass, the ways to say which, and the report of what it saved."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from pyruntime.checkpoint import Model, PassReport
from pyruntime.checkpoint.atomic import write_text
from pyruntime.checkpoint.dialects.plan_file import read_plan
from pyruntime.errors import UsageError
from pyruntime.spec import DropPlan, ModelSpec, drop_sublayers, weight_shapes

Layers = str | Sequence[int]

_RANGE: Final = re.compile(r"(\d{1,6})(?:-(\d{1,6})(?:\+(\d{1,6}))?)?", re.ASCII)
_LAST: Final = re.compile(r"last:(\d{1,6})(:keep-last)?", re.ASCII)


def drop(model: Model, plan: DropPlan) -> Model:
    """`model` without the sublayers that `plan` names: their weights are forgotten, their cache never exists.

    Approximate, unlike every other pass. Raises UsageError DROP for layers that do not exist and for sublayers without
    residual.
    """
    spec = drop_sublayers(model.spec, plan)
    kept = weight_shapes(spec)
    gone = {name: weight for name, weight in model.weights.items() if name not in kept}
    already = tuple(
        f"{name} {index} was gone already"
        for kind, name in (("attention", "attention"), ("mlp", "MLP"))
        for index in sorted(set(getattr(plan, kind)) & set(model.spec.dropped(kind)))
    )
    report = PassReport(
        name=f"drop ({plan.origin})" if plan.origin else "drop",
        removed=tuple(
            f"{kind} {index}"
            for kind in ("attention", "mlp")
            for index in sorted(set(spec.dropped(kind)) - set(model.spec.dropped(kind)))
        ),
        num_weights=sum(math.prod(weight.shape) for weight in gone.values()),
        weight_bytes=sum(weight.num_bytes for weight in gone.values()),
        kv_values_per_token=kv_values_per_token(model.spec) - kv_values_per_token(spec),
        notes=already,
    )
    weights = {name: model.weights[name] for name in kept}
    return replace(model, spec=spec, weights=weights, reports=(*model.reports, report))


def kv_values_per_token(spec: ModelSpec) -> int:
    """Values that one token leaves in the cache, over all kept attentions."""
    return sum(attention.cached_size for _, attention in spec.attentions())


def make_drop_plan(
    spec: ModelSpec,
    *,
    drop_attn: Layers | None = None,
    drop_mlp: Layers | None = None,
    drop_block: Layers | None = None,
    drop_plan: DropPlan | Mapping[str, Any] | str | Path | None = None,
) -> DropPlan:
    """One plan from all the ways to say it: layers by number or text (`parse_layers`); a plan, its JSON or its file.

    `drop_block` drops attention and MLP of a layer. The rules "last:k" count the sublayers that
    `spec` has without what `drop_plan` names.
    """
    match drop_plan:
        case None:
            plan = DropPlan()
        case DropPlan():
            plan = drop_plan
        case str() | Path():
            plan = load_drop_plan(drop_plan, spec)
        case _:
            plan = DropPlan.from_json(drop_plan)
    # the rules count what is left: what the checkpoint lacks and what the plan names is gone already
    spec = drop_sublayers(spec, plan)
    blocks = _layers(drop_block, _kept(spec, "block"), spec)
    said = DropPlan(
        _layers(drop_attn, _kept(spec, "attention"), spec) + blocks,
        _layers(drop_mlp, _kept(spec, "mlp"), spec) + blocks,
        "asked for" if drop_attn or drop_mlp or drop_block else "",
    )
    return plan | said


def parse_layers(text: str, kept: Sequence[int]) -> tuple[int, ...]:
    """Layer numbers in `text`: "25,26", "20-30", "20-30+2" (every second), or a rule over the `kept` layers.

    The rules are those of Tyukin et al. (arXiv 2407.15516): "last:8" the last eight, "last:8:keep-last" the eight
    before the very last one. Raises UsageError DROP.
    """
    rule = _LAST.fullmatch(text.strip())
    if rule:
        return _last(int(rule[1]), bool(rule[2]), kept)
    layers: list[int] = []
    for part in text.split(","):
        match = _RANGE.fullmatch(part.strip())
        if match is None:
            raise UsageError(
                "DROP",
                f"{part.strip()!r} names no layers; expected 25,26 or 20-30 or 20-30+2 or last:8 or last:8:keep-last",
            )
        first, last, step = int(match[1]), int(match[2] or match[1]), int(match[3] or 1)
        if last < first or step < 1:
            raise UsageError("DROP", f"the range {part.strip()!r} is empty; expected first-last with first <= last")
        layers.extend(range(first, last + 1, step))
    return tuple(layers)


def load_drop_plan(path: str | Path, spec: ModelSpec | None = None) -> DropPlan:
    """The drop plan in the file `path`, in any dialect of docs/dropping.md, for the model that `spec` describes.

    Without `spec`, dialects that leave a number to the model are refused. Raises UsageError DROP_PLAN, or RunError IO.
    """
    return read_plan(path, spec)


def save_drop_plan(plan: DropPlan, path: Path) -> None:
    """Write `plan` as the JSON file `path`, whole or not at all. Raises RunError IO."""
    write_text(path, json.dumps(plan.to_json(), indent=2) + "\n")


def _layers(said: Layers | None, kept: Sequence[int], spec: ModelSpec) -> tuple[int, ...]:
    if said is None:
        return ()
    if not isinstance(said, str | Sequence) or isinstance(said, bytes | bytearray):
        raise UsageError("DROP", f"{said!r} names no layers; expected a list of numbers, or text such as 20-30")
    layers = parse_layers(said, kept) if isinstance(said, str) else tuple(said)
    for index in layers:
        if isinstance(index, int) and index >= len(spec.layers):
            raise UsageError("DROP", f"layer {index} does not exist; the layers are 0 to {len(spec.layers) - 1}")
    return layers


def _kept(spec: ModelSpec, kind: str) -> tuple[int, ...]:
    gone = set(spec.dropped("attention")) & set(spec.dropped("mlp")) if kind == "block" else set(spec.dropped(kind))
    return tuple(layer.index for layer in spec.layers if layer.index not in gone)


def _last(count: int, keep_last: bool, kept: Sequence[int]) -> tuple[int, ...]:
    candidates = kept[:-1] if keep_last else kept
    if not 0 < count <= len(candidates):
        raise UsageError("DROP", f"last:{count} asks for {count} layers; {len(candidates)} can be dropped by this rule")
    return tuple(candidates[-count:])
