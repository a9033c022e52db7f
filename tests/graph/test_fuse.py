"""The shape of graphs: what fuses, what does not, golden prints, and the law between phases."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from pyruntime.checkpoint.families.llama import LLAMA
from pyruntime.checkpoint.fields import Fields
from pyruntime.errors import PyruntimeError
from pyruntime.graph import Graph, build, fuse, verify
from pyruntime.spec import DropPlan, ModelSpec, drop_sublayers
from tests.conftest import TINY

GOLDEN = Path(__file__).parent.parent / "golden"
PATTERNS = {
    "dense": DropPlan(),
    "first_attention": DropPlan(attention=(0,)),
    "last_attentions": DropPlan(attention=(2, 3)),
    "no_attention": DropPlan(attention=(0, 1, 2, 3)),
    "mixed": DropPlan(attention=(1, 2), mlp=(0, 3)),
    "nothing_left": DropPlan(attention=(0, 1, 2, 3), mlp=(0, 1, 2, 3)),
}


def spec(plan: DropPlan = DropPlan()) -> ModelSpec:
    return drop_sublayers(LLAMA.spec(Fields(TINY)), plan)


@pytest.mark.parametrize("name", PATTERNS)
def test_graphs_are_as_they_were(name: str) -> None:
    """A refactor may not touch these files; a wanted change is written with PYTEST_WRITE_GOLDEN=1 and reviewed."""
    path = GOLDEN / f"{name}.txt"
    text = str(fuse(build(spec(PATTERNS[name])))) + "\n"
    if os.environ.get("PYTEST_WRITE_GOLDEN"):
        path.write_text(text)
    assert text == path.read_text()


def test_mlps_whose_attention_is_gone_become_one_chain() -> None:
    graph = fuse(build(spec(PATTERNS["last_attentions"])))
    assert [node.op for node in graph.nodes].count("mlp_chain") == 1
    chain = next(node for node in graph.nodes if node.op == "mlp_chain")
    assert chain.name == "layers.1-3.mlp_chain"
    assert chain.rows == "wanted"


def test_a_chain_never_crosses_the_start_of_the_tail() -> None:
    graph = fuse(build(spec(DropPlan(attention=(1, 2)))))
    chain = next(node for node in graph.nodes if node.op == "mlp_chain")
    assert chain.rows == "all"
    assert [node.rows for node in graph.nodes if node.op == "mlp"] == ["wanted"]


def test_no_norm_and_no_add_is_left_in_a_llama() -> None:
    for plan in PATTERNS.values():
        ops = {node.op for node in fuse(build(spec(plan))).nodes}
        assert not ops & {"norm", "add"}


def test_nothing_left_is_embedding_and_head() -> None:
    graph = fuse(build(spec(PATTERNS["nothing_left"])))
    assert [node.op for node in graph.nodes] == ["embed", "head"]


def broken(graph: Graph, index: int, **changes: object) -> Graph:
    nodes = list(graph.nodes)
    nodes[index] = replace(nodes[index], **changes)  # type: ignore[arg-type]
    return Graph(tuple(nodes))


def test_verify_names_the_node_and_the_rule() -> None:
    graph = build(spec())
    cases = [
        (broken(graph, 1, op="blur"), "op 'blur' is not in the table"),
        (broken(graph, 1, name="embed"), "its name is taken"),
        (broken(graph, 1, inputs=("%99",)), "%99 is read before it is written"),
        (broken(graph, 1, weights=()), "it has weights for"),
        (broken(graph, 1, rows="wanted"), "holds all rows"),
        (broken(graph, 2, outputs=()), "it writes 0 buffers, not 1"),
        (broken(graph, 2, outputs=("%0",)), "%0 was written before"),
        (broken(graph, 3, attrs=replace(graph.nodes[3].attrs, slot=1)), "cache slot 1 is read before it is written"),  # type: ignore[type-var]
        (broken(graph, -1, outputs=("%98",)), "must write the wanted logits"),
        (Graph(graph.nodes[::-1]), "before it is written"),
    ]
    verify(graph)
    for wrong, rule in cases:
        with pytest.raises(PyruntimeError, match=rule):
            verify(wrong)
