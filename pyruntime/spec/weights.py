"""Names and shapes of the weights that a specification needs: the one vocabulary of families, passes and graph."""

from __future__ import annotations

from collections.abc import Iterator

from pyruntime.spec.model import MLP, Attention, Layer, ModelSpec, Replacement, Sublayer
from pyruntime.spec.parts import Linear, Norm

Shape = tuple[int, ...]


def weight_shapes(spec: ModelSpec) -> dict[str, Shape]:
    """Every weight of `spec` as name -> shape, such as `layers.3.mlp.down.weight` -> (hidden, ffn)."""
    shapes: dict[str, Shape] = {"embedding.weight": (spec.embedding.vocab_size, spec.embedding.size)}
    for layer in spec.layers:
        shapes.update(_layer_shapes(layer))
    if spec.final_norm is not None:
        shapes.update(_norm_shapes("final_norm", spec.final_norm))
    head = dict(_linear_shapes("head", spec.head.linear))
    if spec.head.tied:
        del head["head.weight"]
    shapes.update(head)
    return shapes


def sublayer_prefix(index: int, kind: str) -> str:
    """Start of the names of one sublayer's weights; `kind` is "attention" or "mlp"."""
    return f"layers.{index}.{kind}."


def _layer_shapes(layer: Layer) -> Iterator[tuple[str, Shape]]:
    for kind, sublayer in layer.sublayers():
        prefix = sublayer_prefix(layer.index, kind)
        for name in linear_names(sublayer):
            linear: Linear | None = getattr(sublayer, name)
            if linear is not None:
                yield from _linear_shapes(prefix + name, linear)
        for name in norm_names(sublayer):
            norm: Norm | None = getattr(sublayer, name)
            if norm is not None:
                yield from _norm_shapes(prefix + name, norm)


def linear_names(sublayer: Sublayer) -> tuple[str, ...]:
    """Attributes of `sublayer` that hold linear maps, in the order in which they run."""
    match sublayer:
        case Attention():
            return ("q", "k", "v", "o")
        case MLP():
            return ("gate", "up", "down")
        case Replacement():
            return ("linear",)


def norm_names(sublayer: Sublayer) -> tuple[str, ...]:
    """Attributes of `sublayer` that hold norms."""
    match sublayer:
        case Attention():
            return ("pre", "q_norm", "k_norm", "sub", "post")
        case MLP():
            return ("pre", "sub", "post")
        case Replacement():
            return ("pre", "post")


def _linear_shapes(name: str, linear: Linear) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", (linear.out_features, linear.in_features)
    if linear.bias:
        yield f"{name}.bias", (linear.out_features,)


def _norm_shapes(name: str, norm: Norm) -> Iterator[tuple[str, Shape]]:
    if norm.weight:
        yield f"{name}.weight", (norm.size,)
    if norm.bias:
        yield f"{name}.bias", (norm.size,)
