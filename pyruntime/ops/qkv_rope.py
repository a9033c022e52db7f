"""K1: norm, q/k/v projections with bias, per-head norms, rotary embedding, and the write into the cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import torch

from pyruntime.ops.attrs import Shape, linear_flops, linear_shapes, norm_shapes
from pyruntime.ops.cache import KvShape
from pyruntime.ops.layout import Layout, matrix_layouts, norm_layouts, unpacked
from pyruntime.ops.linear import project
from pyruntime.ops.native_step import NativeNode, NativeStep, refused_cache, refused_dtype
from pyruntime.ops.norm import norm_of
from pyruntime.ops.rope import rotate
from pyruntime.ops.step import View
from pyruntime.spec import Attention, Cached, Linear, Norm

# what stands in for a column where nothing is computed (steps.h)
_NOT_COMPUTED: Final = -1
# numbers of the values of one role: those of the normed input first, those of the product behind them
Columns = Sequence[int]


@dataclass(frozen=True, slots=True)
class QkvRopeAttrs:
    """The stream's rows to queries (an output) and to keys and values (in cache slot `slot`).

    The tail splits the op: keys and values of all rows (`query` False), queries of the wanted ones (`cache` False).
    `norm` is the attention's pre-norm once it was fused in. An attention with a table reads its rows, not the stream.
    """

    attention: Attention
    slot: int
    norm: Norm | None = None
    query: bool = True
    cache: bool = True

    def weight_shapes(self) -> dict[str, Shape]:
        """The norm's and those of the projections that are computed; of `rest`, the rows that are."""
        attention = self.attention
        shapes = norm_shapes("norm", self.norm)
        for role, linear in self.linears().items():
            shapes |= linear_shapes(role, linear)
        for role in self.roles():
            shapes |= norm_shapes(f"{role}_norm", self.norm_of(role))
        return shapes if attention.rest is None else {**shapes, **linear_shapes("rest", self.rest())}

    def in_widths(self) -> tuple[int, ...]:
        """The stream, or a row of the table."""
        return (self.in_size,)

    def out_widths(self) -> tuple[int, ...]:
        """Queries, where they are computed."""
        return (self.attention.q_size,) if self.query else ()

    def flops_per_row(self) -> int:
        """The projections that are computed."""
        return linear_flops(*self.linears().values(), self.rest())

    def kv_shape(self) -> KvShape:
        """What one row leaves in the cache."""
        attention = self.attention
        if attention.cached is Cached.INPUTS:
            return KvShape(1, attention.in_size, values=False)
        return KvShape(attention.num_kv_heads, attention.head_dim, attention.cached is Cached.KEYS_VALUES)

    @property
    def in_size(self) -> int:
        """Width of the input."""
        attention = self.attention
        return attention.q_size + 2 * attention.kv_size if attention.table else attention.in_size

    def roles(self) -> tuple[str, ...]:
        """Which of q, k and v are computed; slim attention makes what it does not cache when it reads."""
        kept = {Cached.KEYS_VALUES: ("k", "v"), Cached.KEYS: ("k",), Cached.INPUTS: ()}[self.attention.cached]
        return (*(("q",) if self.query else ()), *(kept if self.cache else ()))

    def norm_of(self, role: str) -> Norm | None:
        """The norm of a role's heads; cached keys of slim attention are as projected."""
        attention = self.attention
        if role == "q":
            return attention.q_norm
        return getattr(attention, f"{role}_norm") if attention.cached is Cached.KEYS_VALUES else None

    def linears(self) -> dict[str, Linear | None]:
        """The projections that are computed, in the order of their columns; None was merged away."""
        attention = self.attention
        if attention.table or attention.columns is not None:
            return {}
        return {role: getattr(attention, role) for role in self.roles()}

    def rest_rows(self) -> tuple[int, ...]:
        """Outputs of `rest` that are needed, in order."""
        size = self.in_size
        return tuple(sorted({c - size for role in self.roles() for c in self._named(role) if c >= size}))

    def rest(self) -> Linear | None:
        """`rest` with the outputs that are needed, or None."""
        rest = self.attention.rest
        rows = 0 if rest is None else len(self.rest_rows())
        if rest is None or rows in (0, rest.out_features):
            return rest if rows else None
        return replace(rest, out_features=rows, triangular=False)

    def columns(self) -> dict[str, Columns]:
        """Where the values of each role that is computed come from: the normed input, then what the node projects."""
        size = self.in_size
        if self.attention.columns is not None:
            place = {row: size + i for i, row in enumerate(self.rest_rows())}
            return {role: [c if c < size else place[c - size] for c in self._named(role)] for role in self.roles()}
        if self.attention.table:
            return {role: range(*self._part(role)) for role in self.roles()}
        found: dict[str, Columns] = {}
        end = size
        for role, linear in self.linears().items():
            width = self._part(role)[1] - self._part(role)[0]
            found[role] = range(width) if linear is None else range(end, end + width)
            end += 0 if linear is None else width
        return found

    def _part(self, role: str) -> tuple[int, int]:
        """Where the values of a role lie among those of queries, keys and values."""
        q_size, kv_size = self.attention.q_size, self.attention.kv_size
        begin = {"q": 0, "k": q_size, "v": q_size + kv_size}[role]
        return begin, begin + (q_size if role == "q" else kv_size)

    def _named(self, role: str) -> Columns:
        """The role's part of the attention's own columns."""
        return (self.attention.columns or ())[slice(*self._part(role))]


