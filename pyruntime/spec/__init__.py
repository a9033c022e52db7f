"""What a model is: frozen data without weights, and what a model goes without."""

from pyruntime.spec.attention import Attention, Cached
from pyruntime.spec.codec import spec_from_json, spec_to_json
from pyruntime.spec.drop import DropPlan, drop_sublayers
from pyruntime.spec.model import MLP, Embedding, Head, Layer, ModelSpec, MoE, Replacement, Sublayer
from pyruntime.spec.parts import Activation, Linear, Norm, NormKind, Rope, RopeKind
from pyruntime.spec.weights import EXPERT_MAPS, GAINS, linear_names, norm_names, sublayer_prefix, weight_shapes

__all__ = [
    "EXPERT_MAPS",
    "GAINS",
    "MLP",
    "Activation",
    "Attention",
    "Cached",
    "DropPlan",
    "Embedding",
    "Head",
    "Layer",
    "Linear",
    "MoE",
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
