"""Which sublayers a model goes without: the DropPlan, and the one function that removes them from a specification."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Final

from pyruntime.errors import UsageError
from pyruntime.spec.model import Layer, ModelSpec

_FORMAT: Final = "pyruntime-drop-plan"
_VERSION: Final = 1


@dataclass(frozen=True, slots=True)
class DropPlan:
    """Layer indices whose attention, and whose MLP, is dropped: sorted, unique, zero-based. `origin` says by whom."""

    attention: tuple[int, ...] = ()
    mlp: tuple[int, ...] = ()
    origin: str = ""

    def __post_init__(self) -> None:
        for kind in ("attention", "mlp"):
            object.__setattr__(self, kind, _canonical(kind, getattr(self, kind)))
        # it may come from a file and is printed in reports
        if not isinstance(self.origin, str) or not self.origin.isprintable():
            raise UsageError("DROP", f"drop plan origin is {self.origin!r}; expected one line of text")

    def __bool__(self) -> bool:
        return bool(self.attention or self.mlp)

    def __or__(self, other: DropPlan) -> DropPlan:
        """Everything that either plan drops."""
        origin = "; ".join(text for text in dict.fromkeys((self.origin, other.origin)) if text)
        return DropPlan(self.attention + other.attention, self.mlp + other.mlp, origin)

    def to_json(self) -> dict[str, Any]:
        """Plain data for a JSON file; `from_json` reads it back."""
        return {
            "format": _FORMAT,
            "version": _VERSION,
            "drop_attn_list": list(self.attention),
            "drop_mlp_list": list(self.mlp),
            "origin": self.origin,
        }

    @classmethod
    def from_json(cls, data: Any) -> DropPlan:
        """The plan in `data`, its lists in any order. Raises UsageError DROP_PLAN for anything that is no plan."""
        if not isinstance(data, dict) or data.get("format") != _FORMAT:
            raise UsageError("DROP_PLAN", f'this is no drop plan; expected an object with "format": "{_FORMAT}"')
        version = data.get("version")
        if type(version) is not int or version != _VERSION:
            raise UsageError("DROP_PLAN", f"drop plan version is {version!r}; this release reads {_VERSION}")
        extra = set(data) - {"format", "version", "drop_attn_list", "drop_mlp_list", "origin"}
        if extra:
            raise UsageError("DROP_PLAN", f"drop plan has unknown keys {sorted(extra)}; remove them")
        lists = [data.get(key, []) for key in ("drop_attn_list", "drop_mlp_list")]
        if not all(isinstance(each, list) for each in lists):
            raise UsageError("DROP_PLAN", "drop_attn_list and drop_mlp_list must be lists")
        try:
            return cls(tuple(lists[0]), tuple(lists[1]), data.get("origin", ""))
        except UsageError as error:
            raise UsageError("DROP_PLAN", str(error)) from None


def _canonical(kind: str, indices: Iterable[Any]) -> tuple[int, ...]:
    found = tuple(indices)
    for index in found:
        if isinstance(index, bool) or not isinstance(index, int) or index < 0:
            raise UsageError("DROP", f"dropped {kind} {index!r} is no layer index; expected integers from 0")
    return tuple(sorted(set(found)))


def drop_sublayers(spec: ModelSpec, plan: DropPlan) -> ModelSpec:
    """`spec` without the sublayers that `plan` names. A sublayer that is gone already stays gone.

    Raises UsageError DROP for a layer that does not exist, and for a sublayer without residual: there the stream ends
    with the sublayer, so nothing could take its place.
    """
    layers = list(spec.layers)
    for kind in ("attention", "mlp"):
        for index in getattr(plan, kind):
            if index >= len(layers):
                raise UsageError("DROP", f"{kind} {index} does not exist; the layers are 0 to {len(layers) - 1}")
            layers[index] = _without(layers[index], kind)
    return replace(spec, layers=tuple(layers))


def _without(layer: Layer, kind: str) -> Layer:
    sublayer = layer.attention if kind == "attention" else layer.mlp
    if sublayer is not None and not sublayer.residual:
        raise UsageError("DROP", f"layer {layer.index} {kind} has no residual, so nothing would pass it; keep it")
    if sublayer is not None and sublayer.shortcut is not None:
        raise UsageError("DROP", f"layer {layer.index} {kind} has a matrix on its residual (SliceGPT); keep it")
    return replace(layer, attention=None) if kind == "attention" else replace(layer, mlp=None)
