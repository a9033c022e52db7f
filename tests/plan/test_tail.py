"""The tail changes no wanted logit, and costs what cost() says; cost() agrees with counting."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from pyruntime.graph import SequenceWork
from pyruntime.ops.step import SequenceSlice, make_step
from pyruntime.plan import Plan
from pyruntime.spec import DropPlan
from tests.helpers import PAGE_SIZE, make_plan, pages_of

MakeLlama = Callable[..., tuple[Path, Any]]
_random = random.Random(1)
PATTERNS = [
    DropPlan(),
    DropPlan(attention=(3,)),
    DropPlan(attention=(2, 3), mlp=(3,)),
    DropPlan(attention=(0, 1, 2)),
    DropPlan(attention=(0, 1, 2, 3)),
    DropPlan(attention=(1, 2, 3), mlp=(0, 1)),
    DropPlan(attention=(0, 1, 2, 3), mlp=(0, 1, 2, 3)),
]
SEQUENCES = [[_random.randrange(61) for _ in range(length)] for length in (13, 1, 6)]


def wanted_logits(
    plan: Plan, sequences: Sequence[Sequence[int]], wanted: Sequence[Sequence[int]], chunk: int
) -> torch.Tensor:
    """Logits of the positions `wanted` of each sequence, computed in chunks; some steps want none."""
    pages = pages_of(sequences)
    cache = plan.new_cache(sum(map(len, pages)), PAGE_SIZE)
    rows = []
    for start in range(0, max(map(len, sequences)), chunk):
        slices = []
        for sequence, own, asked in zip(sequences, pages, wanted, strict=True):
            ids = sequence[start : start + chunk]
            if ids:
                offsets = [position - start for position in asked if start <= position < start + len(ids)]
                slices.append(SequenceSlice(ids, start, own, offsets))
        rows.append(plan.run(make_step(slices, cache)))
    return torch.cat(rows)


@pytest.mark.parametrize("chunk", [64, 5, 1])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_the_tail_changes_no_wanted_logit(make_llama: MakeLlama, pattern: DropPlan, chunk: int) -> None:
    folder, _ = make_llama()
    for wanted in ([[12], [0], [5]], [[0, 3, 7], [], [2]], [list(range(13)), [0], list(range(6))]):
        plain = wanted_logits(make_plan(folder, pattern, "float64", fused=False), SEQUENCES, wanted, chunk)
        tailed = wanted_logits(make_plan(folder, pattern, "float64"), SEQUENCES, wanted, chunk)
        assert tailed.shape == plain.shape
        assert float((tailed - plain).abs().max()) < 1e-12


def counted_flops(plan: Plan, length: int, wanted: int) -> tuple[int, int]:
    """Operations of matrix products with weights, and of batched products (attention), as torch counts them."""
    pages = range(-(-length // PAGE_SIZE))
    piece = SequenceSlice([1] * length, 0, pages, range(length - wanted, length))
    step = make_step([piece], plan.new_cache(len(pages), PAGE_SIZE))
    with FlopCounterMode(display=False) as counter:
        plan.run(step)
    by_op = {str(op): count for op, count in counter.get_flop_counts()["Global"].items()}
    batched = by_op.get("aten.bmm", 0)
    return sum(by_op.values()) - batched, batched


@pytest.mark.parametrize("wanted", [1, 4, 13])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_cost_counts_the_operations_that_run(make_llama: MakeLlama, pattern: DropPlan, wanted: int) -> None:
    folder, _ = make_llama()
    plan = make_plan(folder, pattern)
    linear, batched = counted_flops(plan, 13, wanted)
    cost = plan.cost([SequenceWork(0, 13, wanted)])
    attends = {step.node.name for step in plan.steps if step.node.op == "attention"}
    assert sum(each.flops for name, each in cost.items() if name not in attends) == linear
    # the reference scores every cached position and hides the future; cost() counts what must be computed
    kept = 4 - len(pattern.attention)
    rows = [13] * (kept - 1) + [wanted] if kept else []
    width = 32
    assert batched == sum(4 * width * count * 13 for count in rows)
    visible = sum(sum(range(13 - count + 1, 14)) for count in rows)
    assert sum(cost[name].flops for name in attends) == 4 * width * visible


def test_steps_that_want_nothing_stop_at_the_tail(make_llama: MakeLlama) -> None:
    folder, _ = make_llama()
    plan = make_plan(folder, DropPlan(attention=(2, 3)))
    ran: list[str] = []
    step = make_step([SequenceSlice([1, 2, 3], 0, [0], [])], plan.new_cache(1, 4))
    logits = plan.run(step, watch=lambda each, _: ran.append(each.node.name))
    assert logits.shape == (0, 61)
    assert ran == [each.node.name for each in plan.steps if each.node.rows == "all"]
    assert ran[-1] == "layers.1.attention.kv"
    assert sum(cost.flops for cost in plan.cost([SequenceWork(0, 3, 0)]).values()) < plan.prefill_cost(3).flops


def test_the_published_70b_list_saves_what_its_arithmetic_says() -> None:
    """Llama-2-70B without 40 attentions, the last kept one in layer 44, loses 41 % of its linear prefill."""
    from pyruntime.checkpoint.families.llama import LLAMA
    from pyruntime.checkpoint.fields import Fields
    from pyruntime.graph import build, cost_of, fuse
    from pyruntime.spec import drop_sublayers

    spec = LLAMA.spec(
        Fields(
            {
                "vocab_size": 32000,
                "hidden_size": 8192,
                "intermediate_size": 28672,
                "num_hidden_layers": 80,
                "num_attention_heads": 64,
                "num_key_value_heads": 8,
                "max_position_embeddings": 4096,
            }
        )
    )
    # 35 layers from 45 on, and five earlier ones
    published = DropPlan(attention=(22, 30, 32, 36, 43, *range(45, 80)))
    length = 4096

    def linear_flops(plan: DropPlan, tail: bool) -> int:
        graph = fuse(build(drop_sublayers(spec, plan)))
        nodes = [node for node in graph.nodes if node.op not in ("attention", "head")]
        wanted = 1 if tail else length
        return sum(cost.flops for cost in cost_of(nodes, [SequenceWork(0, length, wanted)], 2).values())

    dropped, tailed = linear_flops(published, tail=False), linear_flops(published, tail=True)
    assert 1 - tailed / dropped == pytest.approx(0.41, abs=0.005)
    assert linear_flops(DropPlan(), tail=False) / dropped == pytest.approx(1.10, abs=0.005)
    assert linear_flops(DropPlan(), tail=False) / tailed == pytest.approx(1.85, abs=0.01)
