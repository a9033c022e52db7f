"""Rows of the embedding table on a GPU."""

from __future__ import annotations

from typing import Final

import triton

from pyruntime.kernels.embed import embed_kernel
from pyruntime.ops.embed import EmbedAttrs
from pyruntime.ops.gpu.device import refused_dtype as refuses
from pyruntime.ops.gpu.frame import Frame, GpuNode, Launch
from pyruntime.ops.layout import Layout, LayoutKind, stored

__all__ = ["layouts", "on_gpu", "refuses"]

_BLOCK: Final = 1024


def layouts(attrs: EmbedAttrs) -> dict[str, Layout]:
    """The table as the head wants it, so that a shared one is kept once."""
    table = Layout(LayoutKind.ROWS, ("weight",), (attrs.embedding.vocab_size,))
    return {"table": table} | ({} if attrs.embedding.positions is None else {"positions": stored("position.weight")})


def on_gpu(attrs: EmbedAttrs, node: GpuNode) -> Launch:
    """One launch for any number of rows."""
    embedding, table = attrs.embedding, node.weights["table"]
    positions = node.weights.get("positions")

    def launch(frame: Frame) -> None:
        view, (out,) = frame.view, frame.outputs
        frame.launch(
            embed_kernel,
            (view.num_rows, triton.cdiv(embedding.size, _BLOCK)),
            view.token_ids,
            view.positions,
            table,
            # never read where there are no learned positions
            table if positions is None else positions,
            out,
            embedding.size,
            out.stride(0),
            embedding.scale,
            HAS_POSITIONS=positions is not None,
            BLOCK=_BLOCK,
        )

    return launch
