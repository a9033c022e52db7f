"""K2, K9: causal attention of queries over the pages of their sequence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from pyruntime.ops.attrs import Shape, linear_shapes, norm_shapes
from pyruntime.ops.layout import Layout, LayoutKind, unpacked
from pyruntime.ops.linear import project
from pyruntime.ops.memory import alloc
from pyruntime.ops.native_step import NativeNode, NativeStep, refused_cache, refused_dtype
from pyruntime.ops.qkv_rope import split_heads
from pyruntime.ops.rope import rotary, rotate
from pyruntime.ops.step import Span, View
from pyruntime.spec import GAINS, Attention, Cached

_Weights = Mapping[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class AttentionAttrs:
    """Queries against cache slot `slot`. Slim attention makes keys or values from what it reads there."""

    attention: Attention
    slot: int

    def weight_shapes(self) -> dict[str, Shape]:
        """Gains of shaped attention; projections and norms that slim attention applies to what it reads."""
        attention = self.attention
        shapes: dict[str, Shape] = {name: (attention.num_heads,) for name in GAINS if attention.shaped}
        if attention.cached is Cached.KEYS_VALUES:
            return shapes
        if attention.cached is Cached.INPUTS:
            shapes |= linear_shapes("k", attention.k)
        norms = norm_shapes("k_norm", attention.k_norm) | norm_shapes("v_norm", attention.v_norm)
        return shapes | linear_shapes("v", attention.v) | norms

    def in_widths(self) -> tuple[int, ...]:
        """Queries."""
        return (self.attention.q_size,)

    def out_widths(self) -> tuple[int, ...]:
        """One mix of values per query head."""
        return (self.attention.q_size,)

    def flops_per_row(self) -> int:
        """The values of slim attention, made of one mix for each head."""
        slim = self.attention.cached is not Cached.KEYS_VALUES
        return 2 * self.attention.q_size * self.attention.cached_size if slim else 0

    def flops_per_pair(self) -> int:
        """Operations for one query row and one position it sees: score and mix, over all heads.

        Slim attention mixes all that is cached, for each head (Graef et al. 2025, option 2).
        """
        attention = self.attention
        if attention.cached is Cached.KEYS_VALUES:
            return 4 * attention.q_size
        return 2 * attention.q_size + 2 * attention.num_heads * attention.cached_size

    def flops_per_seen(self) -> int:
        """Operations for one cached position, whoever sees it: its key, where inputs are cached."""
        attention = self.attention
        return 2 * attention.in_size * attention.kv_size if attention.cached is Cached.INPUTS else 0

    def visible(self, position: int) -> int:
        """Positions that a query at `position` sees."""
        seen = position + 1
        return seen if self.attention.window is None else min(seen, self.attention.window)


def slopes(num_heads: int) -> torch.Tensor:
    """Slopes of ALiBi, float64 [num_heads] (Press et al. 2022, section 3, and their rule for other than powers of 2).

    n heads, a power of 2: 2^(-8 i / n) for i = 1 to n. Else those of the next lower power, and then every second one
    of the next higher.
    """
    lower = 1 << (num_heads.bit_length() - 1)
    exponents = [8 * i / lower for i in range(1, lower + 1)]
    exponents += [8 * i / (2 * lower) for i in range(1, 2 * (num_heads - lower), 2)]
    return torch.tensor([2.0**-exponent for exponent in exponents], dtype=torch.float64, device="cpu")


def reference(
    attrs: AttentionAttrs, weights: _Weights, inputs: Sequence[torch.Tensor], view: View
) -> tuple[torch.Tensor, ...]:
    """[rows, num_heads * head_dim]."""
    out = alloc(inputs[0].shape, inputs[0].dtype, inputs[0].device)
    for span in view.spans:
        if span.end > span.begin:
            out[span.begin : span.end] = _attend(attrs, weights, inputs[0], span, view)
    return (out,)


def _attend(attrs: AttentionAttrs, weights: _Weights, queries: torch.Tensor, span: Span, view: View) -> torch.Tensor:
    attention = attrs.attention
    groups = attention.num_heads // attention.num_kv_heads
    positions = view.positions[span.begin : span.end]
    cached = [each.to(queries.dtype) for each in view.cache.read(attrs.slot, span.pages, span.context)]
    keys = cached[0] if attention.cached is Cached.KEYS_VALUES else _slim_keys(attention, weights, cached[0])
    # [kv_heads, groups * rows, head_dim]: the query heads of one key head share its keys
    q = queries[span.begin : span.end].unflatten(-1, (attention.num_kv_heads, groups, attention.head_dim))
    q = q.permute(1, 2, 0, 3).flatten(1, 2)
    scores = torch.bmm(q, keys.permute(1, 2, 0)) * attention.scale  # [kv_heads, groups * rows, context]
    if attention.softcap is not None:
        scores = attention.softcap * torch.tanh(scores / attention.softcap)
    by_row = scores.unflatten(1, (groups, -1))  # [kv_heads, groups, rows, context]
    hidden = _hidden(attrs, positions, span.context)
    if attention.alibi:
        distance = torch.arange(span.context, device=positions.device) - positions[:, None]
        by_row = by_row + _per_head(attention, slopes(attention.num_heads), by_row) * distance
    if not span.newest or attention.window is not None:
        by_row = by_row.masked_fill(hidden, -torch.inf)
    mix = torch.softmax(by_row, dim=-1)
    if attention.shaped:
        mix = _shaped(attention, weights, mix, ~hidden, positions)
    if attention.cached is Cached.KEYS_VALUES:
        mixed = torch.bmm(mix.flatten(1, 2), cached[1].permute(1, 0, 2)).unflatten(1, (groups, -1))
    else:
        mixed = _slim_mix(attention, weights, mix, cached[0].flatten(1))
    out: torch.Tensor = mixed.permute(2, 0, 1, 3).flatten(1)
    return out


def _per_head(attention: Attention, values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A value for each query head, over [kv_heads, groups, rows, context]."""
    return values.to(like).view(attention.num_kv_heads, -1, 1, 1)


