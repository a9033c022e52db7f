"""What a graph must move and compute: the bytes and operations that no implementation can avoid."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pyruntime.graph.node import Node
from pyruntime.ops.attention import AttentionAttrs
from pyruntime.ops.embed import EmbedAttrs
from pyruntime.ops.moe import MoeAttrs
from pyruntime.ops.qkv_rope import QkvRopeAttrs
from pyruntime.ops.step import Rows


@dataclass(frozen=True, slots=True)
class SequenceWork:
    """What a step computes of one sequence: `length` rows from `start` on, the last `wanted` of them with logits."""

    start: int
    length: int
    wanted: int = 1


@dataclass(frozen=True, slots=True)
class Cost:
    """Bytes a node must move and operations it must do: weights once per step, keys and values once per sequence."""

    weight_bytes: int = 0
    kv_bytes: int = 0
    flops: int = 0

    @property
    def num_bytes(self) -> int:
        """Weights and cache together."""
        return self.weight_bytes + self.kv_bytes

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.weight_bytes + other.weight_bytes, self.kv_bytes + other.kv_bytes, self.flops + other.flops)


def cost_of(nodes: Iterable[Node], work: Sequence[SequenceWork], itemsize: int, *, copies: int = 1) -> dict[str, Cost]:
    """Cost of each node, by name, for one step over `work`; weights and cache take `itemsize` bytes a value.

    The step has `copies` sequences of each of `work`, which is quicker to say and to count than a list of equals.
    """
    return {node.name: _node_cost(node, work, itemsize, copies) for node in nodes}


def _node_cost(node: Node, work: Sequence[SequenceWork], itemsize: int, copies: int) -> Cost:
    wanted_only = node.rows is Rows.WANTED
    counts = [min(each.wanted, each.length) if wanted_only else each.length for each in work]
    rows = copies * sum(counts)
    if rows == 0:
        return Cost()
    weight_bytes = itemsize * sum(math.prod(shape) for shape in node.attrs.weight_shapes().values())
    flops = rows * node.attrs.flops_per_row()
    match node.attrs:
        case EmbedAttrs(embedding=embedding):
            # a look-up reads its rows, not the table
            tables = 1 if embedding.positions is None else 2
            return Cost(weight_bytes=rows * tables * embedding.size * itemsize)
        case QkvRopeAttrs(cache=True, attention=attention):
            return Cost(weight_bytes, rows * attention.cached_size * itemsize, flops)
        case AttentionAttrs(attention=attention) as attrs:
            pairs, seen = (copies * count for count in _visible(attrs, work, counts))
            flops += pairs * attrs.flops_per_pair() + seen * attrs.flops_per_seen()
            return Cost(weight_bytes, seen * attention.cached_size * itemsize, flops)
        case MoeAttrs() as attrs:
            # experts that no row of the step chooses are not read
            return Cost(round(itemsize * attrs.values_read(rows)), 0, flops)
    return Cost(weight_bytes, 0, flops)


def _visible(attrs: AttentionAttrs, work: Sequence[SequenceWork], counts: Sequence[int]) -> tuple[int, int]:
    """(query, position) pairs that attention computes, and positions whose keys and values it reads."""
    pairs = seen = 0
    for each, count in zip(work, counts, strict=True):
        end = each.start + each.length
        pairs += sum(attrs.visible(position) for position in range(end - count, end))
        # the oldest query of the slice sees furthest back
        seen += 0 if count == 0 else attrs.visible(end - count) + count - 1
    return pairs, seen
