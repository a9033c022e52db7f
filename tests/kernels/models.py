"""Shapes of real models, cut down to the layers that differ: what the kernels are compiled for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

import torch

from pyruntime.bench import shape_spec
from pyruntime.ops.gpu.choose import Backend
from pyruntime.spec import MLP, Activation, Attention, Layer, Linear, ModelSpec, NormKind

# rows of the graphs that decode steps are captured in
BUCKETS: Final = (1, 2, 4, 8, 16, 32, 64)
FEW_BUCKETS: Final = (1, 64)
PROMPT: Final = 2048


@dataclass(frozen=True, slots=True)
class Case:
    """A model whose launches are compiled: its layers, its dtype, and the rows of its decode steps.

    `capabilities` are those of sm_80, sm_90 and sm_100 that it is compiled for; `kernels` run whatever the step, in
    place of the usual choice by its rows.
    """

    name: str
    spec: ModelSpec
    dtype: torch.dtype = torch.bfloat16
    buckets: tuple[int, ...] = FEW_BUCKETS
    capabilities: tuple[int, ...] = (80, 90, 100)
    kernels: Backend | None = None


def pruned(spec: ModelSpec) -> ModelSpec:
    """Five layers of the model: whole, two without their attention, one without its MLP, whole.

    Three MLPs meet, and the last attention is followed by the tail.
    """
    whole = spec.layers[0]
    kept = (whole, replace(whole, attention=None), replace(whole, attention=None), replace(whole, mlp=None), whole)
    return replace(spec, layers=tuple(replace(layer, index=i) for i, layer in enumerate(kept)))


def with_sublayers(
    spec: ModelSpec, attention: Callable[[Attention], Attention], mlp: Callable[[MLP], MLP] = lambda old: old
) -> ModelSpec:
    """The model with changed attentions and MLPs."""

    def changed(layer: Layer) -> Layer:
        return replace(
            layer,
            attention=attention(layer.attention) if isinstance(layer.attention, Attention) else None,
            mlp=mlp(layer.mlp) if isinstance(layer.mlp, MLP) else None,
        )

    return replace(spec, layers=tuple(map(changed, spec.layers)))


def merged(attention: Attention) -> Attention:
    """Without query and output projection: queries are the normed stream."""
    return replace(attention, q=None, o=None)


def pivoted(attention: Attention) -> Attention:
    """Queries, keys and values by a column map, as a merge with pivots leaves them: most from the stream itself."""
    size, kv_size = attention.in_size, attention.kv_size
    columns = (*range(size), *range(size, size + 2 * kv_size))
    rest = Linear(in_features=size, out_features=2 * kv_size)
    return replace(attention, q=None, k=None, v=None, o=None, columns=columns, rest=rest)


def gemma(spec: ModelSpec) -> ModelSpec:
    """As Gemma 2 is made: gains around zero, norms behind both sublayers, heads of 256, caps of scores and logits."""
    assert spec.final_norm is not None
    norm = replace(spec.final_norm, kind=NormKind.RMS_ONE_PLUS)
    heads, kv_heads, head_dim = spec.embedding.size // 256, 4, 256
    kv = Linear(in_features=spec.embedding.size, out_features=kv_heads * head_dim)

    def attention(old: Attention) -> Attention:
        sizes = {"num_heads": heads, "num_kv_heads": kv_heads, "head_dim": head_dim, "scale": head_dim**-0.5}
        rope = replace(old.rope, dim=head_dim) if old.rope is not None else None
        return replace(old, **sizes, k=kv, v=kv, rope=rope, window=4096, softcap=50.0, pre=norm, post=norm)

    def mlp(old: MLP) -> MLP:
        return replace(old, activation=Activation.GELU_TANH, pre=norm, post=norm)

    spec = with_sublayers(spec, attention, mlp)
    return replace(spec, final_norm=norm, head=replace(spec.head, softcap=30.0))


def skipless(spec: ModelSpec) -> ModelSpec:
    """Without residual connections and norms, with shaped attention."""
    return with_sublayers(
        replace(spec, layers=spec.layers[:3]),
        lambda attention: replace(attention, residual=False, pre=None, shaped=True),
        lambda mlp: replace(mlp, residual=False, pre=None),
    )


def cases() -> tuple[Case, ...]:
    """Every model that the lock files speak of."""
    llama = pruned(shape_spec("llama-3-8b"))
    return (
        Case("llama-3-8b", llama, buckets=BUCKETS),
        # a table of measurements may choose them for any number of rows
        Case("llama-3-8b Triton alone", llama, buckets=(32, 64), capabilities=(90,), kernels=Backend.TRITON),
        Case("llama-3-8b float16", llama, torch.float16, capabilities=(90,)),
        Case("llama-3-8b merged", with_sublayers(llama, merged)),
        Case("llama-3-8b pivoted", with_sublayers(llama, pivoted), capabilities=(90,)),
        Case("llama-2-7b", pruned(shape_spec("llama-2-7b"))),
        Case("llama-3.2-1b", pruned(shape_spec("llama-3.2-1b"))),
        Case("llama-3.2-1b float32", pruned(shape_spec("llama-3.2-1b")), torch.float32, capabilities=(90,)),
        Case("qwen2.5-0.5b", pruned(shape_spec("qwen2.5-0.5b"))),
        Case("qwen2.5-7b", pruned(shape_spec("qwen2.5-7b"))),
        Case("gemma-like", gemma(llama), capabilities=(90,)),
        Case("skipless", skipless(shape_spec("llama-3.2-1b")), capabilities=(90,)),
        Case("pythia-6.9b", pruned(shape_spec("pythia-6.9b")), capabilities=(90,)),
    )