def _shaped(
    attention: Attention, weights: _Weights, mix: torch.Tensor, visible: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    """Gains over the softmax, the own position and the mean of the visible ones (He & Hofmann 2023, section 4.1)."""
    softmax_gain, identity_gain, centre_gain = (_per_head(attention, weights[name], mix) for name in GAINS)
    own = (torch.arange(mix.shape[-1], device=mix.device) == positions[:, None]).to(mix.dtype)
    uniform = visible.to(mix.dtype) / visible.sum(dim=-1, keepdim=True)
    return softmax_gain * mix + identity_gain * own - centre_gain * uniform


def _slim_keys(attention: Attention, weights: _Weights, cached: torch.Tensor) -> torch.Tensor:
    """Keys [context, kv_heads, head_dim] of what slim attention cached, normed and rotated as they are read."""
    y = project("k", weights, cached.flatten(1)) if attention.cached is Cached.INPUTS else cached.flatten(1)
    keys = split_heads(attention, y, attention.k_norm, "k_norm", weights)
    if attention.rope is None:
        return keys
    return rotate(keys, rotary(attention.rope, torch.arange(len(keys), device=keys.device)))


def _slim_mix(attention: Attention, weights: _Weights, mix: torch.Tensor, cached: torch.Tensor) -> torch.Tensor:
    """Values mixed by `mix` [kv_heads, groups, rows, context]; they are v of `cached` [context, width].

    For many rows they are made first (option 1 of Graef et al. 2025), for few the mixes of all that is cached (option
    2), whose values are a linear map of them as long as no norm stands between.
    """
    if attention.v_norm is not None or mix.shape[2] >= attention.head_dim:
        y = project("v", weights, cached)
        values = split_heads(attention, y, attention.v_norm, "v_norm", weights)
        return torch.einsum("kgrc,ckd->kgrd", mix, values)
    blended = torch.einsum("kgrc,cw->kgrw", mix, cached)
    matrix = unpacked(weights["v.weight"]).unflatten(0, (attention.num_kv_heads, -1))  # [kv_heads, head_dim, width]
    values = torch.einsum("kgrw,kdw->kgrd", blended.to(matrix.dtype), matrix).to(mix.dtype)
    bias = weights.get("v.bias")
    if bias is None:
        return values
    # the weights of shaped attention do not add up to one
    return values + mix.sum(dim=-1, keepdim=True) * bias.to(mix.dtype).view(attention.num_kv_heads, 1, 1, -1)


def _hidden(attrs: AttentionAttrs, positions: torch.Tensor, context: int) -> torch.Tensor:
    """True where a query [rows, 1] may not see a position [context]: the future, and what left the window."""
    seen = torch.arange(context, device=positions.device)
    distance = positions[:, None] - seen
    hidden = distance < 0
    return hidden if attrs.attention.window is None else hidden | (distance >= attrs.attention.window)


def layouts(attrs: AttentionAttrs) -> dict[str, Layout]:
    """The gains."""
    return {role: Layout(LayoutKind.VECTOR, (role,)) for role in attrs.weight_shapes()}


def refuses(attrs: AttentionAttrs, dtype: torch.dtype) -> str | None:
    """Why C++ cannot run it, or None."""
    return refused_dtype(attrs, dtype) or refused_cache(attrs.attention)


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
            slopes=node.keep(slopes(attention.num_heads).float()) if attention.alibi else None,
            **{name: node.memory(name) for name in GAINS},
            slot=attrs.slot,
            cache_dtype=node.dtype_name,
            input=node.inputs[0],
            out=node.outputs[0],
        )
    ]
