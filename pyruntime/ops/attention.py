"""K2, K9: causal attention of queries over the pages of their sequence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from pyruntime.ops.attrs import Shape
from pyruntime.ops.memory import alloc
from pyruntime.ops.native_step import NativeNode, NativeStep
from pyruntime.ops.step import Span, View
from pyruntime.spec import Attention


@dataclass(frozen=True, slots=True)
class AttentionAttrs:
    """Queries against cache slot `slot`."""

    attention: Attention
    slot: int

    def weight_shapes(self) -> dict[str, Shape]:
        """None."""
        return {}

    def in_widths(self) -> tuple[int, ...]:
        """Queries."""
        return (self.attention.q_size,)

    def out_widths(self) -> tuple[int, ...]:
        """One mix of values per query head."""
        return (self.attention.q_size,)

    def flops_per_row(self) -> int:
        """No weights; see `flops_per_pair`."""
        return 0

    def flops_per_pair(self) -> int:
        """Operations for one query row and one position it sees: score and mix, over all heads."""
        return 4 * self.attention.q_size

    def visible(self, position: int) -> int:
        """Positions that a query at `position` sees."""
        seen = position + 1
        return seen if self.attention.window is None else min(seen, self.attention.window)


def reference(
    attrs: AttentionAttrs, weights: Mapping[str, torch.Tensor], inputs: Sequence[torch.Tensor], view: View
) -> tuple[torch.Tensor, ...]:
    """[rows, num_heads * head_dim]."""
    out = alloc(inputs[0].shape, inputs[0].dtype, inputs[0].device)
    for span in view.spans:
        if span.end > span.begin:
            out[span.begin : span.end] = _attend(attrs, inputs[0], span, view)
    return (out,)


def _attend(attrs: AttentionAttrs, queries: torch.Tensor, span: Span, view: View) -> torch.Tensor:
    attention = attrs.attention
    groups = attention.num_heads // attention.num_kv_heads
    positions = view.positions[span.begin : span.end]
    keys, values = (each.to(queries.dtype) for each in view.cache.read(attrs.slot, span.pages, span.context))
    # [kv_heads, groups * rows, head_dim]: the query heads of one key head share its keys
    q = queries[span.begin : span.end].unflatten(-1, (attention.num_kv_heads, groups, attention.head_dim))
    q = q.permute(1, 2, 0, 3).flatten(1, 2)
    scores = torch.bmm(q, keys.permute(1, 2, 0)) * attention.scale  # [kv_heads, groups * rows, context]
    if attention.softcap is not None:
        scores = attention.softcap * torch.tanh(scores / attention.softcap)
    if not span.newest or attention.window is not None:
        scores = scores.unflatten(1, (groups, -1)).masked_fill(_hidden(attrs, positions, span.context), -torch.inf)
        scores = scores.flatten(1, 2)
    mixed = torch.bmm(torch.softmax(scores, dim=-1), values.permute(1, 0, 2))
    out: torch.Tensor = mixed.unflatten(1, (groups, -1)).permute(2, 0, 1, 3).flatten(1)
    return out


def _hidden(attrs: AttentionAttrs, positions: torch.Tensor, context: int) -> torch.Tensor:
    """True where a query [rows, 1] may not see a position [context]: the future, and what left the window."""
    seen = torch.arange(context, device=positions.device)
    distance = positions[:, None] - seen
    hidden = distance < 0
    return hidden if attrs.attention.window is None else hidden | (distance >= attrs.attention.window)


def on_cpu(attrs: AttentionAttrs, node: NativeNode) -> list[NativeStep]:
    """One step."""
    attention = attrs.attention
    return [
        node.step(
            "attention",
            num_heads=attention.num_heads,
            num_kv_heads=attention.num_kv_heads,
            head_dim=attention.head_dim,
            window=attention.window or 0,
            scale=attention.scale,
            softcap=attention.softcap or 0.0,
            slot=attrs.slot,
            cache_dtype=node.dtype_name,
            input=node.inputs[0],
            out=node.outputs[0],
        )
    ]
