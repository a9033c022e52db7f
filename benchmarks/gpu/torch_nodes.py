"""What a user of PyTorch would launch for a node: cuBLAS for the products, a kernel for each step around them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from pyruntime.checkpoint import Model
from pyruntime.graph import Node
from pyruntime.ops.attention import AttentionAttrs
from pyruntime.ops.head import HeadAttrs
from pyruntime.ops.linear import LinearAttrs
from pyruntime.ops.mlp import MlpAttrs
from pyruntime.ops.mlp_chain import MlpChainAttrs
from pyruntime.ops.qkv_rope import QkvRopeAttrs
from pyruntime.spec import Norm

Run = Callable[[], object]


def torch_run(nodes: Sequence[Node], model: Model, rows: int, context: int, dtype: torch.dtype) -> Run | None:
    """A function that computes `nodes` one after the other on [rows, width] values of `dtype`, or None: not written.

    qkv_rope is norm and product alone, without rotation and cache, attention is SDPA over keys and values that lie side
    by side: both do less than ours.
    """
    device = _device_of(model)
    runs = [_one(node, model, rows, context, dtype, device) for node in nodes]
    if any(run is None for run in runs):
        return None

    def run() -> None:
        for each in runs:
            assert each is not None
            each()

    return run


def _device_of(model: Model) -> torch.device:
    return model.weights["embedding.weight"].read().device


def _one(
    node: Node, model: Model, rows: int, context: int, dtype: torch.dtype, device: torch.device
) -> Callable[[], Tensor] | None:
    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=dtype, device=device)

    attrs = node.attrs
    if isinstance(attrs, AttentionAttrs):
        attention = attrs.attention
        query = normal(rows, attention.num_heads, 1, attention.head_dim)
        keys, values = (normal(rows, attention.num_kv_heads, context, attention.head_dim) for _ in range(2))
        return lambda: functional.scaled_dot_product_attention(query, keys, values, enable_gqa=True)
    weights = {role: model.weights[name].read() for role, name in node.weights}
    if isinstance(attrs, MlpAttrs):
        return _mlp(attrs, weights, normal(rows, attrs.mlp.in_size))
    if isinstance(attrs, MlpChainAttrs):
        return _chain(attrs, weights, normal(rows, attrs.parts[0].mlp.in_size))
    if isinstance(attrs, QkvRopeAttrs | LinearAttrs | HeadAttrs):
        x = normal(rows, attrs.in_widths()[0])
        matrix = torch.cat([each for role, each in weights.items() if role.endswith(".weight") and each.dim() == 2])
        bias = [each for role, each in weights.items() if role.endswith(".bias")]
        vector = torch.cat(bias) if bias else None
        norm = attrs.norm
        residual = isinstance(attrs, LinearAttrs) and attrs.residual
        y = normal(rows, matrix.shape[0]) if residual else None

        def product() -> Tensor:
            out = functional.linear(_norm(norm, "norm", weights, x), matrix, vector)
            return out if y is None else out + y

        return product
    return None


def _mlp(attrs: MlpAttrs, weights: dict[str, Tensor], x: Tensor) -> Callable[[], Tensor]:
    gate_up = torch.cat([weights["gate.weight"], weights["up.weight"]])
    down = weights["down.weight"]

    def run() -> Tensor:
        gate, up = functional.linear(_norm(attrs.norm, "norm", weights, x), gate_up).chunk(2, dim=-1)
        return x + functional.linear(functional.silu(gate) * up, down)

    return run


def _chain(attrs: MlpChainAttrs, weights: dict[str, Tensor], x: Tensor) -> Callable[[], Tensor]:
    parts = []
    for i, part in enumerate(attrs.parts):
        own = {role.removeprefix(f"{i}."): each for role, each in weights.items() if role.startswith(f"{i}.")}
        parts.append(_mlp(part, own, x))

    def run() -> Tensor:
        return [each() for each in parts][-1]

    return run


def _norm(norm: Norm | None, role: str, weights: dict[str, Tensor], x: Tensor) -> Tensor:
    if norm is None:
        return x
    return functional.rms_norm(x, (norm.size,), weights[f"{role}.weight"], norm.eps)
