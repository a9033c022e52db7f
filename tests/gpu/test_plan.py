"""Plans for target cuda: what they launch, what they share, and what a captured graph may rely on."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pyruntime.engine.engine import EngineConfig, largest_step
from pyruntime.engine.schedule import SchedulerConfig
from pyruntime.graph import build, fuse
from pyruntime.ops.gpu.batch import GREEDY, BatchSizes, RowSampling
from pyruntime.ops.gpu.frame import launch_kernel
from pyruntime.ops.step import Rows, SequenceSlice, make_step
from pyruntime.plan import Plan, PlanStep, lower
from pyruntime.plan.gpu import GpuRunner
from pyruntime.spec import DropPlan
from tests.gpu.helpers import INTERPRETED
from tests.helpers import make_plan
from tests.specs import ATTENTIONS, PLAIN_MLP, model_of, random_model

MakeLlama = Callable[..., tuple[Path, Any]]
PAGE_SIZE = 16
# with pages of two sequences each
PAGES = ((2, 0), (1, 3))
PROMPTS = ([5, 0, 36, 11, 2], [30, 7, 19, 4])


class Recorder:
    """A launcher that keeps what it was told, addresses instead of tensors."""

    def __init__(self) -> None:
        self.launches: list[tuple[Any, ...]] = []

    def __call__(
        self, kernel: Any, grid: tuple[int, ...], arguments: Sequence[Any], constants: Mapping[str, Any], *how: Any
    ) -> None:
        said = [each.data_ptr() if isinstance(each, torch.Tensor) else each for each in arguments]
        self.launches.append((kernel.fn.__name__, grid, tuple(said), tuple(sorted(constants.items())), *how))
        launch_kernel(kernel, grid, arguments, constants, *how)


def recorded(plan: Plan) -> Recorder:
    """The recorder of all later launches of the plan."""
    assert plan.gpu is not None
    recorder = Recorder()
    plan.gpu.launcher = recorder
    return recorder


def prefilled(plan: Plan) -> tuple[GpuRunner, Any]:
    """The plan's runner, and a cache with both prompts."""
    assert plan.gpu is not None
    cache = plan.new_cache(4, PAGE_SIZE)
    plan.gpu.prepare(cache, BatchSizes(64, 8, 8, 2))
    slices = [SequenceSlice(ids, 0, pages, [len(ids) - 1]) for ids, pages in zip(PROMPTS, PAGES, strict=True)]
    plan.run(make_step(slices, cache, plan.device))
    return plan.gpu, cache


def next_rows(tokens: Sequence[int], offset: int = 0) -> list[SequenceSlice]:
    """One row of each sequence, `offset` positions behind its prompt."""
    starts = [len(prompt) + offset for prompt in PROMPTS]
    return [SequenceSlice([t], start, pages, [0]) for t, start, pages in zip(tokens, starts, PAGES, strict=False)]


@pytest.mark.parametrize(
    "pattern, launches",
    [
        # embed, four layers of qkv, attention, output, gate and up, down; head, and two of the sampler
        (DropPlan(), 1 + 4 * 5 + 1 + 2),
        (DropPlan(attention=(1, 2)), 1 + 4 * 5 - 2 * 3 + 1 + 2),
        (DropPlan(mlp=(0,), attention=(3,)), 1 + 4 * 5 - 2 - 3 + 1 + 2),
        (DropPlan(attention=(0, 1, 2, 3), mlp=(0, 1, 2, 3)), 1 + 1 + 2),
    ],
)
def test_a_dropped_sublayer_launches_nothing(make_llama: MakeLlama, pattern: DropPlan, launches: int) -> None:
    plan = make_plan(make_llama()[0], pattern, "bfloat16", target="cuda")
    gpu, cache = prefilled(plan)
    recorder = recorded(plan)
    gpu.decode(next_rows([1, 2]), [GREEDY] * 2, cache)
    assert len(recorder.launches) == launches


def test_a_layer_whose_queries_and_output_were_merged_away_is_four_launches() -> None:
    attention = ATTENTIONS["no residual, no norm, q and o merged"]
    layer = (attention, replace(PLAIN_MLP, pre=None, residual=False), False)
    spec = model_of([layer, layer])
    plan = lower(fuse(build(spec)), random_model(spec, torch.float32), dtype="bfloat16", target="cuda")
    gpu, cache = prefilled(plan)
    recorder = recorded(plan)
    gpu.decode(next_rows([1, 2]), [GREEDY] * 2, cache)
    # embed, two layers, head, and two of the sampler
    assert len(recorder.launches) == 1 + 2 * 4 + 1 + 2


def test_every_decode_step_of_a_batch_size_launches_the_same_to_the_address(make_llama: MakeLlama) -> None:
    """What a captured graph repeats is what would have been launched."""
    plan = make_plan(make_llama()[0], DropPlan(attention=(1,)), "bfloat16", target="cuda")
    gpu, cache = prefilled(plan)
    recorder = recorded(plan)
    gpu.decode(next_rows([1, 2]), [GREEDY] * 2, cache)
    first, recorder.launches = recorder.launches, []
    gpu.decode(next_rows([9, 8], offset=1), [GREEDY] * 2, cache)
    assert recorder.launches == first