def reference(
    attrs: QkvRopeAttrs, weights: Mapping[str, torch.Tensor], inputs: Sequence[torch.Tensor], view: View
) -> tuple[torch.Tensor, ...]:
    """Queries [rows, num_heads * head_dim], or nothing; keys and values go into the cache."""
    attention = attrs.attention
    x = norm_of(attrs.norm, "norm", weights, inputs[0])
    made = _projected(attrs, weights, x)
    heads = {role: split_heads(attention, y, attrs.norm_of(role), f"{role}_norm", weights) for role, y in made.items()}
    if attention.rope is not None:
        turned = ("q", "k") if attention.cached is Cached.KEYS_VALUES else ("q",)
        heads |= {role: rotate(heads[role], view.rotary(attention.rope)) for role in turned if role in heads}
    if attrs.cache:
        # the inputs are cached as if they were one head of keys
        keys = x[:, None] if attention.cached is Cached.INPUTS else heads["k"]
        view.cache.write(attrs.slot, view.slots, keys, heads.get("v"))
    return (heads["q"].flatten(1),) if attrs.query else ()


def split_heads(
    attention: Attention, y: torch.Tensor, norm: Norm | None, role: str, weights: Mapping[str, torch.Tensor]
) -> torch.Tensor:
    """`y` [rows, heads * head_dim] as [rows, heads, head_dim], normed over all heads or each."""
    per_head = norm is not None and norm.size == attention.head_dim
    y = y if per_head else norm_of(norm, role, weights, y)
    y = y.unflatten(-1, (-1, attention.head_dim))
    return norm_of(norm, role, weights, y) if per_head else y


def _projected(attrs: QkvRopeAttrs, weights: Mapping[str, torch.Tensor], x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The values of each role that is computed, [rows, width]."""
    if not attrs.attention.table and attrs.attention.columns is None:
        return {role: project(role, weights, x) for role in attrs.roles()}
    rows = list(attrs.rest_rows())
    known = x
    if rows:
        cut = {"rest.weight": unpacked(weights["rest.weight"])[rows]}
        if "rest.bias" in weights:
            cut["rest.bias"] = weights["rest.bias"][rows]
        known = torch.cat((x, project("rest", cut, x)), dim=-1)
    return {role: known[:, list(columns)] for role, columns in attrs.columns().items()}


def _matrix(attrs: QkvRopeAttrs) -> tuple[dict[str, Linear | None], tuple[int, ...] | None]:
    """The linear maps of the one matrix, and which of its rows are kept."""
    rest, rows = attrs.attention.rest, attrs.rest_rows()
    if rest is None or not rows:
        return attrs.linears(), None
    return {"rest": rest}, None if len(rows) == rest.out_features else rows


def layouts(attrs: QkvRopeAttrs) -> dict[str, Layout]:
    """Norms, and one matrix of all projections."""
    linears, rows = _matrix(attrs)
    found = norm_layouts("norm", attrs.norm) | matrix_layouts("matrix", linears, rows=rows)
    for role in attrs.roles():
        found |= norm_layouts(f"{role}_norm", attrs.norm_of(role))
    return found


def refuses(attrs: QkvRopeAttrs, dtype: torch.dtype) -> str | None:
    """Why C++ cannot run it, or None."""
    return refused_dtype(attrs, dtype) or refused_cache(attrs.attention)


def on_cpu(attrs: QkvRopeAttrs, node: NativeNode) -> list[NativeStep]:
    """One step."""
    attention = attrs.attention
    linears, rows = _matrix(attrs)
    outputs = sum(linear.out_features for linear in linears.values() if linear is not None)
    norms = {role: attrs.norm_of(role) if role in attrs.roles() else None for role in ("q", "k", "v")}
    columns = attrs.columns()
    sources: dict[str, Any] = {}
    for role in ("q", "k", "v"):
        sources |= _source(role, columns.get(role), attrs.in_size, node)
    return [
        node.step(
            "qkv_rope",
            norm=node.norm("norm", attrs.norm),
            matrix=node.matrix("matrix", attrs.in_size, outputs if rows is None else len(rows)),
            **{f"{role}_norm": node.norm(f"{role}_norm", norm) for role, norm in norms.items()},
            **sources,
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


def _source(role: str, columns: Columns | None, in_size: int, node: NativeNode) -> dict[str, Any]:
    """The step's fields of one role: the first of neighbours, or a number for each value."""
    if columns is None:
        return {f"{role}_column": _NOT_COMPUTED, f"{role}_columns": None}
    first, last = columns[0], columns[-1]
    together = list(columns) == list(range(first, first + len(columns))) and (last < in_size or first >= in_size)
    if together:
        return {f"{role}_column": first, f"{role}_columns": None}
    return {f"{role}_column": 0, f"{role}_columns": node.keep(torch.tensor(list(columns), dtype=torch.int32))}
