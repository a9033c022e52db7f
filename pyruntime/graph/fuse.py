"""Rewrites of the graph. Each is exact: norms into the op behind, adds into the op before, runs of MLPs, the tail."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Final

from pyruntime.graph.node import Graph, Node
from pyruntime.graph.tail import hoist_wanted_rows
from pyruntime.graph.verify import verify
from pyruntime.ops.head import HeadAttrs
from pyruntime.ops.linear import LinearAttrs
from pyruntime.ops.mlp import MlpAttrs
from pyruntime.ops.mlp_chain import MlpChainAttrs
from pyruntime.ops.norm import NormAttrs
from pyruntime.ops.qkv_rope import QkvRopeAttrs


def fuse(graph: Graph) -> Graph:
    """All rewrites in order, each verified. Nodes the rewrites do not know are left as they are."""
    for rewrite in REWRITES:
        graph = rewrite(graph)
        verify(graph)
    return graph


def fuse_norms(graph: Graph) -> Graph:
    """A norm that one op alone reads moves into that op."""
    producers, consumers = graph.producers(), graph.consumers()
    gone: set[str] = set()
    nodes: list[Node] = []
    for node in graph.nodes:
        norm = producers.get(node.inputs[0]) if node.inputs else None
        if norm is None or not _norm_fits(norm, node) or consumers[node.inputs[0]] != (node,):
            nodes.append(node)
            continue
        assert isinstance(norm.attrs, NormAttrs)
        assert isinstance(node.attrs, QkvRopeAttrs | LinearAttrs | MlpAttrs | HeadAttrs)
        weights = node.weights + tuple((f"norm.{role}", name) for role, name in norm.weights)
        attrs = replace(node.attrs, norm=norm.attrs.norm)
        inputs = (norm.inputs[0], *node.inputs[1:])
        nodes.append(replace(node, attrs=attrs, inputs=inputs, weights=tuple(sorted(weights))))
        gone.add(norm.name)
    return Graph(tuple(node for node in nodes if node.name not in gone))


def _norm_fits(norm: Node, node: Node) -> bool:
    takes_norm = isinstance(node.attrs, QkvRopeAttrs | LinearAttrs | MlpAttrs | HeadAttrs) and node.attrs.norm is None
    plain = isinstance(norm.attrs, NormAttrs) and not norm.attrs.residual
    # an op that also adds this buffer needs it as it was
    return takes_norm and plain and norm.rows == node.rows and node.inputs.count(node.inputs[0]) == 1


def fuse_adds(graph: Graph) -> Graph:
    """stream + x moves into the op that made x, where nothing else reads x."""
    producers, consumers = graph.producers(), graph.consumers()
    rewritten: dict[str, Node] = {}
    gone: set[str] = set()
    for node in graph.nodes:
        maker = producers.get(node.inputs[1]) if node.op == "add" else None
        if maker is None or not _takes_residual(maker) or consumers[node.inputs[1]] != (node,):
            continue
        assert isinstance(maker.attrs, LinearAttrs | MlpAttrs | NormAttrs)
        attrs = replace(maker.attrs, residual=True)
        rewritten[maker.name] = replace(
            maker, attrs=attrs, inputs=(maker.inputs[0], node.inputs[0]), outputs=node.outputs
        )
        gone.add(node.name)
    return Graph(tuple(rewritten.get(node.name, node) for node in graph.nodes if node.name not in gone))


def _takes_residual(node: Node) -> bool:
    return isinstance(node.attrs, LinearAttrs | MlpAttrs | NormAttrs) and not node.attrs.residual


def chain_mlps(graph: Graph) -> Graph:
    """MLPs that meet directly, because the attentions between them are gone, become one node."""
    consumers = graph.consumers()
    nodes: list[Node] = []
    run: list[Node] = []
    for node in graph.nodes:
        if run and not (_is_link(node) and node.inputs[0] == run[-1].outputs[0] and _continues(run, node, consumers)):
            nodes.extend(_chained(run))
            run = []
        if _is_link(node):
            run.append(node)
        else:
            nodes.append(node)
    return Graph((*nodes, *_chained(run)))


def _is_link(node: Node) -> bool:
    """An MLP that adds its output to its own input."""
    return isinstance(node.attrs, MlpAttrs) and node.attrs.residual and node.inputs[0] == node.inputs[1]


def _continues(run: list[Node], node: Node, consumers: object) -> bool:
    assert isinstance(consumers, dict)
    return consumers[run[-1].outputs[0]] == (node,) and run[-1].rows == node.rows


def _chained(run: list[Node]) -> Iterable[Node]:
    if len(run) < 2:
        return run
    first, last = run[0], run[-1]
    parts = tuple(node.attrs for node in run if isinstance(node.attrs, MlpAttrs))
    weights = tuple((f"{i}.{role}", name) for i, node in enumerate(run) for role, name in node.weights)
    layers = [node.name.split(".")[1] for node in run]
    return [
        Node(
            name=f"layers.{layers[0]}-{layers[-1]}.mlp_chain",
            op="mlp_chain",
            attrs=MlpChainAttrs(parts),
            inputs=(first.inputs[0],),
            outputs=last.outputs,
            weights=weights,
            rows=first.rows,
        )
    ]


REWRITES: Final[tuple[Callable[[Graph], Graph], ...]] = (fuse_norms, fuse_adds, hoist_wanted_rows, chain_mlps)