def test_decoding_gives_the_logits_of_a_plain_step(make_llama: MakeLlama) -> None:
    plan = make_plan(make_llama()[0], DropPlan(attention=(0, 3), mlp=(1,)), target="cuda")
    gpu, cache = prefilled(plan)
    tokens = gpu.decode(next_rows([1, 2]), [GREEDY] * 2, cache).tolist()
    found = gpu.decoded_logits(2).clone()
    # the same rows again: what they leave in the cache is what is there
    expected = plan.run(make_step(next_rows([1, 2]), cache, plan.device))
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert tokens == expected.argmax(-1).tolist()


def test_tokens_are_fed_back_on_the_device(make_llama: MakeLlama) -> None:
    plan = make_plan(make_llama()[0], target="cuda")
    gpu, cache = prefilled(plan)
    first = gpu.decode(next_rows([1, 2]), [GREEDY] * 2, cache).tolist()
    gpu.fed_back(first)
    batch = gpu._held().decode
    batch._send = lambda: pytest.fail("nothing had to be sent")  # type: ignore[method-assign, return-value, assignment]
    second = gpu.decode(next_rows(first, offset=1), [GREEDY.next()] * 2, cache).tolist()
    expected = plan.run(make_step(next_rows(first, offset=1), cache, plan.device))
    assert second == expected.argmax(-1).tolist()


def test_padding_rows_change_neither_logits_nor_pages(make_llama: MakeLlama) -> None:
    plan = make_plan(make_llama()[0], target="cuda")
    gpu, cache = prefilled(plan)
    gpu.decode(next_rows([1, 2]), [GREEDY] * 2, cache)
    expected = gpu.decoded_logits(2).clone()
    before = [pool[:4].clone() for slot in range(cache.num_slots) for pool in cache.pools(slot)]
    held = gpu._held()
    held.decode.load_decode(next_rows([1, 2]), 5, [GREEDY] * 2)
    gpu._launch_decode(5, None)
    assert torch.allclose(gpu.decoded_logits(2), expected, rtol=1e-5, atol=1e-5)
    after = [pool[:4] for slot in range(cache.num_slots) for pool in cache.pools(slot)]
    # NaN where nothing was ever written
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(before, after, strict=True))


def test_both_forms_of_the_graph_share_every_weight(make_llama: MakeLlama) -> None:
    folder = make_llama()[0]
    pattern = DropPlan(attention=(3,))
    plan = make_plan(folder, pattern, "bfloat16", target="cuda")
    assert plan.gpu is not None

    def memory(steps: Sequence[PlanStep]) -> set[int]:
        return {w.untyped_storage().data_ptr() for step in steps for w in step.weights.values()}

    assert memory(plan.gpu.steps.prefill) == memory(plan.gpu.steps.decode)


def test_behind_the_last_attention_only_wanted_rows_are_computed(make_llama: MakeLlama) -> None:
    plan = make_plan(make_llama()[0], DropPlan(attention=(2, 3)), target="cuda")
    cache = plan.new_cache(2, PAGE_SIZE)
    rows: dict[str, int] = {}

    def watch(step: PlanStep, outputs: tuple[torch.Tensor, ...]) -> None:
        if outputs:
            assert outputs[0].shape[0] == (7 if step.node.rows is Rows.ALL else 2)
            rows[step.node.name] = outputs[0].shape[0]

    plan.run(make_step([SequenceSlice(range(7), 0, [0], [3, 6])], cache, plan.device), watch)
    assert rows["layers.0.mlp.mlp"] == 7
    assert rows["layers.1.attention.attend"] == rows["layers.1-3.mlp_chain"] == rows["head"] == 2


def test_explain_says_what_runs_a_node_and_how_decoding_runs(make_llama: MakeLlama) -> None:
    said = make_plan(make_llama()[0], target="cuda").explain()
    assert "triton to 16 rows, vendor beyond (not measured on this device)" in said
    how = "launched one by one: Triton's interpreter has no graphs" if INTERPRETED else "captured as one CUDA graph"
    assert "decode: 18 of 18 nodes on " in said and how in said


def test_more_sequences_than_tokens_of_a_step_can_be_decoded(make_llama: MakeLlama) -> None:
    """An engine may run more sequences than a prefill step takes tokens."""
    plan = make_plan(make_llama()[0], target="cuda")
    assert plan.gpu is not None
    cache = plan.new_cache(4, PAGE_SIZE)
    plan.gpu.prepare(cache, BatchSizes(2, 2, 4, 1))
    slices = [SequenceSlice([token], 0, [page], [0]) for token, page in ((5, 0), (7, 1), (9, 2))]
    plan.gpu.decode(slices, [GREEDY] * 3, cache)
    expected = plan.run(make_step(slices, cache, plan.device))
    plan.gpu.decode(slices, [GREEDY] * 3, cache)
    assert torch.allclose(plan.gpu.decoded_logits(3), expected, rtol=1e-5, atol=1e-5)


