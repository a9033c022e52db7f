"""Names and shapes of the weights that a specification needs: the one vocabulary of families, passes and graph."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from pyruntime.spec.attention import Attention
from pyruntime.spec.model import MLP, Layer, ModelSpec, MoE, Replacement, Sublayer
from pyruntime.spec.parts import Linear, Norm

Shape = tuple[int, ...]

# gains of shaped attention, one per head
GAINS: Final = ("softmax_gain", "identity_gain", "centre_gain")
# linear maps of each expert
EXPERT_MAPS: Final = ("gate", "up", "down")


def weight_shapes(spec: ModelSpec) -> dict[str, Shape]:
    """Every weight of `spec` as name -> shape, such as `layers.3.mlp.down.weight` -> (hidden, ffn)."""
    shapes: dict[str, Shape] = {"embedding.weight": (spec.embedding.vocab_size, spec.embedding.size)}
    if spec.embedding.positions is not None:
        shapes["embedding.position.weight"] = (spec.embedding.positions, spec.embedding.size)
    for layer in spec.layers:
        shapes.update(_layer_shapes(layer, spec.vocab_size))
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


def _layer_shapes(layer: Layer, vocab_size: int) -> Iterator[tuple[str, Shape]]:
    for kind, sublayer in layer.sublayers():
        prefix = sublayer_prefix(layer.index, kind)
        yield from _sublayer_shapes(prefix, sublayer)
        if isinstance(sublayer, Attention):
            if sublayer.table:
                yield f"{prefix}table.weight", (vocab_size, sublayer.q_size + 2 * sublayer.kv_size)
            if sublayer.shaped:
                yield from ((prefix + name, (sublayer.num_heads,)) for name in GAINS)


def _sublayer_shapes(prefix: str, sublayer: Sublayer) -> Iterator[tuple[str, Shape]]:
    for name in linear_names(sublayer):
        linear: Linear | None = getattr(sublayer, name)
        if linear is not None:
            yield from _linear_shapes(prefix + name, linear)
    for name in norm_names(sublayer):
        norm: Norm | None = getattr(sublayer, name)
        if norm is not None:
            yield from _norm_shapes(prefix + name, norm)
    if isinstance(sublayer, MoE):
        for expert in range(sublayer.num_experts):
            for name in EXPERT_MAPS:
                yield from _linear_shapes(f"{prefix}experts.{expert}.{name}", getattr(sublayer, name))
        if sublayer.shared is not None:
            yield from _sublayer_shapes(prefix + "shared.", sublayer.shared)


def linear_names(sublayer: Sublayer) -> tuple[str, ...]:
    """Attributes of `sublayer` that hold linear maps, in the order in which they run (of experts: EXPERT_MAPS)."""
    match sublayer:
        case Attention():
            return ("q", "k", "v", "rest", "o", "shortcut")
        case MLP():
            return ("gate", "up", "down", "shortcut")
        case MoE():
            return ("router", "shared_gate", "shortcut")
        case Replacement():
            return ("linear", "shortcut")


def norm_names(sublayer: Sublayer) -> tuple[str, ...]:
    """Attributes of `sublayer` that hold norms."""
    match sublayer:
        case Attention():
            return ("pre", "q_norm", "k_norm", "v_norm", "sub", "post")
        case MLP():
            return ("pre", "sub", "post")
        case MoE() | Replacement():
            return ("pre", "post")


def _linear_shapes(name: str, linear: Linear) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", linear.weight_shape
    if linear.bias:
        yield f"{name}.bias", (linear.out_features,)


def _norm_shapes(name: str, norm: Norm) -> Iterator[tuple[str, Shape]]:
    if norm.weight:
        yield f"{name}.weight", (norm.size,)
    if norm.bias:
        yield f"{name}.bias", (norm.size,)
