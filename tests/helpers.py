"""What several test modules compute: the oracle of transformers, and a plan's logits in every way of running it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from pyruntime.checkpoint import Model, read_model
from pyruntime.graph import build, fuse
from pyruntime.ops.layout import PANEL
from pyruntime.ops.step import SequenceSlice, make_step
from pyruntime.passes import drop
from pyruntime.plan import Plan, lower
from pyruntime.spec import DropPlan

# small, so that short sequences straddle pages; a plan with a program takes no page size below a panel
PAGE_SIZE = 4
# with a GPU, whatever holds for the other targets is asked of it too; tests/gpu asks less where kernels are interpreted
TARGETS: tuple[Any, ...] = ("reference", "cpu")
if torch.cuda.is_available():
    TARGETS += (pytest.param("cuda", marks=pytest.mark.gpu),)


def without(hf_model: Any, plan: DropPlan) -> Any:
    """A copy of a transformers Llama whose dropped sublayers add exactly zero to the stream."""
    pruned = copy.deepcopy(hf_model)
    for index in plan.attention:
        silence(pruned.model.layers[index].self_attn.o_proj)
    for index in plan.mlp:
        silence(pruned.model.layers[index].mlp.down_proj)
    return pruned


def silence(linear: torch.nn.Linear) -> None:
    """Let the map give zeros, whatever it reads."""
    with torch.no_grad():
        linear.weight.zero_()
        if linear.bias is not None:
            linear.bias.zero_()


def hf_logits(hf_model: Any, token_ids: Sequence[int]) -> torch.Tensor:
    """Logits [tokens, vocab] of transformers' uncached forward over the whole sequence."""
    with torch.no_grad():
        logits: torch.Tensor = hf_model(torch.tensor([list(token_ids)]), use_cache=False).logits[0]
    return logits


def pruned_model(folder: Path, plan: DropPlan) -> Model:
    """The checkpoint in `folder` without what `plan` names."""
    return drop(read_model(folder), plan)


def make_plan(
    folder: Path,
    plan: DropPlan = DropPlan(),
    dtype: str = "float32",
    fused: bool = True,
    target: str = "reference",
) -> Plan:
    """The lowered plan of the pruned checkpoint."""
    model = pruned_model(folder, plan)
    graph = build(model.spec)
    return lower(fuse(graph) if fused else graph, model, dtype=dtype, target=target)


def page_size_of(plan: Plan) -> int:
    """The smallest page that tests use with the plan."""
    return PAGE_SIZE if plan.target == "reference" else PANEL


def pages_of(sequences: Sequence[Sequence[int]], page_size: int = PAGE_SIZE) -> list[list[int]]:
    """Disjoint pages for each sequence, interleaved and out of order as an engine would hand them out."""
    counts = [-(-len(sequence) // page_size) for sequence in sequences]
    free = list(range(sum(counts)))[::-1]
    pages: list[list[int]] = [[] for _ in sequences]
    while free:
        for own, count in zip(pages, counts, strict=True):
            if len(own) < count:
                own.append(free.pop(len(free) // 2))
    return pages


def all_logits(plan: Plan, sequences: Sequence[Sequence[int]], chunk: int) -> list[torch.Tensor]:
    """Logits of every position of every sequence, all sequences advancing together by `chunk` tokens a step."""
    page_size = page_size_of(plan)
    pages = pages_of(sequences, page_size)
    cache = plan.new_cache(sum(map(len, pages)), page_size)
    found: list[list[torch.Tensor]] = [[] for _ in sequences]
    for start in range(0, max(map(len, sequences)), chunk):
        slices, owners = [], []
        for i, (sequence, own) in enumerate(zip(sequences, pages, strict=True)):
            ids = sequence[start : start + chunk]
            if ids:
                slices.append(SequenceSlice(ids, start, own, range(len(ids))))
                owners.append((i, len(ids)))
        logits = plan.run(make_step(slices, cache, plan.device)).cpu()
        for (i, _), rows in zip(owners, logits.split([count for _, count in owners]), strict=True):
            found[i].append(rows)
    return [torch.cat(rows) for rows in found]


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference over the spread of the expected values."""
    return float((found.double() - expected.double()).abs().max() / expected.double().std())


def nmse(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Mean square of the differences over that of the expected values."""
    wide = expected.double()
    return float((found.double() - wide).square().mean() / wide.square().mean())
