"""Runs of the C++ executor: what a row's logits may not depend on, and who may call it."""

from __future__ import annotations

import itertools
import os
import signal
import threading
import time
from dataclasses import replace

import pytest
import torch

from pyruntime.errors import UsageError
from pyruntime.graph import build, fuse
from pyruntime.ops import _native
from pyruntime.ops.step import SequenceSlice, make_step
from pyruntime.plan import Plan, lower
from pyruntime.spec import ModelSpec
from tests.helpers import all_logits, pages_of
from tests.specs import ODD_MODELS, random_model

ISAS = _native.load().module.isa_available()
DTYPES = (torch.float32, torch.bfloat16)
LENGTHS = (37, 1, 3, 16, 17, 33, 40)
# around the borders of attention's blocks of 64 positions, and far behind a window of 70
LONG_LENGTHS = (63, 64, 65, 129, 200)
SEQUENCES, LONG = (
    [[(5 * i * i + seed) % 37 for i in range(length)] for seed, length in enumerate(lengths)]
    for lengths in (LENGTHS, LONG_LENGTHS)
)


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("PYRUNTIME_CPU_ISA", request.param)
    return str(request.param)


def cpu_plan(spec: ModelSpec, dtype: torch.dtype = torch.float32) -> Plan:
    return lower(fuse(build(spec)), random_model(spec, dtype), target="cpu")


def assert_same(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ODD_MODELS)
def test_a_rows_logits_depend_on_its_own_sequence_only(
    isa: str, name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit by bit: alone, in a batch, at once, in chunks, one by one."""
    monkeypatch.setenv("PYRUNTIME_NUM_THREADS", "1")
    plan = cpu_plan(ODD_MODELS[name], dtype)
    whole = all_logits(plan, SEQUENCES, 64)
    for chunk in (1, 12, 13, 25):
        assert_same(all_logits(plan, SEQUENCES, chunk), whole)
    for sequence, expected in zip(SEQUENCES, whole, strict=True):
        for chunk in (64, 5):
            assert_same(all_logits(plan, [sequence], chunk), [expected])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ODD_MODELS)
def test_rows_of_sequences_of_several_blocks_depend_on_their_own_only(
    isa: str, name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As above, where attention sums up by blocks and blocks lie before the window."""
    monkeypatch.setenv("PYRUNTIME_NUM_THREADS", "1")
    plan = cpu_plan(ODD_MODELS[name], dtype)
    whole = all_logits(plan, LONG, 256)
    for chunk in (1, 13, 65):
        assert_same(all_logits(plan, LONG, chunk), whole)
    for sequence, expected in zip(LONG, whole, strict=True):
        assert_same(all_logits(plan, [sequence], 31), [expected])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ODD_MODELS)
