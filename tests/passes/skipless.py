"""Skipless models of every make, with random weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from pyruntime.checkpoint import InMemory, Model
from pyruntime.spec import (
    MLP,
    Activation,
    Attention,
    Embedding,
    Head,
    Layer,
    Linear,
    ModelSpec,
    MoE,
    Norm,
    NormKind,
    Replacement,
    Rope,
    RopeKind,
    weight_shapes,
)
from tests.naive import Array

Arrays = dict[str, Array]
VOCAB = 61
ROPE = Rope(kind=RopeKind.DEFAULT, dim=6, theta=100.0)
TINY_EPS = 1e-30


def lin(n_in: int, n_out: int, bias: bool = False) -> Linear:
    return Linear(in_features=n_in, out_features=n_out, bias=bias)


def rms(size: int, **changes: Any) -> Norm:
    return Norm(**{"kind": NormKind.RMS, "size": size, "eps": 1e-5, **changes})


def attention(
    d: int = 24, heads: int = 4, kv: int = 2, head_dim: int = 6, bias: bool = False, **changes: Any
) -> Attention:
    q, e = heads * head_dim, kv * head_dim
    fields: dict[str, Any] = {
        "num_heads": heads, "num_kv_heads": kv, "head_dim": head_dim, "scale": head_dim**-0.5, "rope": ROPE,
        "q": lin(d, q, bias), "k": lin(d, e, bias), "v": lin(d, e, bias), "o": lin(q, d, bias), "residual": False,
    }  # fmt: skip
    return Attention(**{**fields, **changes})


def mlp(d: int = 24, ffn: int = 40, bias: bool = False, gated: bool = True, **changes: Any) -> MLP:
    fields: dict[str, Any] = {
        "gate": lin(d, ffn, bias) if gated else None, "up": lin(d, ffn, bias), "down": lin(ffn, d, bias),
        "activation": Activation.SILU if gated else Activation.GELU, "residual": False,
    }  # fmt: skip
    return MLP(**{**fields, **changes})


def skipless(
    layers: Sequence[tuple[Attention | None, MLP | MoE | Replacement | None]],
    *,
    parallel: bool = False,
    tied: bool = False,
    positions: int | None = None,
    final_norm: bool = True,
    scale: float = 1.7,
    vocab: int = VOCAB,
) -> ModelSpec:
    first = next(part for pair in layers for part in pair if part is not None)
    last = next(part for pair in reversed(layers) for part in reversed(pair) if part is not None)
    return ModelSpec(
        family="test",
        embedding=Embedding(vocab_size=vocab, size=first.in_size, scale=scale, positions=positions),
        layers=tuple(Layer(index=i, attention=a, mlp=m, parallel=parallel) for i, (a, m) in enumerate(layers)),
        final_norm=rms(last.out_size) if final_norm else None,
        head=Head(linear=lin(last.out_size, vocab), tied=tied),
        max_position=64,
    )


def weights_of(spec: ModelSpec, seed: int = 0) -> Arrays:
    """Gaussian weights that keep a stream of about unit size; gains around one."""
    rng = np.random.default_rng(seed)
    found = {}
    for name, shape in weight_shapes(spec).items():
        if len(shape) == 2 and not name.startswith("embedding"):
            found[name] = rng.normal(0, 1.2 / math.sqrt(shape[1]), shape)
        else:
            found[name] = rng.normal(1.0 if ".pre.weight" in name or "norm" in name else 0.0, 0.5, shape)
    return found


def model_of(spec: ModelSpec, weights: Arrays, dtype: torch.dtype = torch.float64) -> Model:
    """The specification with these weights, rounded to `dtype`, in memory."""
    tensors = {name: InMemory(torch.from_numpy(each).to(dtype)) for name, each in weights.items()}
    return Model(spec=spec, dense_spec=spec, weights=tensors, dtype=str(dtype).removeprefix("torch."))


def arrays_of(model: Model) -> Arrays:
    """The model's weights as they would be read."""
    return {name: weight.read().double().numpy() for name, weight in model.weights.items()}
