"""Where the stream can change its basis: who writes it there, who reads it, and why nothing can be done elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from pyruntime.checkpoint import Model, Weight
from pyruntime.spec import (
    MLP,
    Attention,
    Cached,
    Layer,
    Linear,
    ModelSpec,
    MoE,
    Norm,
    Replacement,
    Sublayer,
    sublayer_prefix,
    weight_shapes,
)


class Impossible(Exception):
    """A rewrite that is not exact here, or not worth it, and why; the layer stays as it is."""


class Singular(Impossible):
    """Matrices that do not allow a rewrite which would be exact with others."""


@dataclass(frozen=True, slots=True)
class Map:
    """A linear map by its name, such as `layers.3.mlp.down` or `head`."""

    name: str
    linear: Linear

    def weight(self, model: Model) -> Weight:
        """Its matrix, [out, in]."""
        return model.weights[f"{self.name}.weight"]

    def bias(self, model: Model) -> Weight | None:
        """Its bias, if it has one."""
        return model.weights[f"{self.name}.bias"] if self.linear.bias else None


@dataclass(frozen=True, slots=True)
class Boundary:
    """A stream between sublayers. Without writers it comes from the embedding; `norm` stands before every reader."""

    writers: tuple[Map, ...]
    readers: tuple[Map, ...]
    norm: Norm | None
    width: int


def boundary_before(spec: ModelSpec, index: int) -> Boundary:
    """The stream that layer `index` reads. Raises Impossible."""
    layer = spec.layers[index]
    parts = list(layer.sublayers())
    if not parts:
        raise Impossible("the layer is empty")
    readers, norms = _readers(layer.index, parts if layer.parallel else parts[:1])
    if any(norm != norms[0] for norm in norms):
        raise Impossible("attention and MLP norm their input differently")
    return Boundary(_writers(spec, index), readers, norms[0], parts[0][1].in_size)


def boundary_after(spec: ModelSpec, index: int) -> Boundary:
    """The stream that layer `index` writes, up to the next layer or the head. Raises Impossible."""
    following = next((each.index for each in spec.layers[index + 1 :] if any(True for _ in each.sublayers())), None)
    if following is not None:
        return boundary_before(spec, following)
    if spec.final_norm is not None:
        raise Impossible("a norm stands before the head")
    if spec.head.tied:
        raise Impossible("the head is tied to the embedding")
    writers = _writers(spec, len(spec.layers))
    return Boundary(writers, (Map("head", spec.head.linear),), None, spec.head.linear.in_features)


def boundary_inside(spec: ModelSpec, index: int) -> Boundary:
    """The stream from the attention of a serial layer to its MLP. Raises Impossible."""
    layer = spec.layers[index]
    if layer.mlp is None:
        raise Impossible("no MLP follows that could take the output projection in")
    parts = [("mlp", layer.mlp)]
    readers, norms = _readers(index, parts)
    return Boundary(_written(index, [("attention", attention_of(layer))]), readers, norms[0], layer.mlp.in_size)


def attention_of(layer: Layer) -> Attention:
    """The attention of `layer`. Raises Impossible where there is none."""
    if not isinstance(layer.attention, Attention):
        raise Impossible("the layer has no attention")
    return layer.attention


def _readers(index: int, parts: list[tuple[str, Any]]) -> tuple[tuple[Map, ...], list[Norm | None]]:
    maps: list[Map] = []
    for kind, sublayer in parts:
        if sublayer.residual:
            raise Impossible(f"the {kind} adds its input to its output (residual)")
        roles = _reading_roles(kind, sublayer)
        maps += [_map(index, kind, role, getattr(sublayer, role)) for role in roles]
    return tuple(maps), [sublayer.pre for _, sublayer in parts]


def _reading_roles(kind: str, sublayer: Sublayer) -> tuple[str, ...]:
    match sublayer:
        case Attention():
            gone = [role for role in "qkv" if getattr(sublayer, role) is None]
            if gone:
                raise Impossible(f"the attention has no {', '.join(gone)} of its own any more")
            if sublayer.cached is not Cached.KEYS_VALUES:
                raise Impossible(f"the attention caches {sublayer.cached}")
            return ("q", "k", "v")
        case MLP():
            return ("up",) if sublayer.gate is None else ("gate", "up")
        case Replacement():
            return ("linear",)
        case MoE():
            raise Impossible(f"the {kind} is a mixture of experts")


def _writers(spec: ModelSpec, index: int) -> tuple[Map, ...]:
    """The maps that write the stream before layer `index`; none: it is the embedding's."""
    for layer in reversed(spec.layers[:index]):
        parts = list(layer.sublayers())
        if parts:
            return _written(layer.index, parts if layer.parallel else parts[-1:])
    return ()


def _written(index: int, parts: list[tuple[str, Any]]) -> tuple[Map, ...]:
    found = []
    for kind, sublayer in parts:
        where = f"the {kind} of layer {index}"
        if sublayer.residual:
            raise Impossible(f"{where} adds its output to the stream (residual)")
        if sublayer.post is not None:
            raise Impossible(f"{where} norms its output")
        match sublayer:
            case Attention():
                role = "o"
            case MLP():
                role = "down"
            case Replacement():
                role = "linear"
            case _:
                raise Impossible(f"{where} is a mixture of experts")
        if getattr(sublayer, role) is None:
            raise Impossible(f"{where} has no output projection")
        found.append(_map(index, kind, role, getattr(sublayer, role)))
    return tuple(found)


def _map(index: int, kind: str, role: str, linear: Linear) -> Map:
    name = sublayer_prefix(index, kind) + role
    if linear.triangular:
        raise Impossible(f"{name} is triangular already")
    return Map(name, linear)


@dataclass(frozen=True, slots=True)
class Rewrite:
    """New values of the specification's fields, by names such as `layers.3.attention.q`, and new weights."""

    fields: Mapping[str, Any]
    weights: Mapping[str, Weight]

    def __or__(self, other: Rewrite) -> Rewrite:
        return Rewrite({**self.fields, **other.fields}, {**self.weights, **other.weights})


def rewritten(spec: ModelSpec, fields: Mapping[str, Any]) -> ModelSpec:
    """`spec` with the fields changed, all at once: between them its widths need not fit."""
    layers = list(spec.layers)
    for index, layer in enumerate(layers):
        changed = {}
        for kind, sublayer in layer.sublayers():
            prefix = sublayer_prefix(index, kind)
            own = {name.removeprefix(prefix): value for name, value in fields.items() if name.startswith(prefix)}
            if own:
                changed[kind] = replace(sublayer, **own)
        if changed:
            # a layer checks its parts together, so both kinds are named where their type is known
            layers[index] = replace(layer, **changed)  # type: ignore[arg-type]
    head = replace(spec.head, tied=fields.get("head.tied", spec.head.tied), linear=fields.get("head", spec.head.linear))
    embedding = fields.get("embedding", spec.embedding)
    return replace(spec, layers=tuple(layers), head=head, embedding=embedding)


def apply(model: Model, rewrite: Rewrite) -> Model:
    """`model` with the fields and weights changed; weights that nothing needs any more are forgotten."""
    spec = rewritten(model.spec, rewrite.fields)
    names = weight_shapes(spec)
    weights = {name: rewrite.weights.get(name) or model.weights[name] for name in names}
    return replace(model, spec=spec, weights=weights)
