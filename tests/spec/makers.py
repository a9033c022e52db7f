"""Small parts of specifications that tests change one field at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from pyruntime.errors import UsageError
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
    Rope,
    RopeKind,
)

Make = Callable[..., Any]
NAN, INF = float("nan"), float("inf")


def linear(in_features: Any = 8, out_features: Any = 8, bias: Any = False) -> Linear:
    return Linear(in_features=in_features, out_features=out_features, bias=bias)


def norm(size: Any = 8, eps: Any = 1e-5, **fields: Any) -> Norm:
    return Norm(kind=NormKind.RMS, size=size, eps=eps, **fields)


def rope(kind: RopeKind = RopeKind.DEFAULT, **fields: Any) -> Rope:
    return Rope(**{"kind": kind, "dim": 4, "theta": 1e4, **fields})


def llama3(**fields: Any) -> Rope:
    return rope(
        RopeKind.LLAMA3, **{"original_max_position": 8, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **fields}
    )


def yarn(**fields: Any) -> Rope:
    known = {"original_max_position": 8, "beta_fast": 32.0, "beta_slow": 1.0, "attention_factor": 1.0}
    return rope(RopeKind.YARN, **{**known, **fields})


def longrope(**fields: Any) -> Rope:
    known = {"original_max_position": 8, "attention_factor": 1.0, "divisors": (1.0, 2.0), "dim": 4}
    return rope(RopeKind.LONGROPE, **{**known, **fields})


def attention(**fields: Any) -> Attention:
    """Two query heads on one key head of 4 values each, over a stream of 8."""
    whole = {"q": linear(8, 8), "k": linear(8, 4), "v": linear(8, 4), "o": linear(8, 8), "scale": 0.5}
    return Attention(**{"num_heads": 2, "num_kv_heads": 1, "head_dim": 4, **whole, **fields})


def wide_attention(heads: Any = 1, kv_heads: Any = 1, head_dim: Any = 4) -> Attention:
    """Widths that follow the counts, so that only the counts can be wrong."""

    def width(count: Any) -> int:
        sizes = type(count) is type(head_dim) is int and count * head_dim > 0
        return min(count * head_dim, 2**20) if sizes else 1

    q, kv = linear(8, width(heads)), linear(8, width(kv_heads))
    out = linear(q.out_features, 8)
    return Attention(num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim, q=q, k=kv, v=kv, o=out, scale=0.5)


def mlp(**fields: Any) -> MLP:
    return MLP(
        **{"gate": linear(8, 16), "up": linear(8, 16), "down": linear(16, 8), "activation": Activation.SILU, **fields}
    )


def packed(**fields: Any) -> Attention:
    """Queries, keys and values from a column map: eight values of the input, eight of `rest`."""
    whole = {"q": None, "k": None, "v": None, "columns": tuple(range(16)), "rest": linear(8, 16)}
    return attention(**{**whole, **fields})


def moe(**fields: Any) -> MoE:
    """Four experts, two of which see a token."""
    maps = {"router": linear(8, 4), "gate": linear(8, 6), "up": linear(8, 6), "down": linear(6, 8)}
    return MoE(**{"num_experts": 4, "top_k": 2, "activation": Activation.SILU, **maps, **fields})


def layer(index: Any = 0, **fields: Any) -> Layer:
    return Layer(**{"index": index, "attention": attention(), "mlp": mlp(), **fields})


def model(**fields: Any) -> ModelSpec:
    whole = {"embedding": Embedding(vocab_size=10, size=8), "final_norm": norm(), "max_position": 16, "family": "llama"}
    return ModelSpec(**{"layers": (layer(),), "head": Head(linear=linear(8, 10), tied=False), **whole, **fields})


def deep_model(num_layers: int) -> ModelSpec:
    return model(layers=tuple(Layer(index=i, attention=None, mlp=None) for i in range(num_layers)))


def refused(make: Callable[[], Any]) -> str:
    with pytest.raises(UsageError) as caught:
        make()
    assert caught.value.code == "SPEC"
    assert caught.value.exit_code == 2
    return str(caught.value)
