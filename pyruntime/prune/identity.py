"""Which model scores belong to, as one hash; and which of its sublayers can be dropped at all."""

from __future__ import annotations

import hashlib
import json

from pyruntime.checkpoint import Model
from pyruntime.checkpoint.files import is_there
from pyruntime.checkpoint.manifest import MANIFEST
from pyruntime.checkpoint.strict_json import MAX_CONFIG_BYTES, read_bytes
from pyruntime.checkpoint.weight import TensorRef
from pyruntime.errors import UsageError
from pyruntime.spec import DropPlan, ModelSpec, drop_sublayers, spec_to_json

KINDS = ("attention", "mlp", "block")


def model_identity(model: Model) -> str:
    """SHA-256 of the specification, of config.json, of names, dtypes and shapes of the weights, and of the manifest.

    The manifest vouches for the values of the weights. Without one nothing does, as they are not read for this: two
    models that were trained differently from one configuration are then the same.
    """
    tensors = sorted(
        (ref.name, ref.dtype, ref.shape) if isinstance(ref, TensorRef) else (name, "", ref.shape)
        for name, weight in model.weights.items()
        for ref in weight.refs()
    )
    said = [spec_to_json(model.spec), dict(model.config), tensors, _manifest(model)]
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def _manifest(model: Model) -> str:
    if model.path is None or not is_there(model.path / MANIFEST):
        return ""
    return hashlib.sha256(read_bytes(model.path / MANIFEST, "MANIFEST", MAX_CONFIG_BYTES)).hexdigest()


def plan_of(kind: str, index: int, origin: str = "") -> DropPlan:
    """The plan that drops one attention, MLP or block."""
    return DropPlan(
        (index,) if kind in ("attention", "block") else (), (index,) if kind in ("mlp", "block") else (), origin
    )


def is_droppable(spec: ModelSpec, kind: str, index: int) -> bool:
    """Whether that sublayer, or anything of that block, is there and can be dropped."""
    layer = spec.layers[index]
    there = any(kind in (own, "block") for own, _ in layer.sublayers())
    try:
        drop_sublayers(spec, plan_of(kind, index))
    except UsageError:
        return False
    return there


def not_droppable(spec: ModelSpec) -> tuple[str, ...]:
    """The sublayers that are there and cannot be dropped, such as "attention 3": those without residual."""
    return tuple(
        f"{kind} {layer.index}"
        for layer in spec.layers
        for kind, _ in layer.sublayers()
        if not is_droppable(spec, kind, layer.index)
    )
