"""K1: norm, q/k/v projections with bias, per-head norms, rotary embedding, and the write into the cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch

from pyruntime.ops.attrs import Shape, linear_flops, linear_shapes, norm_shapes
from pyruntime.ops.layout import Layout, matrix_layouts, norm_layouts
from pyruntime.ops.linear import project
from pyruntime.ops.native_step import NativeNode, NativeStep
from pyruntime.ops.norm import norm_of
from pyruntime.ops.rope import rotate
from pyruntime.ops.step import View
from pyruntime.spec import Attention, Linear, Norm

# what stands in for a column of the product (steps.h)
_NOT_COMPUTED: Final = -1
_MERGED_AWAY: Final = -2


@dataclass(frozen=True, slots=True)
class QkvRopeAttrs:
    """The stream's rows to queries (an output) and to keys and values (in cache slot `slot`).

    The tail splits the op: keys and values of all rows (`query` False), queries of the wanted ones (`cache` False).
    `norm` is the attention's pre-norm once it was fused in.
    """

    attention: Attention
    slot: int
    norm: Norm | None = None
    query: bool = True
    cache: bool = True

    def weight_shapes(self) -> dict[str, Shape]:
        """The norm's and those of the projections that are computed."""
        attention = self.attention
        shapes = norm_shapes("norm", self.norm)
        if self.query:
            shapes |= linear_shapes("q", attention.q) | norm_shapes("q_norm", attention.q_norm)
        if self.cache:
            shapes |= linear_shapes("k", attention.k) | linear_shapes("v", attention.v)
            shapes |= norm_shapes("k_norm", attention.k_norm)
        return shapes

    def in_widths(self) -> tuple[int, ...]:
        """The stream."""
        return (self.attention.in_size,)

    def out_widths(self) -> tuple[int, ...]:
        """Queries, where they are computed."""
        return (self.attention.q_size,) if self.query else ()

    def flops_per_row(self) -> int:
        """The projections that are computed."""
        attention = self.attention
        query = linear_flops(attention.q) if self.query else 0
        return query + (linear_flops(attention.k, attention.v) if self.cache else 0)


def reference(
    attrs: QkvRopeAttrs, weights: Mapping[str, torch.Tensor], inputs: Sequence[torch.Tensor], view: View
) -> tuple[torch.Tensor, ...]:
    """Queries [rows, num_heads * head_dim], or nothing; keys and values go into the cache."""
    attention = attrs.attention
    x = norm_of(attrs.norm, "norm", weights, inputs[0])

    def heads(role: str, num_heads: int, norm: Norm | None) -> torch.Tensor:
        y = project(role, weights, x)
        if norm is not None and norm.size != attention.head_dim:
            y = norm_of(norm, f"{role}_norm", weights, y)
        y = y.unflatten(-1, (num_heads, attention.head_dim))  # [rows, heads, head_dim]
        if norm is not None and norm.size == attention.head_dim:
            y = norm_of(norm, f"{role}_norm", weights, y)
        if role == "v" or attention.rope is None:
            return y
        return rotate(y, view.rotary(attention.rope))

    if attrs.cache:
        keys = heads("k", attention.num_kv_heads, attention.k_norm)
        view.cache.write(attrs.slot, view.slots, keys, heads("v", attention.num_kv_heads, None))
    return (heads("q", attention.num_heads, attention.q_norm).flatten(1),) if attrs.query else ()


def _projections(attrs: QkvRopeAttrs) -> dict[str, Linear | None]:
    """The projections that are computed, in the order of their columns; None was merged away."""
    attention = attrs.attention
    query = {"q": attention.q} if attrs.query else {}
    return query | ({"k": attention.k, "v": attention.v} if attrs.cache else {})


def layouts(attrs: QkvRopeAttrs) -> dict[str, Layout]:
    """Norms, and one matrix of all projections."""
    found = norm_layouts("norm", attrs.norm) | matrix_layouts("matrix", _projections(attrs))
    if attrs.query:
        found |= norm_layouts("q_norm", attrs.attention.q_norm)
    return found | (norm_layouts("k_norm", attrs.attention.k_norm) if attrs.cache else {})


def on_cpu(attrs: QkvRopeAttrs, node: NativeNode) -> list[NativeStep]:
    """One step."""
    attention = attrs.attention
    columns = {"q": _NOT_COMPUTED, "k": _NOT_COMPUTED, "v": _NOT_COMPUTED}
    outputs = 0
    for role, linear in _projections(attrs).items():
        columns[role] = _MERGED_AWAY if linear is None else outputs
        outputs += 0 if linear is None else linear.out_features
    return [
        node.step(
            "qkv_rope",
            norm=node.norm("norm", attrs.norm),
            matrix=node.matrix("matrix", attention.in_size, outputs),
            q_norm=node.norm("q_norm", attention.q_norm) if attrs.query else None,
            k_norm=node.norm("k_norm", attention.k_norm) if attrs.cache else None,
            **{f"{role}_column": column for role, column in columns.items()},
            num_heads=attention.num_heads,
            num_kv_heads=attention.num_kv_heads,
            head_dim=attention.head_dim,
            rotary=None if attention.rope is None else node.rotary(attention.rope),
            slot=attrs.slot,
            cache_dtype=node.dtype_name,
            input=node.inputs[0],
            out=node.outputs[0] if attrs.query else None,
        )
    ]
