"""What a model is: frozen data without weights, and what a model goes without."""

from pyruntime.spec.codec import spec_from_json, spec_to_json
from pyruntime.spec.drop import DropPlan, drop_sublayers
from pyruntime.spec.model import MLP, Attention, Embedding, Head, Layer, ModelSpec, Replacement, Sublayer
from pyruntime.spec.parts import Activation, Linear, Norm, NormKind, Rope, RopeKind
from pyruntime.spec.weights import linear_names, norm_names, sublayer_prefix, weight_shapes

__all__ = [
    "MLP",
    "Activation",
    "Attention",
    "DropPlan",
    "Embedding",
    "Head",
    "Layer",
    "Linear",
    "ModelSpec",
    "Norm",
    "NormKind",
    "Replacement",
    "Rope",
    "RopeKind",
    "Sublayer",
    "drop_sublayers",
    "linear_names",
    "norm_names",
    "spec_from_json",
    "spec_to_json",
    "sublayer_prefix",
    "weight_shapes",
]
