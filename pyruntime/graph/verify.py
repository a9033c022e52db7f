"""The law between phases: what must hold of every graph, checked after each rewrite."""

from __future__ import annotations

from pyruntime.errors import PyruntimeError
from pyruntime.graph.node import LOGITS, Graph, Node
from pyruntime.ops.attention import AttentionAttrs
from pyruntime.ops.qkv_rope import QkvRopeAttrs
from pyruntime.ops.step import Rows
from pyruntime.ops.table import OPS


def verify(graph: Graph, wanted: Rows = Rows.WANTED) -> None:
    """Raise PyruntimeError GRAPH that names the node and the rule it breaks.

    The rules: known ops, unique names, every buffer written once and before it is read, widths that fit, rows that
    match (only a gather goes from all rows to the wanted ones), weights for exactly the roles of the op, slots numbered
    densely with the cache written before it is read, and logits for the `wanted` rows at the end.
    """
    written: dict[str, tuple[int, Rows]] = {}
    names: set[str] = set()
    slots: list[int] = []
    for node in graph.nodes:
        _check(node, node.op in OPS, f"op {node.op!r} is not in the table")
        _check(node, node.name not in names, "its name is taken")
        names.add(node.name)
        _check_inputs(node, written)
        roles = {role for role, _ in node.weights}
        _check(node, roles == set(node.attrs.weight_shapes()), f"it has weights for {sorted(roles)}")
        _check_slots(node, slots)
        widths = node.attrs.out_widths()
        _check(node, len(widths) == len(node.outputs), f"it writes {len(node.outputs)} buffers, not {len(widths)}")
        for buffer, width in zip(node.outputs, widths, strict=True):
            _check(node, buffer not in written, f"{buffer} was written before")
            written[buffer] = (width, node.rows)
    last = graph.nodes[-1]
    _check(last, last.outputs == (LOGITS,) and last.rows is wanted, f"the last node must write the {wanted} logits")
    _check(last, slots == list(range(len(slots))), f"cache slots are {slots}")


def _check_inputs(node: Node, written: dict[str, tuple[int, Rows]]) -> None:
    widths = node.attrs.in_widths()
    _check(node, len(widths) == len(node.inputs), f"it reads {len(node.inputs)} buffers, not {len(widths)}")
    for buffer, width in zip(node.inputs, widths, strict=True):
        _check(node, buffer in written, f"{buffer} is read before it is written")
        found, rows = written[buffer]
        _check(node, found == width, f"{buffer} has {found} values a row; expected {width}")
        if node.op == "gather":
            _check(
                node, rows is Rows.ALL and node.rows is Rows.WANTED, "a gather goes from all rows to the wanted ones"
            )
        else:
            _check(node, rows is node.rows, f"{buffer} holds {rows} rows; the node computes {node.rows}")


def _check_slots(node: Node, slots: list[int]) -> None:
    match node.attrs:
        case QkvRopeAttrs(slot=slot, cache=True):
            _check(node, node.rows is Rows.ALL, "the cache needs every row")
            slots.append(slot)
        case QkvRopeAttrs(slot=slot) | AttentionAttrs(slot=slot):
            _check(node, slot in slots, f"cache slot {slot} is read before it is written")


def _check(node: Node, holds: bool, rule: str) -> None:
    if not holds:
        raise PyruntimeError("GRAPH", f"node {node.name}: {rule}")
