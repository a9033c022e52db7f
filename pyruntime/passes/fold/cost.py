"""What a token costs outside of the scores: products, norms and biases, from the specification alone."""

from __future__ import annotations

from pyruntime.spec import EXPERT_MAPS, Linear, ModelSpec, MoE, Norm, NormKind, Sublayer, linear_names, norm_names


def flops_per_token(spec: ModelSpec) -> int:
    """Multiplications and additions that each token takes through `spec`, logits included, scores over the context not.

    A linear map takes two for each weight and one for each bias; a norm four for each value (square, sum, scale, gain),
    one less without gain, one more for a bias, two more for a mean.
    """
    sublayers = sum(_sublayer(each) for layer in spec.layers for _, each in layer.sublayers())
    return sublayers + _norm(spec.final_norm) + _linear(spec.head.linear)


def _sublayer(sublayer: Sublayer) -> int:
    found = sum(_linear(getattr(sublayer, name)) for name in linear_names(sublayer))
    found += sum(_norm(getattr(sublayer, name)) for name in norm_names(sublayer))
    if isinstance(sublayer, MoE):
        found += sublayer.top_k * sum(_linear(getattr(sublayer, name)) for name in EXPERT_MAPS)
        found += 0 if sublayer.shared is None else _sublayer(sublayer.shared)
    return found


def _linear(linear: Linear | None) -> int:
    if linear is None:
        return 0
    weights = linear.in_features * linear.out_features
    if linear.triangular:
        weights = linear.in_features * (linear.in_features + 1) // 2
    return 2 * weights + linear.bias * linear.out_features


def _norm(norm: Norm | None) -> int:
    if norm is None:
        return 0
    centred = norm.kind in (NormKind.LAYER, NormKind.LAYER_ONE_PLUS)
    return norm.size * (3 + norm.weight + norm.bias + 2 * centred)
