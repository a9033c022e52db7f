"""The engine's tokens against greedy decoding with transformers' uncached forward, however the work is cut up."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pyruntime.engine.engine import Engine
from pyruntime.engine.params import SamplingParams
from pyruntime.engine.request import RunningSequence
from pyruntime.errors import UsageError
from pyruntime.plan import Plan
from pyruntime.spec import DropPlan
from tests.generation import drain, greedy, run_all, run_one, small_engine, tokens
from tests.helpers import make_plan, without

MakeLlama = Callable[..., tuple[Path, Any]]

PATTERNS = {
    "dense": DropPlan(),
    "first attention": DropPlan(attention=(0,)),
    "last attentions and an mlp": DropPlan(attention=(2, 3), mlp=(1,)),
    "all attentions": DropPlan(attention=(0, 1, 2, 3)),
    "first and last block": DropPlan(attention=(0, 3), mlp=(0, 3)),
}
PROMPTS = {
    "a": [3, 17, 60, 0, 5, 5, 41, 22, 9, 33, 12],
    "b": [7],
    "c": [50, 2, 3],
    "d": [12, 33, 9, 22, 41, 5, 5, 0, 60, 17, 3, 1, 4],
    "e": [8, 8, 8, 8],
}
NEW = 9
GREEDY = SamplingParams(temperature=0.0, max_tokens=NEW)
RANDOM = SamplingParams(temperature=1.5, max_tokens=NEW, seed=11)
# how much an engine takes at a time; the last two preempt
WAYS: dict[str, dict[str, Any]] = {
    "everything at once": {},
    "one token a step": {"budget": 1},
    "chunks of three": {"budget": 3},
    "one at a time": {"max_num_seqs": 1},
    "two at a time in chunks": {"max_num_seqs": 2, "budget": 5},
    "small cache": {"num_pages": 8},
    "small cache in chunks": {"num_pages": 7, "page_size": 3, "budget": 4},
}
PREEMPTING = ("small cache", "small cache in chunks")


def oracle_tokens(hf_model: Any, pattern: DropPlan) -> dict[str, list[int]]:
    pruned = without(hf_model, pattern)
    return {name: greedy(pruned, prompt, NEW) for name, prompt in PROMPTS.items()}


def run_prompts(engine: Engine, params: SamplingParams) -> dict[str, list[int]]:
    outputs = run_all(engine, {name: (prompt, params) for name, prompt in PROMPTS.items()})
    assert all(output.outputs[0].finish_reason == "length" for output in outputs.values())
    return {name: tokens(output) for name, output in outputs.items()}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_greedy_tokens_equal_transformers_however_steps_are_cut(make_llama: MakeLlama, pattern: str) -> None:
    folder, hf_model = make_llama()
    plan = make_plan(folder, PATTERNS[pattern])
    expected = oracle_tokens(hf_model, PATTERNS[pattern])
    for way, sizes in WAYS.items():
        assert run_prompts(small_engine(plan, **sizes), GREEDY) == expected, way


@pytest.mark.parametrize("way", PREEMPTING)
def test_a_small_cache_does_preempt(make_llama: MakeLlama, way: str) -> None:
    plan = make_plan(make_llama()[0])
    outputs = run_all(small_engine(plan, **WAYS[way]), {name: (prompt, GREEDY) for name, prompt in PROMPTS.items()})
    assert sum(output.metrics.num_preemptions for output in outputs.values()) > 0
    # the oldest never loses its cache
    assert outputs["a"].metrics.num_preemptions == 0


def test_requests_that_come_and_go_do_not_change_each_other(make_llama: MakeLlama) -> None:
    folder, hf_model = make_llama()
    pattern = PATTERNS["first attention"]
    engine = small_engine(make_plan(folder, pattern), num_pages=16, budget=7, max_num_seqs=3)
    found: dict[str, list[int]] = {}
    for name, prompt in PROMPTS.items():
        engine.add_request(name, prompt, GREEDY)
        for _ in range(3):
            found.update({output.request_id: tokens(output) for output in engine.step() if output.finished})
    found.update({name: tokens(output) for name, output in drain(engine).items()})
    assert found == oracle_tokens(hf_model, pattern)


def test_seeded_sampling_depends_on_neither_batch_nor_chunks_nor_preemption(make_llama: MakeLlama) -> None:
    # float64, so that the order of sums in a batch cannot matter
    plan = make_plan(make_llama()[0], PATTERNS["first attention"], dtype="float64")
    alone = {name: tokens(run_one(small_engine(plan), prompt, RANDOM)) for name, prompt in PROMPTS.items()}
    assert alone["a"] != alone["d"]
    for way, sizes in WAYS.items():
        assert run_prompts(small_engine(plan, **sizes), RANDOM) == alone, way


def test_each_output_extends_the_one_before(make_llama: MakeLlama) -> None:
    folder, hf_model = make_llama()
    engine = small_engine(make_plan(folder), budget=4)
    engine.add_request("a", PROMPTS["a"], GREEDY, prompt="words")
    expected = oracle_tokens(hf_model, DropPlan())["a"]
    seen = []
    while engine.has_unfinished:
        for output in engine.step():
            seen.append(tokens(output))
            assert output.finished == (len(seen) == NEW)
            assert (output.prompt, output.prompt_token_ids) == ("words", tuple(PROMPTS["a"]))
    assert seen == [expected[: i + 1] for i in range(NEW)]


def test_a_sequence_s_tokens_are_prompt_then_output() -> None:
    sequence = RunningSequence(
        request_id="x",
        index=0,
        prompt_token_ids=(1, 2, 3),
        params=GREEDY,
        seed=0,
        max_tokens=9,
        detokenizer=None,
        output_token_ids=[4, 5, 6, 7],
    )
    for begin, end in itertools.combinations(range(8), 2):
        assert list(sequence.tokens(begin, end)) == list(range(begin + 1, end + 1))


def test_times_are_in_order(make_llama: MakeLlama) -> None:
    metrics = run_one(small_engine(make_plan(make_llama()[0])), [1, 2], GREEDY).metrics
    assert metrics.first_token_time is not None
    assert metrics.finished_time is not None
    assert metrics.arrival_time < metrics.first_token_time < metrics.finished_time


def test_an_aborted_request_frees_its_pages_and_leaves_the_others_alone(make_llama: MakeLlama) -> None:
    folder, hf_model = make_llama()
    expected = oracle_tokens(hf_model, DropPlan())
    engine = small_engine(make_plan(folder), budget=20, max_num_seqs=3)
    for name, prompt in PROMPTS.items():
        engine.add_request(name, prompt, GREEDY)
    engine.step()
    engine.step()
    owned = engine.config.num_pages - engine.num_free_pages
    assert list(engine.unfinished()) == list(PROMPTS)
    running, waiting = engine.abort("a"), engine.abort("e")
    assert running is not None
    assert waiting is not None
    for output, count in ((running, 2), (waiting, 0)):
        assert output.finished
        assert output.outputs[0].finish_reason == "abort"
        assert tokens(output) == expected[output.request_id][:count]
    # 11 tokens of the prompt and one of its own are in the cache, on pages of 4
    assert engine.config.num_pages - engine.num_free_pages == owned - 3
    assert engine.abort("a") is None
    assert engine.abort("never seen") is None
    assert {name: tokens(output) for name, output in drain(engine).items()} == {name: expected[name] for name in "bcd"}


def plan_with_poison(folder: Path, target: Path, token_id: int, pattern: DropPlan) -> Plan:
    """The model whose embedding of `token_id` is NaN."""
    shutil.copytree(folder, target)
    weights = load_file(target / "model.safetensors")
    weights["model.embed_tokens.weight"][token_id] = torch.nan
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return make_plan(target, pattern)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("sizes", [{}, {"budget": 3}, {"num_pages": 8}])
def test_nan_in_one_row_ends_that_request_only(
    make_llama: MakeLlama, tmp_path: Path, pattern: str, sizes: dict[str, Any]
) -> None:
    folder, hf_model = make_llama()
    expected = oracle_tokens(hf_model, PATTERNS[pattern])
    used = {token_id for ids in (*PROMPTS.values(), *expected.values()) for token_id in ids}
    poison = next(token_id for token_id in range(61) if token_id not in used)
    engine = small_engine(plan_with_poison(folder, tmp_path / "m", poison, PATTERNS[pattern]), **sizes)
    # it comes first, so that its pages are used again by the others
    requests = {"bad": ([1, 2, 3, 4, 5, poison], GREEDY)} | {name: (ids, GREEDY) for name, ids in PROMPTS.items()}
    outputs = run_all(engine, requests)
    (bad,) = outputs.pop("bad").outputs
    assert bad.finish_reason == "error"
    assert "NaN" in str(bad.stop_reason)
    assert bad.token_ids == ()
    assert {name: tokens(output) for name, output in outputs.items()} == expected


def test_nan_in_the_prompt_ends_a_request_for_prompt_logprobs(make_llama: MakeLlama, tmp_path: Path) -> None:
    plan = plan_with_poison(make_llama()[0], tmp_path / "m", 60, DropPlan(attention=(0, 1, 2, 3)))
    for budget in (1, 2, 64):
        # without attention the last row is sound: only the prompt's own rows show the NaN
        params = SamplingParams(temperature=0.0, prompt_logprobs=0, max_tokens=4)
        output = run_one(small_engine(plan, budget=budget), [1, 60, 2, 3], params)
        assert output.outputs[0].finish_reason == "error"
        assert output.outputs[0].token_ids == ()


@pytest.mark.parametrize(
    ("ids", "max_tokens", "said"),
    [
        ([], 4, ["empty"]),
        ([61], 4, ["61", "0 to 60"]),
        ([-1], 4, ["-1", "0 to 60"]),
        ([1, True], 4, ["True"]),
        ([1, 2.0], 4, ["2.0"]),
        ([1, "2"], 4, ["'2'"]),
        ([1] * 64, 1, ["64 tokens", "holds 64", "at most 63"]),
        ([1] * 70, None, ["70 tokens", "holds 64", "at most 63"]),
    ],
)
def test_a_prompt_that_cannot_run_is_refused_with_its_numbers(
    make_llama: MakeLlama, ids: list[Any], max_tokens: int | None, said: list[str]
) -> None:
    engine = small_engine(make_plan(make_llama()[0]))
    with pytest.raises(UsageError) as refusal:
        engine.add_request("x", ids, SamplingParams(max_tokens=max_tokens))
    assert refusal.value.code == "PROMPT"
    assert all(text in str(refusal.value) for text in said), str(refusal.value)
    assert not engine.has_unfinished


@pytest.mark.parametrize(("length", "max_tokens"), [(60, 5), (60, 4), (63, 16), (50, 2**31 - 1)])
def test_a_sequence_ends_where_the_context_does(make_llama: MakeLlama, length: int, max_tokens: int) -> None:
    folder, hf_model = make_llama()
    found = run_one(
        small_engine(make_plan(folder)), [1] * length, SamplingParams(temperature=0.0, max_tokens=max_tokens)
    )
    assert tokens(found) == greedy(hf_model, [1] * length, 64 - length)
    assert found.outputs[0].finish_reason == "length"


def test_what_can_never_fit_the_cache_is_refused_and_what_just_fits_runs(make_llama: MakeLlama) -> None:
    folder, hf_model = make_llama()
    engine = small_engine(make_plan(folder), num_pages=3, page_size=4)
    with pytest.raises(UsageError, match=r"needs 4 cache pages of 4 tokens; the whole cache has 3"):
        engine.add_request("x", [1] * 8, SamplingParams(max_tokens=6))
    assert not engine.has_unfinished
    # 8 + 5 tokens on 12 places: the last token is never fed back
    found = run_one(engine, [1] * 8, SamplingParams(temperature=0.0, max_tokens=5))
    assert tokens(found) == greedy(hf_model, [1] * 8, 5)


def test_an_id_in_use_and_ids_outside_the_vocabulary_are_refused(make_llama: MakeLlama) -> None:
    engine = small_engine(make_plan(make_llama()[0]))
    with pytest.raises(UsageError, match="stop_token_ids is 61"):
        engine.add_request("x", [1], SamplingParams(stop_token_ids=[61]))
    with pytest.raises(UsageError, match="stop strings need a tokenizer"):
        engine.add_request("x", [1], SamplingParams(stop="a"))
    assert not engine.has_unfinished
    engine.add_request("x", [1], GREEDY)
    with pytest.raises(UsageError, match="'x' is in use"):
        engine.add_request("x", [1], GREEDY)
    assert list(drain(engine)) == ["x"]


def test_a_refused_request_does_not_change_what_later_ones_draw(make_llama: MakeLlama) -> None:
    plan = make_plan(make_llama()[0])
    unseeded = SamplingParams(temperature=1.5, max_tokens=NEW)
    engine = small_engine(plan)
    with pytest.raises(UsageError):
        engine.add_request("x", [1], SamplingParams(stop="a"))
    assert tokens(run_one(engine, [5, 6], unseeded)) == tokens(run_one(small_engine(plan), [5, 6], unseeded))
