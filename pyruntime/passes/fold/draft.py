"""A model while a pass rewrites it, and the report of what came of it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, Final

from pyruntime.checkpoint import Model, PassReport, Weight
from pyruntime.checkpoint.computed import Computed, Formula, stored_dtype
from pyruntime.errors import UsageError
from pyruntime.passes.drop import kv_values_per_token
from pyruntime.passes.fold.cost import flops_per_token
from pyruntime.spec import Embedding, Head, Layer, ModelSpec, Norm, Sublayer, sublayer_prefix, weight_shapes

_PLACE: Final = re.compile(r"(attention|mlp) (\d+)(.*)")


@dataclass(frozen=True, slots=True)
class FoldReport(PassReport):
    """What a rewrite saved; what it cost is negative. `rewritten` names what was changed.

    `forced` are those of them that a gate refused. `flops_per_token` counts what every token passes; scores over the
    context are not among it.
    """

    rewritten: tuple[str, ...] = ()
    forced: tuple[str, ...] = ()
    flops_per_token: int = 0


@dataclass(slots=True)
class Draft:
    """The parts of `model` that passes change, open for change; `finish` makes a model of them."""

    model: Model
    weights: dict[str, Weight]
    embedding: Embedding
    layers: list[Layer]
    final_norm: Norm | None
    head: Head
    rewritten: list[str]
    forced: list[str]
    # reason -> what was left as it is for it
    left: dict[str, list[str]]
    notes: list[str]

    @classmethod
    def of(cls, model: Model) -> Draft:
        """Nothing changed yet."""
        spec = model.spec
        layers = list(spec.layers)
        return cls(model, dict(model.weights), spec.embedding, layers, spec.final_norm, spec.head, [], [], {}, [])

    def sublayers(self) -> Iterator[tuple[str, int, str, Sublayer]]:
        """(kind, layer, prefix of the weights' names, sublayer) of each sublayer that is there."""
        for index in range(len(self.layers)):
            for kind, sublayer in tuple(self.layers[index].sublayers()):
                yield kind, index, sublayer_prefix(index, kind), sublayer

    def put(self, kind: str, index: int, sublayer: Sublayer | None) -> None:
        """Replace a sublayer."""
        changes: dict[str, Any] = {kind: sublayer}
        self.layers[index] = replace(self.layers[index], **changes)

    def leave(self, reason: str, place: str) -> None:
        """Note that `place` stays as it is."""
        self.left.setdefault(reason, []).append(place)

    def compute(self, name: str, shape: tuple[int, ...], like: Weight, formula: Formula, *sources: Weight) -> None:
        """Let the weight `name` be `formula` of `sources`, in the dtype of `like`."""
        self.weights[name] = Computed(shape, stored_dtype(self.model, like), formula, sources)

    def finish(self, name: str, removed: tuple[str, ...] = ()) -> Model:
        """The rewritten model, with a report called `name`."""
        before = self.model.spec
        spec = replace(
            before,
            embedding=self.embedding,
            layers=tuple(self.layers),
            final_norm=self.final_norm,
            head=self.head,
        )
        shapes = weight_shapes(spec)
        weights = {each: self.weights[each] for each in shapes}
        wrong = [each for each, shape in shapes.items() if tuple(weights[each].shape) != shape]
        assert not wrong, wrong
        report = FoldReport(
            name=name,
            removed=removed,
            num_weights=_num_weights(before) - _num_weights(spec),
            weight_bytes=_num_bytes(self.model.weights) - _num_bytes(weights),
            kv_values_per_token=kv_values_per_token(before) - kv_values_per_token(spec),
            notes=(*self.notes, *(f"{in_short(places)}: {reason}" for reason, places in self.left.items())),
            rewritten=tuple(self.rewritten),
            forced=tuple(self.forced),
            flops_per_token=flops_per_token(before) - flops_per_token(spec),
        )
        return replace(self.model, spec=spec, weights=weights, reports=(*self.model.reports, report))


def fold_reports(model: Model) -> tuple[FoldReport, ...]:
    """The reports of the rewrites among those of `model`."""
    return tuple(report for report in model.reports if isinstance(report, FoldReport))


def in_short(places: Sequence[str]) -> str:
    """Places such as "attention 3 pre", runs of layers in one: "attention 0-3 pre, final norm"."""
    layers: dict[tuple[str, str], list[int]] = {}
    found: list[str] = []
    for place in places:
        match = _PLACE.fullmatch(place)
        if match is None:
            found.append(place)
        else:
            layers.setdefault((match[1], match[3]), []).append(int(match[2]))
    for (kind, rest), numbers in layers.items():
        # neighbours have the same distance to their rank
        for _, run in groupby(enumerate(sorted(numbers)), lambda pair: pair[1] - pair[0]):
            own = [number for _, number in run]
            found.append(f"{kind} {own[0]}{f'-{own[-1]}' if len(own) > 1 else ''}{rest}")
    return ", ".join(found)


def check_dtype(dtype: str) -> None:
    """Raise UsageError DTYPE unless `dtype` names one that rewrites are judged in."""
    if dtype not in ("float64", "float32", "float16", "bfloat16"):
        raise UsageError("DTYPE", f"dtype {dtype!r} is not known; expected float64, float32, float16 or bfloat16")


def _num_weights(spec: ModelSpec) -> int:
    return sum(math.prod(shape) for shape in weight_shapes(spec).values())


def _num_bytes(weights: Mapping[str, Weight]) -> int:
    return sum(weight.num_bytes for weight in weights.values())
