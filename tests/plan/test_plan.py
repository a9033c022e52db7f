"""Lowering, explaining, and costs against arithmetic done by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pyruntime.checkpoint import read_model
from pyruntime.errors import UsageError
from pyruntime.graph import SequenceWork, build, fuse
from pyruntime.ops.cache import KvCache
from pyruntime.ops.step import SequenceSlice, make_step
from pyruntime.plan import lower
from pyruntime.spec import DropPlan
from tests.helpers import make_plan

MakeLlama = Callable[..., tuple[Path, Any]]
# sizes of the tiny model of conftest
HIDDEN, FFN, VOCAB, Q, KV = 32, 56, 61, 32, 16
ATTENTION = HIDDEN + HIDDEN * (Q + 2 * KV) + Q * HIDDEN
MLP = HIDDEN + 3 * HIDDEN * FFN
HEAD = HIDDEN + HIDDEN * VOCAB


def test_decode_cost_is_weights_once_and_the_context_of_each_sequence(make_llama: MakeLlama) -> None:
    folder, _ = make_llama()
    plan = make_plan(folder, DropPlan(attention=(1,)))
    cost = plan.decode_cost(batch=3, context=10)
    # the tail norms its stream twice: once for keys and values, once for queries
    weights = 3 * ATTENTION + HIDDEN + 4 * MLP + HEAD + 3 * HIDDEN
    assert cost.weight_bytes == 4 * weights
    # each sequence reads its 11 keys and values and writes one, in each of three attentions
    assert cost.kv_bytes == 4 * 3 * 3 * (11 + 1) * 2 * KV
    linear = 3 * (HIDDEN * (Q + 2 * KV) + Q * HIDDEN) + 4 * 3 * HIDDEN * FFN + HIDDEN * VOCAB
    assert cost.flops == 3 * (2 * linear + 3 * 4 * Q * 11)


def test_costs_of_chunks_add_up_to_the_prompt(make_llama: MakeLlama) -> None:
    folder, _ = make_llama()
    plan = make_plan(folder)
    whole = plan.prefill_cost(12)
    parts = [plan.total_cost([SequenceWork(start, 4, 1 if start == 8 else 0)]) for start in (0, 4, 8)]
    assert sum(part.flops for part in parts) == whole.flops


def test_explain_names_every_step_and_the_totals(make_llama: MakeLlama) -> None:
    folder, _ = make_llama()
    plan = make_plan(folder, DropPlan(attention=(2, 3)))
    text = plan.explain()
    assert all(step.node.name in text for step in plan.steps)
    assert "reference (asked for)" in text
    assert "auto" not in text
    assert f"{len(plan.steps)} steps, 2 KV slots, {2 * 2 * KV * 4} KV bytes per token" in text


def test_buffers_share_places_and_results_do_not_change(make_llama: MakeLlama) -> None:
    folder, _ = make_llama()
    plan = make_plan(folder)
    # a stream, the residual beside it, and one intermediate are alive at a time
    assert plan.num_places <= 4
    held: dict[str, torch.Tensor] = {}
    step = make_step([SequenceSlice([1, 2, 3], 0, [0], [2])], plan.new_cache(1, 4))
    logits = plan.run(step, watch=lambda each, outputs: held.update(zip(each.node.outputs, outputs, strict=True)))
    assert torch.equal(held["logits"], logits)


def test_dtype_auto_keeps_the_checkpoints(make_llama: MakeLlama, tmp_path: Path) -> None:
    folder, hf_model = make_llama()
    # the fixture is shared: its own weights must not be rounded
    copy.deepcopy(hf_model).to(torch.bfloat16).save_pretrained(tmp_path)
    model = read_model(tmp_path)
    assert lower(fuse(build(model.spec)), model).dtype == torch.bfloat16
    assert lower(fuse(build(model.spec)), model, dtype="float32").dtype == torch.float32
    assert make_plan(folder).kv_bytes_per_token == 2 * lower(fuse(build(model.spec)), model).kv_bytes_per_token


def test_unknown_target_and_dtype_are_refused_by_name(make_llama: MakeLlama) -> None:
    folder, _ = make_llama()
    model = read_model(folder)
    with pytest.raises(UsageError, match="'tpu' does not exist; expected one of auto, reference, cpu"):
        lower(build(model.spec), model, target="tpu")
    with pytest.raises(UsageError, match="'int3' is not known"):
        lower(build(model.spec), model, dtype="int3")
    assert model.bytes_read == 0


def test_progress_adds_up_to_the_bytes_read(make_llama: MakeLlama) -> None:
    folder, _ = make_llama()
    model = read_model(folder)
    seen: list[int] = []
    lower(fuse(build(model.spec)), model, progress=seen.append)
    assert sum(seen) == model.bytes_read == model.weight_bytes


@pytest.mark.parametrize("target", ["reference", "cpu"])
def test_the_cache_of_another_kind_of_plan_is_refused(make_llama: MakeLlama, target: str) -> None:
    folder, _ = make_llama()
    plan = make_plan(folder, target=target)
    others = [make_plan(folder, dtype="bfloat16", target=target), make_plan(folder, DropPlan(attention=(1,)))]
    others.append(make_plan(make_llama(head_dim=24)[0], target=target))
    elsewhere = KvCache(plan.kv_shapes, 1, 16, plan.dtype, "meta")
    for cache in [*(other.new_cache(1, 16) for other in others), elsewhere]:
        step = make_step([SequenceSlice([1, 2, 3], 0, [0], [2])], cache)
        with pytest.raises(UsageError, match="make it with plan") as caught:
            plan.run(step)
        assert caught.value.code == "CACHE"