def test_a_step_of_the_largest_size_makes_no_new_memory(make_llama: MakeLlama) -> None:
    """Captured graphs hold addresses: what an engine was prepared for must not be made anew while it serves."""
    plan = make_plan(make_llama()[0], DropPlan(attention=(0, 1, 2, 3), mlp=(0, 1, 2, 3)), target="cuda")
    assert plan.gpu is not None
    cache = plan.new_cache(2, PAGE_SIZE)
    plan.gpu.prepare(cache, largest_step(EngineConfig(32, 2, PAGE_SIZE, scheduler=SchedulerConfig(4, 20))))
    held = plan.gpu._held()
    # a prompt whose every token is scored
    plan.run(make_step([SequenceSlice(range(20), 0, [0, 1], range(20))], cache, plan.device))
    assert plan.gpu._held() is held


def test_memory_belongs_to_a_cache_and_goes_with_it(make_llama: MakeLlama) -> None:
    plan = make_plan(make_llama()[0], DropPlan(attention=(0, 1, 2, 3), mlp=(0, 1, 2, 3)), target="cuda")
    gpu, cache = prefilled(plan)
    held = gpu._held()
    other = plan.new_cache(4, PAGE_SIZE)
    plan.run(make_step([SequenceSlice([1], 0, [0], [0])], other, plan.device))
    gpu.decode(next_rows([1, 2]), [GREEDY] * 2, cache)
    assert gpu._held() is held
    gone = weakref.ref(other)
    del other
    gc.collect()
    assert gone() is None and len(gpu._memories) == 1


def test_what_the_device_moved_on_by_itself_is_sent_again(make_llama: MakeLlama) -> None:
    plan = make_plan(make_llama()[0], DropPlan(attention=(0, 1, 2, 3), mlp=(0, 1, 2, 3)), target="cuda")
    gpu, cache = prefilled(plan)
    first = gpu.decode(next_rows([1, 2]), [GREEDY] * 2, cache).tolist()
    gpu.fed_back(first)
    # what a captured graph does when it is replayed
    gpu._held().graphs[2] = FakeGraph(gpu)  # type: ignore[assignment]
    gpu.replay(2)
    found = gpu.decode(next_rows(first, offset=1), [GREEDY.next()] * 2, cache).tolist()
    expected = plan.run(make_step(next_rows(first, offset=1), cache, plan.device))
    assert found == expected.argmax(-1).tolist()


class FakeGraph:
    """Launches a decode step of two rows, where a graph would."""

    def __init__(self, gpu: GpuRunner) -> None:
        self._gpu = gpu

    def replay(self) -> None:
        self._gpu._launch_decode(2, None)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter has no graphs")
def test_a_captured_step_gives_the_bits_of_a_launched_one(make_llama: MakeLlama) -> None:
    plan = make_plan(make_llama()[0], DropPlan(attention=(1,)), "bfloat16", target="cuda")
    gpu, cache = prefilled(plan)
    gpu.decode(next_rows([1, 2]), [GREEDY] * 2, cache)
    expected = gpu.decoded_logits(2).clone()
    gpu.capture([2, 4])
    for _ in range(50):
        gpu.decode(next_rows([1, 2]), [GREEDY] * 2, cache)
        assert torch.equal(gpu.decoded_logits(2), expected)
    assert gpu.batch_sizes == (2, 4)


@pytest.mark.skipif(INTERPRETED, reason="the interpreter has no graphs")
@pytest.mark.parametrize("count", [3, 20])
def test_captured_steps_with_padding_and_prefills_between_give_the_tokens_of_launched_ones(
    make_llama: MakeLlama, count: int
) -> None:
    folder = make_llama()[0]
    found = [
        decoded(make_plan(folder, DropPlan(attention=(1,)), target="cuda"), count, sizes) for sizes in ((), (4, 24))
    ]
    assert found[0] == found[1]


def decoded(plan: Plan, count: int, captured: Sequence[int]) -> list[list[int]]:
    """Tokens of 12 steps of `count` sequences, with a prefill of another one in their midst."""
    assert plan.gpu is not None
    cache = plan.new_cache(count + 4, PAGE_SIZE)
    plan.gpu.prepare(cache, BatchSizes(64, 64, 24, 4))
    plan.gpu.capture(captured)
    tokens, steps = [(7 * i) % 61 for i in range(count)], []
    for step in range(12):
        slices = [SequenceSlice([token], step, [page], [0]) for page, token in enumerate(tokens)]
        tokens = plan.gpu.decode(slices, [at_step(step)] * count, cache).tolist()
        plan.gpu.fed_back(tokens)
        steps.append(tokens)
        if step == 5:
            pages = range(count, count + 4)
            plan.run(make_step([SequenceSlice(range(60), 0, pages, [59])], cache, plan.device))
    return steps


def at_step(step: int) -> RowSampling:
    """Greedy, at an output position."""
    return GREEDY._replace(step=step)
