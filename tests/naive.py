"""An independent float64 transformer, written from the formulas: no cache, no fusion, loops over heads and positions.

It judges what no transformers class can express: merged projections, replacements, shaped attention, mixtures of norms.
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
    matrix = weights[f"{prefix}.weight"]
    if present.triangular:
        packed, matrix = matrix, np.zeros((present.out_features, present.in_features))
        for i in range(len(matrix)):
            matrix[i, : i + 1], packed = packed[: i + 1], packed[i + 1 :]
    y = x @ matrix.T
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


def projected(attention: Attention, weights: Weights, prefix: str, x: Array, ids: list[int]) -> dict[str, Array]:
    """Queries, keys and values as projected, all heads side by side."""
    if attention.table or attention.columns is not None:
        if attention.columns is None:
            found = weights[f"{prefix}table.weight"][ids]
        else:
            rest = linear(attention.rest, prefix + "rest", weights, x)
            found = np.stack([np.concatenate((x, rest), axis=1)[:, column] for column in attention.columns], axis=1)
        q_size, kv_size = attention.q_size, attention.kv_size
        return dict(zip("qkv", np.split(found, [q_size, q_size + kv_size], axis=1), strict=True))
    made = {role: linear(getattr(attention, role), prefix + role, weights, x) for role in "qk"}
    source = made["k"] if attention.cached == "keys" else x
    return {**made, "v": linear(attention.v, prefix + "v", weights, source)}


def heads(attention: Attention, role: str, count: int, weights: Weights, prefix: str, y: Array) -> list[Array]:
    own: Norm | None = getattr(attention, f"{role}_norm")
    if own is not None and own.size != attention.head_dim:
        y, own = norm(own, f"{prefix}{role}_norm", weights, y), None
    split = [y[:, i * attention.head_dim : (i + 1) * attention.head_dim] for i in range(count)]
    split = [norm(own, f"{prefix}{role}_norm", weights, each) for each in split]
    return split if role == "v" else [rotated(attention, each) for each in split]


def alibi_slopes(num_heads: int) -> list[float]:
    """As in the code of Press et al. 2022: a geometric series, and every second slope of the next longer one."""
    power = 2 ** math.floor(math.log2(num_heads))
    start = 2 ** (-(2 ** -(math.log2(power) - 3)))
    found = [start * start**i for i in range(power)]
    return found if power == num_heads else found + alibi_slopes(2 * power)[0::2][: num_heads - power]


def attend(attention: Attention, prefix: str, weights: Weights, x: Array, ids: list[int]) -> Array:
    made = projected(attention, weights, prefix, x, ids)
    queries = heads(attention, "q", attention.num_heads, weights, prefix, made["q"])
    keys = heads(attention, "k", attention.num_kv_heads, weights, prefix, made["k"])
    values = heads(attention, "v", attention.num_kv_heads, weights, prefix, made["v"])
    group = attention.num_heads // attention.num_kv_heads
    slopes = alibi_slopes(attention.num_heads) if attention.alibi else [0.0] * attention.num_heads
    out = []
    for i, query in enumerate(queries):
        mixed = np.zeros_like(query)
        for position in range(len(x)):
            first = 0 if attention.window is None else max(0, position - attention.window + 1)
            scores = keys[i // group][first : position + 1] @ query[position] * attention.scale
            if attention.softcap is not None:
                scores = attention.softcap * np.tanh(scores / attention.softcap)
            scores = scores + slopes[i] * np.arange(first - position, 1)
            weight = np.exp(scores - scores.max())
            seen = values[i // group][first : position + 1]
            mixed[position] = weight / weight.sum() @ seen
            if attention.shaped:
                gain, skip, centre = (weights[f"{prefix}{name}_gain"][i] for name in ("softmax", "identity", "centre"))
                mixed[position] = gain * mixed[position] + skip * seen[-1] - centre * seen.mean(axis=0)
        out.append(mixed)
    y = norm(attention.sub, prefix + "sub", weights, np.concatenate(out, axis=1))
    return linear(attention.o, prefix + "o", weights, y)


def sublayer(spec: Attention | MLP | Replacement, prefix: str, weights: Weights, x: Array, ids: list[int]) -> Array:
    x = norm(spec.pre, prefix + "pre", weights, x)
    match spec:
        case Attention():
            y = attend(spec, prefix, weights, x, ids)
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
    ids = list(token_ids)
    x = weights["embedding.weight"][ids] * spec.embedding.scale
    if spec.embedding.positions is not None:
        x = x + weights["embedding.position.weight"][: len(ids)]
    for layer in spec.layers:
        entry, sums = x, []
        for kind, part in layer.sublayers():
            prefix = f"layers.{layer.index}.{kind}."
            y = sublayer(part, prefix, weights, entry if layer.parallel else x, ids)
            sums.append(y)
            if not layer.parallel:
                x = linear(part.shortcut, prefix + "shortcut", weights, x) + y if part.residual else y
        if layer.parallel and sums:
            residual = next(part.residual for _, part in layer.sublayers())
            x = sum(sums) + (entry if residual else 0.0)
    x = norm(spec.final_norm, "final_norm", weights, x)
    if spec.head.tied:
        out = x @ weights["embedding.weight"].T + (weights["head.bias"] if spec.head.linear.bias else 0.0)
    else:
        out = linear(spec.head.linear, "head", weights, x)
    cap = spec.head.softcap
    return np.asarray(out if cap is None else cap * np.tanh(out / cap), dtype=np.float64)
