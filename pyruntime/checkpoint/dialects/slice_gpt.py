"""SliceGPT (Ashkboos et al., arXiv 2401.15024): a narrower stream, and matrices on the residual between its bases.

What is read: a folder of safetensors with the names that TransformerCompression gives a sliced Llama, beside the
config.json of the model that was sliced, whose hidden_size is the width before slicing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Final

import torch

from pyruntime.checkpoint.families import Family
from pyruntime.checkpoint.fields import some
from pyruntime.checkpoint.folder import StoredTensor
from pyruntime.checkpoint.weight import InMemory
from pyruntime.errors import CheckpointError, UsageError
from pyruntime.spec import MLP, Attention, Layer, Linear, ModelSpec, Norm, NormKind, sublayer_prefix

# of TransformerCompression's RMSN, whatever rms_norm_eps says
NORM_EPS: Final = 1e-5
_KINDS: Final = ("attention", "mlp")


def is_sliced(spec: ModelSpec, family: Family, stored: Mapping[str, StoredTensor]) -> bool:
    """Whether the files hold any matrix on the residual that `family` has a name for."""
    return any(name in stored for name in _shortcuts(spec, family).values())


def sliced(spec: ModelSpec, family: Family, stored: Mapping[str, StoredTensor]) -> ModelSpec:
    """`spec` with the widths of its stored matrices on the residual, and with norms that divide by the whole width.

    A norm over n of D values there is x / sqrt(sum(x^2) / D + eps): the usual one with eps D / n, times sqrt(D / n).
    Raises UsageError DROP where a sublayer is gone, CheckpointError MISSING_TENSOR and SHAPE.
    """
    names = _shortcuts(spec, family)
    missing = sorted(name for name in names.values() if name not in stored)
    if missing:
        raise CheckpointError("MISSING_TENSOR", f"{some(missing)} missing; SliceGPT needs one for each sublayer")
    widths = {place: stored[name].info.shape for place, name in names.items()}
    if wrong := [names[place] for place, shape in widths.items() if len(shape) != 2]:
        raise CheckpointError("SHAPE", f"{some(wrong)}: no matrix; expected widths in front and behind")
    whole = spec.embedding.size
    try:
        layers = tuple(_layer(layer, widths, whole) for layer in spec.layers)
        last = widths[len(layers) - 1, "mlp"][1]
        return replace(
            spec,
            embedding=replace(spec.embedding, size=widths[0, "attention"][0]),
            layers=layers,
            final_norm=_norm(last, whole),
            head=replace(spec.head, linear=replace(spec.head.linear, in_features=last)),
        )
    except UsageError as error:
        if error.code != "SPEC":
            raise
        raise CheckpointError("SHAPE", f"the widths of the matrices on the residual do not fit: {error}") from None


def gains(spec: ModelSpec, whole: int) -> dict[str, InMemory]:
    """The constant gains of the norms of a sliced `spec` whose stream was `whole` wide; no tensor holds them."""
    norms = {
        f"{sublayer_prefix(layer.index, kind)}pre": sublayer.pre
        for layer in spec.layers
        for kind, sublayer in layer.sublayers()
    }
    norms["final_norm"] = spec.final_norm
    return {
        f"{stem}.weight": InMemory(torch.full((norm.size,), (whole / norm.size) ** 0.5, dtype=torch.float64))
        for stem, norm in norms.items()
        if norm is not None and norm.weight
    }


def without_dummies(stored: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """`stored` without the single value that later releases of TransformerCompression store for each norm."""
    return {
        name: tensor
        for name, tensor in stored.items()
        if not (name.endswith("norm.weight") and tensor.info.shape == (1,))
    }


def _shortcuts(spec: ModelSpec, family: Family) -> dict[tuple[int, str], str]:
    """Names of the matrices by layer and kind; none in families that have no name for them."""
    if not all(f"layers.{{}}.{kind}.shortcut.weight" in family.bare for kind in _KINDS):
        return {}
    return {
        (layer.index, kind): family.tensor_name(f"{sublayer_prefix(layer.index, kind)}shortcut.weight")
        for layer in spec.layers
        for kind in _KINDS
    }


def _layer(layer: Layer, widths: Mapping[tuple[int, str], tuple[int, ...]], whole: int) -> Layer:
    attention, mlp = layer.attention, layer.mlp
    if not isinstance(attention, Attention) or not isinstance(mlp, MLP):
        raise UsageError(
            "DROP",
            f"layer {layer.index} lacks a sublayer, and SliceGPT puts a matrix on each residual; keep all sublayers",
        )
    assert attention.q is not None and attention.k is not None and attention.v is not None and attention.o is not None
    first, middle = widths[layer.index, "attention"]
    behind, last = widths[layer.index, "mlp"]
    return replace(
        layer,
        attention=replace(
            attention,
            q=replace(attention.q, in_features=first),
            k=replace(attention.k, in_features=first),
            v=replace(attention.v, in_features=first),
            o=replace(attention.o, out_features=middle),
            pre=_norm(first, whole),
            shortcut=Linear(in_features=first, out_features=middle),
        ),
        mlp=replace(
            mlp,
            gate=None if mlp.gate is None else replace(mlp.gate, in_features=behind),
            up=replace(mlp.up, in_features=behind),
            down=replace(mlp.down, out_features=last),
            pre=_norm(behind, whole),
            shortcut=Linear(in_features=behind, out_features=last),
        ),
    )


def _norm(size: int, whole: int) -> Norm:
    """A norm over what is left of `whole` values."""
    return Norm(kind=NormKind.RMS, size=size, eps=NORM_EPS * whole / max(size, 1), weight=size != whole)
