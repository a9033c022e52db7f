"""An independent float64 transformer, written from the formulas: no cache, no fusion, loops over heads and positions.

It judges what no transformers class can express: merged projections, replacements, mixtures of norms in one model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyruntime.spec import MLP, Attention, ModelSpec, Norm, Replacement

Array = NDArray[np.float64]
Weights = Mapping[str, Array]


def norm(spec: Norm | None, prefix: str, weights: Weights, x: Array) -> Array:
    if spec is None:
        return x
    if spec.kind.startswith("layer"):
        x = x - x.mean(-1, keepdims=True)
        y = x / np.sqrt((x * x).mean(-1, keepdims=True) + spec.eps)
    else:
        y = x / np.sqrt((x * x).mean(-1, keepdims=True) + spec.eps)
    if spec.weight:
        y = y * (weights[f"{prefix}.weight"] + (1.0 if spec.kind.endswith("one_plus") else 0.0))
    return y + weights[f"{prefix}.bias"] if spec.bias else y


def linear(present: Any, prefix: str, weights: Weights, x: Array) -> Array:
    if present is None:
        return x
    y = x @ weights[f"{prefix}.weight"].T
    return y + weights[f"{prefix}.bias"] if present.bias else y


def activate(kind: str, x: Array) -> Array:
    if kind == "silu":
        return x / (1 + np.exp(-x))
    if kind == "gelu":
        return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))
    if kind == "gelu_tanh":
        return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return np.maximum(x, 0) ** (2 if kind == "relu2" else 1)


def rotated(attention: Attention, x: Array) -> Array:
    """Default rotary embedding of x [positions, head_dim]."""
    rope = attention.rope
    if rope is None:
        return x
    y = x.copy()
    half = rope.dim // 2
    for position in range(len(x)):
        for pair in range(half):
            angle = position * rope.theta ** (-2 * pair / rope.dim)
            a, b = x[position, pair], x[position, pair + half]
            y[position, pair] = a * math.cos(angle) - b * math.sin(angle)
            y[position, pair + half] = b * math.cos(angle) + a * math.sin(angle)
    return y


def heads(attention: Attention, role: str, count: int, weights: Weights, prefix: str, x: Array) -> list[Array]:
    y = linear(getattr(attention, role), prefix + role, weights, x)
    own: Norm | None = None if role == "v" else getattr(attention, f"{role}_norm")
    if own is not None and own.size != attention.head_dim:
        y, own = norm(own, f"{prefix}{role}_norm", weights, y), None
    split = [y[:, i * attention.head_dim : (i + 1) * attention.head_dim] for i in range(count)]
    split = [norm(own, f"{prefix}{role}_norm", weights, each) for each in split]
    return split if role == "v" else [rotated(attention, each) for each in split]


def attend(attention: Attention, prefix: str, weights: Weights, x: Array) -> Array:
    queries = heads(attention, "q", attention.num_heads, weights, prefix, x)
    keys = heads(attention, "k", attention.num_kv_heads, weights, prefix, x)
    values = heads(attention, "v", attention.num_kv_heads, weights, prefix, x)
    group = attention.num_heads // attention.num_kv_heads
    out = []
    for i, query in enumerate(queries):
        mixed = np.zeros_like(query)
        for position in range(len(x)):
            first = 0 if attention.window is None else max(0, position - attention.window + 1)
            scores = keys[i // group][first : position + 1] @ query[position] * attention.scale
            if attention.softcap is not None:
                scores = attention.softcap * np.tanh(scores / attention.softcap)
            weight = np.exp(scores - scores.max())
            mixed[position] = weight / weight.sum() @ values[i // group][first : position + 1]
        out.append(mixed)
    y = norm(attention.sub, prefix + "sub", weights, np.concatenate(out, axis=1))
    return linear(attention.o, prefix + "o", weights, y)


def sublayer(spec: Attention | MLP | Replacement, prefix: str, weights: Weights, x: Array) -> Array:
    x = norm(spec.pre, prefix + "pre", weights, x)
    match spec:
        case Attention():
            y = attend(spec, prefix, weights, x)
        case Replacement():
            y = linear(spec.linear, prefix + "linear", weights, x)
        case MLP():
            up = linear(spec.up, prefix + "up", weights, x)
            gated = activate(
                spec.activation, up if spec.gate is None else linear(spec.gate, prefix + "gate", weights, x)
            )
            hidden = gated if spec.gate is None else gated * up
            y = linear(spec.down, prefix + "down", weights, norm(spec.sub, prefix + "sub", weights, hidden))
    return norm(spec.post, prefix + "post", weights, y)


def logits(spec: ModelSpec, weights: Weights, token_ids: Sequence[int]) -> Array:
    """Logits [tokens, vocab] of the whole sequence."""
    x = weights["embedding.weight"][list(token_ids)] * spec.embedding.scale
    for layer in spec.layers:
        entry = x
        for kind, part in layer.sublayers():
            y = sublayer(part, f"layers.{layer.index}.{kind}.", weights, entry if layer.parallel else x)
            x = x + y if part.residual else y
    x = norm(spec.final_norm, "final_norm", weights, x)
    table = weights["embedding.weight" if spec.head.tied else "head.weight"]
    out = x @ table.T + (weights["head.bias"] if spec.head.linear.bias else 0.0)
    cap = spec.head.softcap
    return np.asarray(out if cap is None else cap * np.tanh(out / cap), dtype=np.float64)
