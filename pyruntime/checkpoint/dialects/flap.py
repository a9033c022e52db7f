"""FLAP (An et al., arXiv 2312.11983): heads and widths pruned by layer, and biases in place of what they gave.

It saves whole Python objects, which are never opened; what is read is the same model as a folder of safetensors. Lists
in config.json may say the sizes; without them, those of a model with such biases are the tensors' own.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Final

from pyruntime.checkpoint.families import Family
from pyruntime.checkpoint.folder import StoredTensor
from pyruntime.errors import CheckpointError, UsageError
from pyruntime.spec import MLP, Attention, Layer, Linear, ModelSpec, sublayer_prefix

_LAST: Final = {"attention": "o", "mlp": "down"}


def biased(spec: ModelSpec, family: Family, stored: Mapping[str, StoredTensor]) -> frozenset[tuple[int, str]]:
    """(layer, kind) of the sublayers whose last map has a bias in the files and none in the configuration."""
    found = set()
    for layer in spec.layers:
        for kind, sublayer in layer.sublayers():
            last: Linear | None = (
                getattr(sublayer, _LAST[kind], None) if isinstance(sublayer, Attention | MLP) else None
            )
            name = f"{sublayer_prefix(layer.index, kind)}{_LAST[kind]}.bias"
            if last is not None and not last.bias and family.tensor_name(name) in stored:
                found.add((layer.index, kind))
    return frozenset(found)


def flap(
    spec: ModelSpec,
    family: Family,
    stored: Mapping[str, StoredTensor],
    biases: Collection[tuple[int, str]],
    sized: Collection[tuple[int, str]],
) -> ModelSpec:
    """`spec` with `biases` and the sizes of the tensors; sublayers in `sized` keep those that the configuration lists.

    Raises CheckpointError SHAPE for sizes of which no sublayer can be made.
    """
    layers = []
    for layer in spec.layers:
        try:
            layers.append(_layer(layer, family, stored, biases, sized))
        except UsageError as error:
            raise CheckpointError("SHAPE", f"layer {layer.index} as its tensors are shaped: {error}") from None
    return replace(spec, layers=tuple(layers))


def _layer(
    layer: Layer,
    family: Family,
    stored: Mapping[str, StoredTensor],
    biases: Collection[tuple[int, str]],
    sized: Collection[tuple[int, str]],
) -> Layer:
    for kind, sublayer in layer.sublayers():
        prefix = sublayer_prefix(layer.index, kind)
        own = (layer.index, kind)
        match sublayer:
            case Attention():
                if own not in sized:
                    sublayer = _with_heads(sublayer, *(_rows(prefix + role, family, stored) for role in "qk"))
                if own in biases and sublayer.o is not None:
                    sublayer = replace(sublayer, o=replace(sublayer.o, bias=True))
                layer = replace(layer, attention=sublayer)
            case MLP():
                if own not in sized:
                    sublayer = _with_width(sublayer, _rows(prefix + "up", family, stored))
                if own in biases:
                    sublayer = replace(sublayer, down=replace(sublayer.down, bias=True))
                layer = replace(layer, mlp=sublayer)
    return layer


def _rows(stem: str, family: Family, stored: Mapping[str, StoredTensor]) -> int | None:
    """Rows of a matrix in the files; None where it is not there, or shares its tensor with others."""
    weight = f"{stem}.weight"
    tensor = stored.get(family.tensor_name(weight))
    alone = len(family.fused_with(weight)[0]) == 1 and not family.is_transposed(weight)
    return tensor.info.shape[0] if tensor is not None and alone and len(tensor.info.shape) == 2 else None


def _with_heads(attention: Attention, q_size: int | None, kv_size: int | None) -> Attention:
    head_dim = attention.head_dim
    over_heads = [norm for norm in (attention.q_norm, attention.k_norm) if norm is not None and norm.size != head_dim]
    if q_size is None or kv_size is None or q_size % head_dim or kv_size % head_dim or over_heads or attention.sub:
        return attention
    assert attention.q is not None and attention.k is not None and attention.v is not None and attention.o is not None
    return replace(
        attention,
        num_heads=q_size // head_dim,
        num_kv_heads=kv_size // head_dim,
        q=replace(attention.q, out_features=q_size),
        k=replace(attention.k, out_features=kv_size),
        v=replace(attention.v, out_features=kv_size),
        o=replace(attention.o, in_features=q_size),
    )


def _with_width(mlp: MLP, width: int | None) -> MLP:
    if width is None or mlp.sub is not None:
        return mlp
    up = replace(mlp.up, out_features=width)
    gate = None if mlp.gate is None else replace(mlp.gate, out_features=width)
    return replace(mlp, gate=gate, up=up, down=replace(mlp.down, in_features=width))
