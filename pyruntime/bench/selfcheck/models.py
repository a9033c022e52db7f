"""Small models that between them have every op, for checks of kernels on the machine at hand."""

from __future__ import annotations

import math
import zlib
from dataclasses import replace
from typing import Any, Final

import torch

from pyruntime.checkpoint import InMemory, Model, Weight
from pyruntime.graph import Graph, build, fuse
from pyruntime.spec import (
    MLP,
    Activation,
    Attention,
    Cached,
    Embedding,
    Head,
    Layer,
    Linear,
    ModelSpec,
    Norm,
    NormKind,
    Replacement,
    Rope,
    RopeKind,
    weight_shapes,
)

VOCAB: Final = 203
# no multiple of the kernels' blocks
_SIZE: Final = 72
_HIDDEN: Final = 104
_HEAD_DIM: Final = 16
_RMS: Final = Norm(kind=NormKind.RMS, size=_SIZE, eps=1e-5)
_LAYER: Final = Norm(kind=NormKind.LAYER, size=_SIZE, eps=1e-5, bias=True)
_ROPE: Final = Rope(kind=RopeKind.DEFAULT, dim=_HEAD_DIM, theta=10_000.0)


def graphs() -> list[tuple[ModelSpec, Graph]]:
    """Models and the forms that their graphs are checked in: as engines run them, and one with every op apart."""
    made = specs()
    return [*((spec, fuse(build(spec))) for spec in made), (made[1], build(made[1]))]


def specs() -> tuple[ModelSpec, ...]:
    """A pruned Llama; one with biases, windows, caps, replacements and norms behind sublayers; one without residual."""
    attention, mlp = _attention(6, 2), _mlp()
    plain = _mlp(gate=None, activation=Activation.GELU, bias=True, pre=_LAYER)
    biased = _attention(4, 4, bias=True, window=9, softcap=5.0, q_norm=replace(_RMS, size=_HEAD_DIM), pre=_LAYER)
    replaced = Replacement(linear=_linear(_SIZE, _SIZE, True), pre=_RMS, post=_RMS)
    # queries and outputs merged away: as many values as the stream has
    merged = replace(_attention(4, 2, head_dim=_SIZE // 4), q=None, o=None, residual=False, pre=None, rope=None)
    # without a gate: products of two small values would leave what float16 can hold
    free = _mlp(gate=None, activation=Activation.GELU_TANH, residual=False, pre=None)
    return (
        _model([(attention, mlp), (None, mlp), (None, mlp), (attention, None), (attention, mlp)]),
        _model(
            [(biased, plain), (attention, replaced), (replace(biased, post=_RMS), replace(mlp, post=_RMS))],
            parallel=0,
            final_norm=_LAYER,
            head=Head(linear=_linear(_SIZE, VOCAB, True), tied=False, softcap=20.0),
        ),
        _model([(merged, free), (merged, free)], head=Head(linear=_linear(_SIZE, VOCAB), tied=True)),
    )


def slim_spec() -> ModelSpec:
    """A model that some implementations leave to the reference."""
    attention = _attention(6, 2)
    kv_size = 2 * _HEAD_DIM
    slim = replace(attention, cached=Cached.KEYS, v=_linear(kv_size, kv_size))
    return _model([(slim, _mlp())])


def model_of(spec: ModelSpec, dtype: torch.dtype) -> Model:
    """The model with random weights that keep the size of what they multiply, the same at every call."""
    weights: dict[str, Weight] = {
        name: InMemory(_values(name, shape).to(dtype)) for name, shape in weight_shapes(spec).items()
    }
    return Model(spec=spec, dense_spec=spec, weights=weights, dtype=str(dtype).removeprefix("torch."))


def _values(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    values = torch.randn(shape, generator=generator)
    if len(shape) > 1:
        return values / math.sqrt(shape[-1])
    return 0.2 * values + (1.0 if name.endswith(".weight") else 0.0)


def _linear(n_in: int, n_out: int, bias: bool = False) -> Linear:
    return Linear(in_features=n_in, out_features=n_out, bias=bias)


def _attention(num_heads: int, num_kv_heads: int, *, head_dim: int = _HEAD_DIM, **changes: Any) -> Attention:
    bias = changes.pop("bias", False)
    q_size, kv_size = num_heads * head_dim, num_kv_heads * head_dim
    fields: dict[str, Any] = {
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "head_dim": head_dim,
        "q": _linear(_SIZE, q_size, bias),
        "k": _linear(_SIZE, kv_size, bias),
        "v": _linear(_SIZE, kv_size, bias),
        "o": _linear(q_size, _SIZE, bias),
        "scale": head_dim**-0.5,
        "rope": _ROPE,
        "pre": _RMS,
    }
    return Attention(**{**fields, **changes})


def _mlp(*, bias: bool = False, **changes: Any) -> MLP:
    fields: dict[str, Any] = {
        "gate": _linear(_SIZE, _HIDDEN, bias),
        "up": _linear(_SIZE, _HIDDEN, bias),
        "down": _linear(_HIDDEN, _SIZE, bias),
        "activation": Activation.SILU,
        "pre": _RMS,
    }
    return MLP(**{**fields, **changes})


def _model(layers: list[tuple[Any, Any]], parallel: int | None = None, **changes: Any) -> ModelSpec:
    fields: dict[str, Any] = {
        "family": "check",
        "embedding": Embedding(vocab_size=VOCAB, size=_SIZE),
        "layers": tuple(
            Layer(index=i, attention=attention, mlp=mlp, parallel=i == parallel)
            for i, (attention, mlp) in enumerate(layers)
        ),
        "final_norm": _RMS,
        "head": Head(linear=_linear(_SIZE, VOCAB), tied=False),
        "max_position": 256,
    }
    return ModelSpec(**{**fields, **changes})