def test_the_number_of_threads_changes_no_bit(
    isa: str, name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {}
    for threads in (1, 2, 3, 7):
        monkeypatch.setenv("PYRUNTIME_NUM_THREADS", str(threads))
        plan = cpu_plan(ODD_MODELS[name], dtype)
        assert plan.program is not None and plan.program.num_threads == threads
        found[threads] = [torch.cat(all_logits(plan, SEQUENCES, chunk)) for chunk in (64, 9)]
        found[threads].append(torch.cat(all_logits(plan, LONG[-2:], 256)))
    for threads in (2, 3, 7):
        assert all(torch.equal(a, b) for a, b in zip(found[threads], found[1], strict=True))


@pytest.mark.parametrize("name", ODD_MODELS)
def test_asking_for_fewer_logits_changes_none(name: str) -> None:
    plan = cpu_plan(ODD_MODELS[name])
    sequence = SEQUENCES[-1]
    (whole,) = all_logits(plan, [sequence], 64)
    (own,) = pages_of([sequence], 16)
    for wanted in ([39], [0], [0, 1, 17, 38], list(range(12, 25))):
        step = make_step([SequenceSlice(sequence, 0, own, wanted)], plan.new_cache(3, 16))
        assert torch.equal(plan.run(step), whole[wanted])


def test_a_step_that_wants_no_logits_gives_none_and_fills_the_cache() -> None:
    plan = cpu_plan(ODD_MODELS["window and softcaps"])
    sequence = SEQUENCES[-1]
    (whole,) = all_logits(plan, [sequence], 64)
    (own,) = pages_of([sequence], 16)
    cache = plan.new_cache(3, 16)
    assert plan.run(make_step([SequenceSlice(sequence[:39], 0, own, [])], cache)).shape == (0, 61)
    last = plan.run(make_step([SequenceSlice(sequence[39:], 39, own, [0])], cache))
    assert torch.equal(last[0], whole[39])


@pytest.mark.parametrize("page_size", [16, 32, 48])
def test_the_page_size_changes_no_bit(page_size: int) -> None:
    plan = cpu_plan(ODD_MODELS["window and softcaps"])
    expected = all_logits(plan, SEQUENCES, 64)
    for sequence, logits in zip(SEQUENCES, expected, strict=True):
        (own,) = pages_of([sequence], page_size)
        step = make_step([SequenceSlice(sequence, 0, own, range(len(sequence)))], plan.new_cache(len(own), page_size))
        assert torch.equal(plan.run(step), logits)


@pytest.mark.parametrize("page_size", [1, 4, 15, 17, 24])
def test_a_page_size_that_is_no_multiple_of_a_panel_is_refused(page_size: int) -> None:
    with pytest.raises(UsageError, match=f"page_size is {page_size}; target cpu needs a multiple of 16"):
        cpu_plan(ODD_MODELS["merged, parallel, chained"]).new_cache(1, page_size)


def test_many_python_threads_share_one_plan_and_others_run_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYRUNTIME_NUM_THREADS", "3")
    plans = [cpu_plan(spec) for spec in ODD_MODELS.values()]
    expected = [all_logits(plan, SEQUENCES, 13) for plan in plans]
    wrong: list[str] = []

    def work(idx: int) -> None:
        for turn in range(2):
            for mine, right in zip(all_logits(plans[idx % 2], SEQUENCES, 13), expected[idx % 2], strict=True):
                if not torch.equal(mine, right):
                    wrong.append(f"thread {idx}, turn {turn}")

    threads = [threading.Thread(target=work, args=(idx,)) for idx in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_forked_child_computes_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYRUNTIME_NUM_THREADS", "2")
    plan = cpu_plan(ODD_MODELS["window and softcaps"])
    expected = all_logits(plan, SEQUENCES, 9)
    child = os.fork()
    if child == 0:
        # a lost worker would hang here for ever
        signal.alarm(60)
        found = all_logits(plan, SEQUENCES, 9)
        os._exit(0 if all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert all(torch.equal(a, b) for a, b in zip(all_logits(plan, SEQUENCES, 9), expected, strict=True))


@pytest.mark.parametrize("isa_name", ["sse9", "AVX2", "avx512_fp16"])
def test_an_unknown_cpu_path_is_refused_with_the_list_of_this_cpu(
    isa_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYRUNTIME_CPU_ISA", isa_name)
    with pytest.raises(UsageError, match="this CPU has generic"):
        cpu_plan(ODD_MODELS["merged, parallel, chained"])


def test_watching_a_plan_changes_no_logit() -> None:
    plan = cpu_plan(ODD_MODELS["merged, parallel, chained"])
    (own,) = pages_of([SEQUENCES[0]], 16)
    seen: list[str] = []
    logits = []
    for watch in (None, lambda step, _: seen.append(step.node.name)):
        step = make_step([SequenceSlice(SEQUENCES[0], 0, own, [0, 36])], plan.new_cache(len(own), 16))
        logits.append(plan.run(step, watch))
    assert torch.equal(*logits)
    assert seen == [step.node.name for step in plan.steps]


def test_weights_of_strange_strides_are_taken_as_they_are_meant() -> None:
    """Transposed matrices and slices of larger tensors, at odd offsets too: no kernel may see their strides."""
    spec = ODD_MODELS["window and softcaps"]
    for dtype, flat in itertools.product(DTYPES, (True, False)):
        model = random_model(spec, dtype)
        weights = {}
        for name, weight in model.weights.items():
            honest = weight.read()
            if flat or honest.dim() == 1:
                strange = torch.cat((honest.new_zeros(1), honest.flatten()))[1:].view(honest.shape)
            else:
                strange = honest.T.contiguous().T
            weights[name] = replace(weight, tensor=strange)  # type: ignore[type-var]
        odd = replace(model, weights=weights)
        plans = [lower(fuse(build(spec)), each, target="cpu") for each in (model, odd)]
        found, expected = (all_logits(plan, SEQUENCES[:1], 64)[0] for plan in plans)
        assert torch.equal(found, expected)


def test_between_runs_the_team_sleeps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYRUNTIME_NUM_THREADS", "4")
    all_logits(cpu_plan(next(iter(ODD_MODELS.values()))), SEQUENCES, 9)
    before = time.process_time()
    time.sleep(0.5)
    # processor time of all threads: one that went on looking for work would take all of it
    assert time.process_time() - before < 0.1
