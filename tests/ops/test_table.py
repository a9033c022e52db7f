"""Every implementation in the table: what it says about itself, and what it refuses."""

from __future__ import annotations

import pytest
import torch

from pyruntime.graph import Graph, build, fuse
from pyruntime.ops.table import OPS
from tests.specs import ATTENTION, ATTENTIONS, EXPERTS, MLPS, PLAIN_MLP, REPLACEMENT, SLIM_ATTENTIONS, model_of

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def graphs() -> list[Graph]:
    """Graphs that hold every op, with every form of attention and MLP."""
    forms = [model_of([(each, PLAIN_MLP, False), (ATTENTION, None, False)]) for each in ATTENTIONS.values()]
    forms += [model_of([(ATTENTION, each, False), (REPLACEMENT, each, False)]) for each in MLPS.values()]
    forms += [model_of([(ATTENTION, PLAIN_MLP, parallel), (None, PLAIN_MLP, False)]) for parallel in (True, False)]
    forms.append(model_of([(ATTENTION, EXPERTS, False)]))
    return [graph for form in forms for graph in (build(form), fuse(build(form)))]


NODES = [node for graph in graphs() for node in graph.nodes]


def test_the_graphs_here_hold_every_op() -> None:
    assert {node.op for node in NODES} == set(OPS)


def test_every_op_has_a_reference_that_refuses_nothing_and_an_implementation_for_each_target() -> None:
    for op, implementations in OPS.items():
        # experts that no row chooses are not to be read: neither C++ nor a launch is of that kind
        assert [each.target for each in implementations] == ["reference", *(() if op == "moe" else ("cpu", "cuda"))]
    for node in NODES:
        assert all(OPS[node.op][0].refuses(node.attrs, dtype) is None for dtype in DTYPES)


def test_an_implementation_runs_in_python_emits_steps_or_launches_kernels() -> None:
    for implementation in (each for implementations in OPS.values() for each in implementations):
        ways = (implementation.run, implementation.emit, implementation.on_gpu)
        assert sum(way is not None for way in ways) == 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_cpu_kernels_refuse_a_dtype_by_its_name_and_nothing_else(dtype: torch.dtype) -> None:
    for node in NODES:
        if len(OPS[node.op]) == 1:
            continue
        refused = OPS[node.op][1].refuses(node.attrs, dtype)
        if dtype in (torch.float32, torch.bfloat16):
            assert refused is None
        else:
            assert refused == f"its kernels take float32 and bfloat16, not {str(dtype).removeprefix('torch.')}"


@pytest.mark.parametrize("name", SLIM_ATTENTIONS)
def test_the_cpu_kernels_refuse_a_slim_cache_by_its_name(name: str) -> None:
    cached = SLIM_ATTENTIONS[name].cached
    nodes = build(model_of([(SLIM_ATTENTIONS[name], None, False)])).nodes
    said = f"its kernels cache keys and values, not {cached} alone (slim attention)"
    refused = {node.op: OPS[node.op][1].refuses(node.attrs, torch.float32) for node in nodes}
    assert {op: why for op, why in refused.items() if why is not None} == {"qkv_rope": said, "attention": said}


def test_layouts_are_made_of_exactly_the_weights_of_the_op() -> None:
    """A role that no layout names would be a weight that was forgotten."""
    for node in NODES:
        for implementation in OPS[node.op]:
            sources = {role for layout in implementation.layouts(node.attrs).values() for role in layout.sources}
            assert sources - {None} == set(node.attrs.weight_shapes())
