"""How the C++ kernels want weights: matrices in panels, vectors in float32. Made once, when a plan is lowered."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Final

import torch
from torch import Tensor

from pyruntime.ops.attrs import norm_shapes
from pyruntime.ops.memory import alloc_weights
from pyruntime.spec import Linear, Norm, NormKind

PANEL: Final = 16
# panels that are equally long (steps.h: kGroup)
GROUP: Final = 4


class LayoutKind(StrEnum):
    """What is done with the sources of a layout; they are concatenated first, where there are several."""

    STORED = "stored"  # as it is, in the plan's dtype
    VECTOR = "vector"  # float32
    VECTOR_PLUS_ONE = "vector plus one"  # float32, 1 added
    PANELS = "panels"  # see steps.h: Panels
    GATED_PANELS = "gated panels"  # a panel of the first source, then the same panel of the second, and so on
    PANEL_VALUES = "panel values"  # float32, a value for each output of each panel
    GATED_PANEL_VALUES = "gated panel values"
    PANEL_STARTS = "panel starts"  # int64, where each group of panels starts, of matrices with triangular parts
    GATED_PANEL_STARTS = "gated panel starts"
    ROWS = "rows"  # matrices one below the other, [outputs, inputs], in the plan's dtype
    ROW_VALUES = "row values"  # float32, a value for each row


@dataclass(frozen=True, slots=True)
class Layout:
    """One tensor made of `sources` (roles of an op, or names of weights). None: zeros; `sizes` are outputs.

    `rows` are the outputs that are kept, in this order, or None for all.
    """

    kind: LayoutKind
    sources: tuple[str | None, ...]
    sizes: tuple[int, ...] = ()
    rows: tuple[int, ...] | None = None

    def named(self, names: Mapping[str, str]) -> Layout:
        """The same with roles replaced by the names of weights; equal ones hold equal values."""
        return replace(self, sources=tuple(None if role is None else names[role] for role in self.sources))

    def run_of(self, other: Layout) -> int | None:
        """The row at which `other`, a layout of some of the same sources in the same order, begins, or None."""
        if (self.kind, self.rows) != (other.kind, other.rows):
            return None
        count = len(other.sources)
        for i in range(len(self.sources) - count + 1):
            if (self.sources[i : i + count], self.sizes[i : i + count]) == (other.sources, other.sizes):
                return sum(self.sizes[:i])
        return None


def stored(role: str) -> Layout:
    """The weight as it is."""
    return Layout(LayoutKind.STORED, (role,))


def norm_layouts(role: str, norm: Norm | None) -> dict[str, Layout]:
    """Gain and bias of a norm as float32 vectors, under `role`.gain and `role`.bias."""
    found = norm_shapes(role, norm)
    layouts = {}
    if norm is not None and f"{role}.weight" in found:
        plus_one = norm.kind in (NormKind.RMS_ONE_PLUS, NormKind.LAYER_ONE_PLUS)
        kind = LayoutKind.VECTOR_PLUS_ONE if plus_one else LayoutKind.VECTOR
        layouts[f"{role}.gain"] = Layout(kind, (f"{role}.weight",))
    if f"{role}.bias" in found:
        layouts[f"{role}.bias"] = Layout(LayoutKind.VECTOR, (f"{role}.bias",))
    return layouts


def matrix_layouts(
    name: str, linears: Mapping[str, Linear | None], gated: bool = False, rows: tuple[int, ...] | None = None
) -> dict[str, Layout]:
    """One matrix `name` of the linear maps that exist, by role, or of some `rows` of it.

    Beside it stand `name`.bias where one of them has a bias, and `name`.starts where one of them is triangular.
    """
    kept = {role: linear for role, linear in linears.items() if linear is not None}
    if not kept:
        return {}
    sizes = tuple(linear.out_features for linear in kept.values())
    kind = LayoutKind.GATED_PANELS if gated else LayoutKind.PANELS
    weights = tuple(f"{role}.weight" for role in kept)
    layouts = {name: Layout(kind, weights, sizes, rows)}
    if any(linear.triangular for linear in kept.values()):
        starts = LayoutKind.GATED_PANEL_STARTS if gated else LayoutKind.PANEL_STARTS
        layouts[f"{name}.starts"] = Layout(starts, weights, sizes, rows)
    if any(linear.bias for linear in kept.values()):
        values = LayoutKind.GATED_PANEL_VALUES if gated else LayoutKind.PANEL_VALUES
        biases = tuple(f"{role}.bias" if linear.bias else None for role, linear in kept.items())
        layouts[f"{name}.bias"] = Layout(values, biases, sizes, rows)
    return layouts


def row_layouts(
    name: str, linears: Mapping[str, Linear | None], rows: tuple[int, ...] | None = None
) -> dict[str, Layout]:
    """One matrix `name` [outputs, inputs] of the linear maps that exist, by role, or of some `rows` of it.

    Beside it stands `name`.bias, float32, where one of them has a bias. Triangular maps are unpacked.
    """
    kept = {role: linear for role, linear in linears.items() if linear is not None}
    if not kept:
        return {}
    sizes = tuple(linear.out_features for linear in kept.values())
    layouts = {name: Layout(LayoutKind.ROWS, tuple(f"{role}.weight" for role in kept), sizes, rows)}
    if any(linear.bias for linear in kept.values()):
        biases = tuple(f"{role}.bias" if linear.bias else None for role, linear in kept.items())
        layouts[f"{name}.bias"] = Layout(LayoutKind.ROW_VALUES, biases, sizes, rows)
    return layouts


def arrange(layout: Layout, sources: Sequence[Tensor | None]) -> Tensor:
    """The tensor of a layout. Matrices come in the plan's dtype and stay in it; panels are words of 32 bits."""
    match layout.kind:
        case LayoutKind.STORED:
            return _one(sources).contiguous()
        case LayoutKind.VECTOR:
            return _one(sources).float().contiguous()
        case LayoutKind.VECTOR_PLUS_ONE:
            return _one(sources).float() + 1
        case LayoutKind.PANELS | LayoutKind.GATED_PANELS:
            return _panels(layout, _present(sources))
        case LayoutKind.PANEL_STARTS | LayoutKind.GATED_PANEL_STARTS:
            return _starts(layout, _present(sources))
        case LayoutKind.ROWS:
            matrices = [unpacked(matrix) for matrix in _present(sources)]
            return _rows_of(layout, matrices[0] if len(matrices) == 1 else torch.cat(matrices)).contiguous()
        case LayoutKind.ROW_VALUES:
            return _rows_of(layout, torch.cat(_values(layout, sources)))
        case LayoutKind.PANEL_VALUES | LayoutKind.GATED_PANEL_VALUES:
            values = _values(layout, sources)
            columns = [_by_panel(each[:, None]) for each in values]
            if layout.kind is LayoutKind.GATED_PANEL_VALUES:
                return torch.stack([column.flatten(1) for column in columns], dim=1).flatten()
            return _by_panel(_rows_of(layout, torch.cat(values))[:, None]).flatten()


