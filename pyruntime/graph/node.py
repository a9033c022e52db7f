"""The static layer graph: a flat list of nodes in execution order, each writing buffers that nothing overwrites."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pyruntime.ops.attrs import Attrs
from pyruntime.ops.cache import KvShape
from pyruntime.ops.qkv_rope import QkvRopeAttrs
from pyruntime.ops.step import Rows

LOGITS = "logits"


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """One op. `weights` pairs the op's roles with names of the model's weights; `rows` are the rows it computes."""

    name: str
    op: str
    attrs: Attrs
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    weights: tuple[tuple[str, str], ...] = ()
    rows: Rows = Rows.ALL


@dataclass(frozen=True, slots=True)
class Graph:
    """Nodes in execution order; the last one writes the buffer "logits"."""

    nodes: tuple[Node, ...]

    def producers(self) -> Mapping[str, Node]:
        """The node that writes each buffer."""
        return {buffer: node for node in self.nodes for buffer in node.outputs}

    def consumers(self) -> Mapping[str, tuple[Node, ...]]:
        """The nodes that read each buffer, in order."""
        found: dict[str, tuple[Node, ...]] = {}
        for node in self.nodes:
            for buffer in dict.fromkeys(node.inputs):
                found[buffer] = (*found.get(buffer, ()), node)
        return found

    def kv_shapes(self) -> tuple[KvShape, ...]:
        """What one token leaves in each cache slot."""
        attrs = (node.attrs for node in self.nodes)
        return tuple(each.kv_shape() for each in attrs if isinstance(each, QkvRopeAttrs) and each.cache)

    def widths(self) -> Mapping[str, int]:
        """Values per row of each buffer."""
        return {b: w for node in self.nodes for b, w in zip(node.outputs, node.attrs.out_widths(), strict=True)}

    def __str__(self) -> str:
        """One line a node, stable: golden files hold it."""
        return "\n".join(
            f"{node.name}: {node.op}[{node.rows}]({', '.join(node.inputs)}) -> {', '.join(node.outputs) or 'cache'}"
            f" flops/row={node.attrs.flops_per_row()} weights={len(node.weights)}"
            for node in self.nodes
        )
