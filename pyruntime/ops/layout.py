"""How the C++ kernels want weights: matrices in panels, vectors in float32. Made once, when a plan is lowered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

import torch
from torch import Tensor

from pyruntime.ops.attrs import norm_shapes
from pyruntime.ops.memory import alloc_weights
from pyruntime.spec import Linear, Norm, NormKind

PANEL: Final = 16


class LayoutKind(StrEnum):
    """What is done with the sources of a layout; they are concatenated first, where there are several."""

    STORED = "stored"  # as it is, in the plan's dtype
    VECTOR = "vector"  # float32
    VECTOR_PLUS_ONE = "vector plus one"  # float32, 1 added
    PANELS = "panels"  # see steps.h: Panels
    GATED_PANELS = "gated panels"  # a panel of the first source, then the same panel of the second, and so on
    PANEL_VALUES = "panel values"  # float32, a value for each output of each panel
    GATED_PANEL_VALUES = "gated panel values"


@dataclass(frozen=True, slots=True)
class Layout:
    """One tensor made of `sources` (roles of an op, or names of weights). None: zeros; `sizes` are outputs."""

    kind: LayoutKind
    sources: tuple[str | None, ...]
    sizes: tuple[int, ...] = ()

    def named(self, names: Mapping[str, str]) -> Layout:
        """The same with roles replaced by the names of weights; equal ones hold equal values."""
        return Layout(self.kind, tuple(None if role is None else names[role] for role in self.sources), self.sizes)


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


def matrix_layouts(name: str, linears: Mapping[str, Linear | None], gated: bool = False) -> dict[str, Layout]:
    """One matrix `name` of the linear maps that exist, by role, with `name`.bias where one of them has a bias."""
    kept = {role: linear for role, linear in linears.items() if linear is not None}
    if not kept:
        return {}
    sizes = tuple(linear.out_features for linear in kept.values())
    kind = LayoutKind.GATED_PANELS if gated else LayoutKind.PANELS
    layouts = {name: Layout(kind, tuple(f"{role}.weight" for role in kept), sizes)}
    if any(linear.bias for linear in kept.values()):
        values = LayoutKind.GATED_PANEL_VALUES if gated else LayoutKind.PANEL_VALUES
        biases = tuple(f"{role}.bias" if linear.bias else None for role, linear in kept.items())
        layouts[f"{name}.bias"] = Layout(values, biases, sizes)
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
            matrices = [source for source in sources if source is not None]
            return _panels(matrices, gated=layout.kind is LayoutKind.GATED_PANELS)
        case LayoutKind.PANEL_VALUES | LayoutKind.GATED_PANEL_VALUES:
            pairs = zip(sources, layout.sizes, strict=True)
            values = [torch.zeros(size, device="cpu") if source is None else source.float() for source, size in pairs]
            columns = [_by_panel(each[:, None]) for each in values]
            if layout.kind is LayoutKind.GATED_PANEL_VALUES:
                return torch.stack([column.flatten(1) for column in columns], dim=1).flatten()
            return _by_panel(torch.cat(values)[:, None]).flatten()


def _one(sources: Sequence[Tensor | None]) -> Tensor:
    (source,) = sources
    assert source is not None
    return source


def _panels(matrices: Sequence[Tensor], gated: bool) -> Tensor:
    """[panels, units, 16] int32 (`gated`: [panels, 2, units, 16]) of matrices [outputs, inputs]."""
    if gated:
        blocks = [_by_panel(_words(matrix)) for matrix in matrices]
        out = alloc_weights((blocks[0].shape[0], len(blocks), *blocks[0].shape[1:]), torch.int32)
        for i, block in enumerate(blocks):
            out[:, i].copy_(block)
        return out
    block = _by_panel(_words(matrices[0] if len(matrices) == 1 else torch.cat(list(matrices))))
    return alloc_weights(block.shape, torch.int32).copy_(block)


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