def unpacked(weight: Tensor) -> Tensor:
    """A matrix as it is; a triangular one, whose rows are stored without zeros [n (n + 1) / 2], as [n, n]."""
    if weight.dim() == 2:
        return weight
    size = (math.isqrt(8 * weight.numel() + 1) - 1) // 2
    kept = torch.ones((size, size), dtype=torch.bool, device=weight.device).tril()
    return weight.new_zeros((size, size)).masked_scatter(kept, weight)


def _values(layout: Layout, sources: Sequence[Tensor | None]) -> list[Tensor]:
    """float32 vectors, of zeros where a source is missing."""
    device = _present(sources)[0].device
    pairs = zip(sources, layout.sizes, strict=True)
    return [torch.zeros(size, device=device) if source is None else source.float() for source, size in pairs]


def _present(sources: Sequence[Tensor | None]) -> list[Tensor]:
    return [source for source in sources if source is not None]


def _rows_of(layout: Layout, rows: Tensor) -> Tensor:
    return rows if layout.rows is None else rows[list(layout.rows)]


def _one(sources: Sequence[Tensor | None]) -> Tensor:
    (source,) = sources
    assert source is not None
    return source


def _panels(layout: Layout, matrices: Sequence[Tensor]) -> Tensor:
    """Words, int32: [panels, units, 16] (gated: [panels, 2, units, 16]), or without what the groups do not read."""
    words = [_words(unpacked(matrix)) for matrix in matrices]
    if layout.kind is LayoutKind.GATED_PANELS:
        blocks = [_by_panel(each) for each in words]
        shape: tuple[int, ...] = (blocks[0].shape[0], len(blocks), *blocks[0].shape[1:])
    else:
        block = _by_panel(_rows_of(layout, words[0] if len(words) == 1 else torch.cat(words)))
        blocks, shape = [block], block.shape
    if all(matrix.dim() == 2 for matrix in matrices):
        out = alloc_weights(shape, torch.int32)
        for i, each in enumerate(blocks):
            (out[:, i] if len(shape) == 4 else out).copy_(each)
        return out
    panels = torch.stack(blocks, dim=1).flatten(0, 1)
    lengths = _lengths(layout, matrices)
    out = alloc_weights((sum(lengths),), torch.int32)
    for group, part in zip(panels.split(GROUP), out.split(lengths), strict=True):
        part.view(group.shape[0], -1, PANEL).copy_(group[:, : part.numel() // (group.shape[0] * PANEL)])
    return out


def _starts(layout: Layout, matrices: Sequence[Tensor]) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(_lengths(layout, matrices))], dtype=torch.int64)


def _lengths(layout: Layout, matrices: Sequence[Tensor]) -> list[int]:
    """Words of each group of panels, whose panels are as long as their longest output needs."""
    per_unit = 2 if matrices[0].dtype is torch.bfloat16 else 1
    needs = [
        torch.arange(1, size + 1) if matrix.dim() == 1 else torch.full((size,), matrix.shape[1])
        for matrix, size in zip(matrices, layout.sizes, strict=True)
    ]
    if layout.kind in (LayoutKind.GATED_PANELS, LayoutKind.GATED_PANEL_STARTS):
        columns = torch.stack([_by_panel(each[:, None]) for each in needs], dim=1).flatten(0, 1)
    else:
        columns = _by_panel(_rows_of(layout, torch.cat(needs))[:, None])
    groups = columns.amax(dim=(1, 2)).split(GROUP)
    return [-(-int(group.max()) // per_unit) * len(group) * PANEL for group in groups]


def _words(matrix: Tensor) -> Tensor:
    """[outputs, units] int32: a float32, or two neighbouring bfloat16, to a word."""
    if matrix.dtype is torch.bfloat16 and matrix.shape[1] % 2:
        matrix = torch.nn.functional.pad(matrix, (0, 1))
    matrix = matrix.contiguous()
    # words start at even offsets
    whole = matrix.storage_offset() * matrix.element_size() % 4 == 0
    return (matrix if whole else matrix.clone()).view(torch.int32)


def _by_panel(rows: Tensor) -> Tensor:
    """[panels, columns, 16] of rows [outputs, columns], missing outputs zero."""
    missing = -rows.shape[0] % PANEL
    if missing:
        rows = torch.cat((rows, rows.new_zeros((missing, rows.shape[1]))))
    panels: Tensor = rows.unflatten(0, (-1, PANEL))
    return panels.transpose(1, 2)
