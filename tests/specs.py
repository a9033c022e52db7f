"""Small specifications of everything that a model can be made of, and random weights for them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from pyruntime.checkpoint import InMemory, Model
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
    MoE,
    Norm,
    NormKind,
    Replacement,
    Rope,
    RopeKind,
    weight_shapes,
)
from tests import naive

D = 24
VOCAB = 37
ROPE = Rope(kind=RopeKind.DEFAULT, dim=6, theta=100.0)


def rms(size: int = D, **changes: Any) -> Norm:
    return Norm(**{"kind": NormKind.RMS, "size": size, "eps": 1e-5, **changes})


def lin(n_in: int, n_out: int, bias: bool = False) -> Linear:
    return Linear(in_features=n_in, out_features=n_out, bias=bias)


def tri(size: int, bias: bool = False) -> Linear:
    return Linear(in_features=size, out_features=size, bias=bias, triangular=True)


def pivoted(attention: Attention, seed: int = 0, bias: bool = False) -> Attention:
    """The attention with its queries, keys and values scattered over its input and over `rest`."""
    size, width = attention.in_size, attention.q_size + 2 * attention.kv_size
    columns = tuple(int(c) for c in np.random.default_rng(seed).permutation(max(width, size + 1))[:width])
    rest = lin(size, max(columns) + 1 - size, bias)
    return replace(attention, q=None, k=None, v=None, columns=columns, rest=rest)


ATTENTION = Attention(
    num_heads=4, num_kv_heads=2, head_dim=6, q=lin(D, 24), k=lin(D, 12), v=lin(D, 12), o=lin(24, D),
    scale=0.4, rope=ROPE, pre=rms(),
)  # fmt: skip
PLAIN_MLP = MLP(gate=lin(D, 40), up=lin(D, 40), down=lin(40, D), activation=Activation.SILU, pre=rms())
REPLACEMENT = Replacement(linear=lin(D, D, bias=True), pre=rms(), post=rms())
EXPERTS = MoE(
    num_experts=4, top_k=2, router=lin(D, 4), gate=lin(D, 20), up=lin(D, 20), down=lin(20, D),
    activation=Activation.SILU, pre=rms(),
)  # fmt: skip
LAYER_NORM = Norm(kind=NormKind.LAYER, size=D, eps=1e-5, bias=True)

ATTENTIONS = {
    "window": replace(ATTENTION, window=3),
    "window wider than a page": replace(ATTENTION, window=19),
    "softcap": replace(ATTENTION, softcap=1.5),
    "partial rope": replace(ATTENTION, rope=replace(ROPE, dim=4)),
    "no rope": replace(ATTENTION, rope=None),
    "biases": replace(ATTENTION, q=lin(D, 24, True), k=lin(D, 12, True), v=lin(D, 12, True), o=lin(24, D, True)),
    "norms per head": replace(ATTENTION, q_norm=rms(6), k_norm=rms(6, kind=NormKind.RMS_ONE_PLUS)),
    "norms over heads": replace(ATTENTION, q_norm=rms(24), k_norm=rms(12)),
    "sub and post norm": replace(ATTENTION, sub=rms(24), post=rms()),
    "layer norm": replace(ATTENTION, pre=LAYER_NORM),
    "layer norm one plus": replace(ATTENTION, pre=replace(LAYER_NORM, kind=NormKind.LAYER_ONE_PLUS)),
    "weightless norm": replace(ATTENTION, pre=rms(weight=False)),
    "no norm": replace(ATTENTION, pre=None),
    "query merged": replace(ATTENTION, q=None),
    "output merged": replace(ATTENTION, o=None),
    "key merged": replace(ATTENTION, num_kv_heads=4, k=None, v=lin(D, 24)),
    "value merged": replace(ATTENTION, num_kv_heads=4, k=lin(D, 24), v=None),
    "all merged": replace(ATTENTION, num_kv_heads=4, q=None, k=None, v=None, o=None),
    "no residual": replace(ATTENTION, residual=False),
    "no residual, no norm, q and o merged": replace(ATTENTION, residual=False, q=None, o=None, pre=None),
    "replaced": REPLACEMENT,
    "pivoted": pivoted(ATTENTION),
    "pivoted with biases, no norm": pivoted(replace(ATTENTION, pre=None), 1, bias=True),
    "pivoted with norms": pivoted(replace(ATTENTION, q_norm=rms(24), k_norm=rms(6), v_norm=rms(6)), 2),
    # no query needs rest, then no key or value does
    "pivoted, queries from the input": replace(
        pivoted(ATTENTION), columns=(*range(D), *range(D + 23, D - 1, -1)), rest=lin(D, 24)
    ),
    "pivoted, keys and values from the input": replace(
        pivoted(ATTENTION), columns=(*range(D + 23, D - 1, -1), *range(D)), rest=lin(D, 24)
    ),
    "norm of values per head": replace(ATTENTION, v_norm=rms(6, kind=NormKind.RMS_ONE_PLUS)),
    "norm of values over heads, value merged": replace(
        ATTENTION, num_kv_heads=4, k=lin(D, 24), v=None, v_norm=rms(24), k_norm=rms(6)
    ),
    "triangular query and output": replace(ATTENTION, q=tri(D, True), o=tri(D)),
    "all triangular": replace(ATTENTION, num_kv_heads=4, q=tri(D), k=tri(D), v=tri(D, True), o=tri(D, True)),
    "table": replace(ATTENTION, q=None, k=None, v=None, pre=None, table=True),
    "table with norms": replace(
        ATTENTION, q=None, k=None, v=None, pre=None, table=True, q_norm=rms(6), k_norm=rms(12), v_norm=rms(6)
    ),
    "shaped": replace(ATTENTION, shaped=True),
    "shaped with window and softcap": replace(ATTENTION, shaped=True, window=5, softcap=1.5),
    "alibi": replace(ATTENTION, alibi=True, rope=None),
    "alibi with window, softcap and gains": replace(ATTENTION, alibi=True, window=19, softcap=1.5, shaped=True),
    "shortcut": replace(ATTENTION, shortcut=lin(D, D)),
    "shortcut and post norm": replace(ATTENTION, shortcut=lin(D, D), post=rms()),
}
# what keeps keys alone, or inputs: the C++ target leaves them to the reference
SLIM_ATTENTIONS = {
    "keys": replace(ATTENTION, cached=Cached.KEYS, v=lin(12, 12)),
    "keys of all heads, biases": replace(
        ATTENTION, num_kv_heads=4, k=lin(D, 24, True), v=lin(24, 24, True), cached=Cached.KEYS
    ),
    "keys, norms": replace(ATTENTION, cached=Cached.KEYS, v=lin(12, 12), k_norm=rms(6), v_norm=rms(6), q_norm=rms(24)),
    "keys, window, softcap, gains": replace(
        ATTENTION, cached=Cached.KEYS, v=lin(12, 12, True), window=7, softcap=1.5, shaped=True
    ),
    "keys, triangular": replace(ATTENTION, cached=Cached.KEYS, v=tri(12), rope=None, alibi=True),
    "inputs": replace(ATTENTION, cached=Cached.INPUTS),
    "inputs, norms and biases": replace(
        ATTENTION, cached=Cached.INPUTS, k=lin(D, 12, True), v=lin(D, 12, True), k_norm=rms(12), pre=LAYER_NORM
    ),
    "inputs, query merged, no norm": replace(ATTENTION, cached=Cached.INPUTS, q=None, pre=None, shaped=True),
}
MLPS = {
    **{f"plain {act}": replace(PLAIN_MLP, gate=None, activation=act) for act in Activation},
    **{f"gated {act}": replace(PLAIN_MLP, activation=act) for act in Activation},
    "biases": replace(PLAIN_MLP, gate=lin(D, 40, True), up=lin(D, 40, True), down=lin(40, D, True)),
    "sub and post norm": replace(PLAIN_MLP, sub=rms(40), post=rms(kind=NormKind.RMS_ONE_PLUS)),
    "no norm": replace(PLAIN_MLP, pre=None),
    "no residual": replace(PLAIN_MLP, residual=False),
    "replaced": REPLACEMENT,
    "triangular": replace(PLAIN_MLP, gate=tri(D), up=tri(D, True), down=tri(D)),
    "gate alone triangular": replace(PLAIN_MLP, gate=tri(D), up=lin(D, D), down=lin(D, D)),
    "shortcut": replace(PLAIN_MLP, shortcut=lin(D, D)),
}


def model_of(layers: list[tuple[Any, Any, bool]], **changes: Any) -> ModelSpec:
    fields: dict[str, Any] = {
        "family": "test",
        "embedding": Embedding(vocab_size=VOCAB, size=D, scale=1.7),
        "layers": tuple(
            Layer(index=i, attention=attention, mlp=mlp, parallel=parallel)
            for i, (attention, mlp, parallel) in enumerate(layers)
        ),
        "final_norm": rms(),
        "head": Head(linear=lin(D, VOCAB), tied=False),
        "max_position": 256,
    }
    return ModelSpec(**{**fields, **changes})


def attention_of(size: int, num_heads: int, num_kv_heads: int, head_dim: int, **changes: Any) -> Attention:
    """An attention of these sizes with a rope over the whole head, or all but the last value of an odd one."""
    q_size, kv_size = num_heads * head_dim, num_kv_heads * head_dim
    fields: dict[str, Any] = {
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "head_dim": head_dim,
        "q": lin(size, q_size),
        "k": lin(size, kv_size),
        "v": lin(size, kv_size),
        "o": lin(q_size, size),
        "scale": 0.4,
        "rope": replace(ROPE, dim=head_dim // 2 * 2) if head_dim > 1 else None,
        "pre": rms(size),
    }
    return Attention(**{**fields, **changes})


def mlp_of(size: int, hidden: int, **changes: Any) -> MLP:
    """A gated MLP of these sizes."""
    fields: dict[str, Any] = {"gate": lin(size, hidden), "up": lin(size, hidden), "down": lin(hidden, size)}
    return replace(PLAIN_MLP, **{**fields, "pre": rms(size), **changes})


# the tails of vectors and panels are where rows could meet: no width here is a multiple of 16
ODD_MODELS = {
    "window and softcaps": model_of(
        [
            (attention_of(33, 6, 2, 10, window=19, softcap=2.0), mlp_of(33, 70), False),
            (attention_of(33, 3, 1, 6, window=3), mlp_of(33, 41, activation=Activation.GELU), False),
            (attention_of(33, 5, 1, 24), mlp_of(33, 100, sub=rms(100)), False),
        ],
        embedding=Embedding(vocab_size=61, size=33, scale=1.7),
        final_norm=rms(33),
        head=Head(linear=lin(33, 61, bias=True), tied=False, softcap=3.0),
    ),
    "merged, parallel, chained": model_of(
        [
            (ATTENTIONS["all merged"], MLPS["biases"], False),
            (ATTENTION, PLAIN_MLP, True),
            (None, MLPS["plain gelu_tanh"], False),
            (ATTENTIONS["norms per head"], replace(PLAIN_MLP, residual=False), False),
        ],
        head=Head(linear=lin(D, VOCAB), tied=True),
    ),
    "shaped, alibi, scattered, triangular": model_of(
        [
            (
                attention_of(33, 6, 2, 10, pre=None, q=None, k=None, v=None, table=True, v_norm=rms(20)),
                mlp_of(33, 41, shortcut=lin(33, 33)),
                False,
            ),
            (pivoted(attention_of(33, 3, 1, 6, shaped=True, window=70), 3), mlp_of(33, 41, gate=None), True),
            (
                attention_of(
                    33, 3, 3, 11, alibi=True, rope=None, q=tri(33), v=tri(33), o=tri(33, True), residual=False
                ),
                replace(mlp_of(33, 33, residual=False), gate=tri(33), up=tri(33)),
                True,
            ),
            (pivoted(attention_of(33, 5, 1, 24, shaped=True, alibi=True, softcap=2.0), 4, bias=True), None, False),
        ],
        embedding=Embedding(vocab_size=61, size=33, scale=1.7, positions=256),
        final_norm=rms(33),
        head=Head(linear=lin(33, 61), tied=True),
    ),
    # at 150 tokens a whole block of 64 positions lies before the window
    "long window, long softcap": model_of(
        [
            (attention_of(33, 6, 2, 10, window=70), mlp_of(33, 20), False),
            (attention_of(33, 3, 1, 24, softcap=2.0), None, False),
        ],
        embedding=Embedding(vocab_size=61, size=33, scale=1.7),
        final_norm=rms(33),
        head=Head(linear=lin(33, 61), tied=False),
    ),
}


def random_weights(spec: ModelSpec, dtype: torch.dtype = torch.float64, seed: int = 0) -> dict[str, torch.Tensor]:
    """Weights by name, rounded to `dtype`. Wide matrices have small values, so that the stream stays of its size."""
    rng = np.random.default_rng(seed)
    spread = {name: min(0.4, 2.0 / np.sqrt(shape[-1])) for name, shape in weight_shapes(spec).items()}
    return {
        name: torch.from_numpy(rng.normal(0, spread[name], shape)).to(dtype)
        for name, shape in weight_shapes(spec).items()
    }


def as_arrays(weights: dict[str, torch.Tensor]) -> dict[str, naive.Array]:
    """The same values for the naive transformer."""
    return {name: weight.double().numpy() for name, weight in weights.items()}


def random_model(spec: ModelSpec, dtype: torch.dtype = torch.float64, seed: int = 0) -> Model:
    """The specification with random weights in memory."""
    weights = {name: InMemory(weight) for name, weight in random_weights(spec, dtype, seed).items()}
    return Model(spec=spec, dense_spec=spec, weights=weights, dtype=str(dtype).removeprefix("torch."))
