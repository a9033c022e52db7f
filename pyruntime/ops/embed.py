"""K0: rows of the embedding table, and of a table of learned positions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from pyruntime.ops.attrs import Shape
from pyruntime.ops.layout import Layout, LayoutKind, stored
from pyruntime.ops.native_step import NativeNode, NativeStep
from pyruntime.ops.step import View
from pyruntime.spec import Embedding


@dataclass(frozen=True, slots=True)
class EmbedAttrs:
    """Token ids of the step's rows to stream values; `shared` says that the head uses the same table."""

    embedding: Embedding
    shared: bool = False

    def weight_shapes(self) -> dict[str, Shape]:
        """The table, and that of positions."""
        table: dict[str, Shape] = {"weight": (self.embedding.vocab_size, self.embedding.size)}
        known = self.embedding.positions
        return table if known is None else {**table, "position.weight": (known, self.embedding.size)}

    def in_widths(self) -> tuple[int, ...]:
        """No buffer: token ids come with the step."""
        return ()

    def out_widths(self) -> tuple[int, ...]:
        """The stream."""
        return (self.embedding.size,)

    def flops_per_row(self) -> int:
        """None: a look-up."""
        return 0


def reference(
    attrs: EmbedAttrs, weights: Mapping[str, torch.Tensor], inputs: Sequence[torch.Tensor], view: View
) -> tuple[torch.Tensor, ...]:
    """[rows, hidden], scaled, in the dtype that sums are kept in."""
    rows = weights["weight"][view.token_ids]
    rows = rows.to(torch.float64 if rows.dtype is torch.float64 else torch.float32)
    rows = rows if attrs.embedding.scale == 1.0 else rows * attrs.embedding.scale
    return (rows if attrs.embedding.positions is None else rows + weights["position.weight"][view.positions],)


def layouts(attrs: EmbedAttrs) -> dict[str, Layout]:
    """The table as stored, or in the panels that the head needs, so that it is kept once."""
    positions = {} if attrs.embedding.positions is None else {"positions": stored("position.weight")}
    if not attrs.shared:
        return {"table": stored("weight"), **positions}
    return {"table": Layout(LayoutKind.PANELS, ("weight",), (attrs.embedding.vocab_size,)), **positions}


def on_cpu(attrs: EmbedAttrs, node: NativeNode) -> list[NativeStep]:
    """One step."""
    embedding = attrs.embedding
    return [
        node.step(
            "embed",
            table=node.memory("table"),
            dtype=node.dtype_name,
            in_panels=attrs.shared,
            size=embedding.size,
            scale=embedding.scale,
            num_positions=embedding.positions or 0,
            position_table=node.memory("positions"),
            out=node.outputs[0],
        )
    ]
