"""Scores by brute force: hooks on a transformers model in float64, the formulas written plainly, no code of ours."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass
class Streams:
    """By layer, rows of all sequences one below the other: (X, added) of attention and MLP; boundaries by sequence."""

    attention: list[tuple[Array, Array]] = field(default_factory=list)
    mlp: list[tuple[Array, Array]] = field(default_factory=list)
    boundaries: list[list[Array]] = field(default_factory=list)


def array(tensor: torch.Tensor) -> Array:
    return np.asarray(tensor.detach().double().numpy()[0], dtype=np.float64)


def first(value: Any) -> torch.Tensor:
    found = value[0] if isinstance(value, tuple) else value
    assert isinstance(found, torch.Tensor)
    return found


def streams(hf_model: Any, layers: str, kind: str, sequences: Sequence[Sequence[int]]) -> Streams:
    """What every sublayer reads and adds. `kind`: "pre" norms, "sandwich" norms (Gemma), or "parallel" (GPT-NeoX)."""
    model = hf_model.double().eval()
    found = Streams()
    stack = model.get_submodule(layers)
    rows: dict[tuple[str, int], list[Array]] = {}
    hooks = []
    for i, layer in enumerate(stack):
        hooks += _hooks(layer, kind, i, rows)
    for sequence in sequences:
        with torch.no_grad():
            model(torch.tensor([list(sequence)]), use_cache=False)
        entries = [rows["entry", i][-1] for i in range(len(stack))]
        found.boundaries.append([*entries, rows["exit", len(stack) - 1][-1]])
    for hook in hooks:
        hook.remove()
    for i in range(len(stack)):
        joined = {name: np.concatenate(rows[name, i]) for name in ("entry", "attention", "middle", "mlp")}
        found.attention.append((joined["entry"], joined["attention"]))
        found.mlp.append((joined["middle"], joined["mlp"]))
    return found


def _hooks(layer: Any, kind: str, i: int, rows: dict[tuple[str, int], list[Array]]) -> list[Any]:
    def keep(name: str, value: Any) -> None:
        rows.setdefault((name, i), []).append(array(first(value)))

    hooks = [
        layer.register_forward_pre_hook(lambda _, args: keep("entry", args)),
        layer.register_forward_hook(lambda *called: keep("exit", called[2])),
    ]
    modules = {
        "pre": ("self_attn", "post_attention_layernorm", "mlp"),
        "sandwich": ("post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
        # both sublayers read the layer's input
        "parallel": ("attention", None, "mlp"),
    }[kind]
    attention, middle, mlp = modules
    hooks.append(layer.get_submodule(attention).register_forward_hook(lambda *called: keep("attention", called[2])))
    hooks.append(layer.get_submodule(mlp).register_forward_hook(lambda *called: keep("mlp", called[2])))
    before = layer if middle is None else layer.get_submodule(middle)
    hooks.append(before.register_forward_pre_hook(lambda _, args: keep("middle", args)))
    return hooks


def cosines(x: Array, y: Array) -> Array:
    return np.asarray((x * y).sum(-1) / np.sqrt((x * x).sum(-1) * (y * y).sum(-1)), dtype=np.float64)


def angles(x: Array, y: Array) -> Array:
    return np.asarray(np.arccos(np.clip(cosines(x, y), -1, 1)) / math.pi, dtype=np.float64)


def magnitudes(x: Array, y: Array) -> Array:
    return np.asarray(np.linalg.norm(y - x, axis=-1) / np.linalg.norm(y, axis=-1), dtype=np.float64)


def metrics(x: Array, y: Array) -> dict[str, float]:
    """The three statistics of rows x and y."""
    return {
        "cosine": 1 - cosines(x, y).mean(),
        "angular": angles(x, y).mean(),
        "magnitude": magnitudes(x, y).mean(),
    }


def expected(found: Streams) -> dict[str, dict[str, list[float]]]:
    """Scores by metric, kind and layer."""
    count = len(found.attention)
    blocks = [tuple(np.concatenate([b[i + j] for b in found.boundaries]) for j in (0, 1)) for i in range(count)]
    pairs = {
        "attention": [(x, x + added) for x, added in found.attention],
        "mlp": [(x, x + added) for x, added in found.mlp],
        "block": blocks,
    }
    return {
        metric: {kind: [metrics(*pair)[metric] for pair in each] for kind, each in pairs.items()}
        for metric in ("cosine", "angular", "magnitude")
    }


def run_distances(found: Streams, length: int) -> dict[str, list[float]]:
    """Distances over runs of `length` layers: cosine over all tokens, angle of the last tokens."""
    starts = range(len(found.attention) + 1 - length)
    joined = {i: np.concatenate([b[i] for b in found.boundaries]) for i in range(len(found.attention) + 1)}
    last = {i: np.stack([b[i][-1] for b in found.boundaries]) for i in joined}
    return {
        "cosine": [1 - cosines(joined[i], joined[i + length]).mean() for i in starts],
        "angular": [float(angles(last[i], last[i + length]).mean()) for i in starts],
    }
