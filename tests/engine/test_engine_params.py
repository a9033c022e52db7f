"""Every sampling parameter reaches the sampler; log-probabilities are those of transformers' logits."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch

from pyruntime.engine.params import SamplingParams
from pyruntime.engine.request import Logprob
from pyruntime.engine.tokenizer import Tokenizer
from pyruntime.spec import DropPlan
from tests.generation import Adjust, greedy, run_all, run_one, small_engine, tokens
from tests.helpers import hf_logits, make_plan, without

MakeLlama = Callable[..., tuple[Path, Any]]

PROMPT = [3, 17, 60, 0, 5, 5, 41, 22, 9, 33, 12]
PATTERN = DropPlan(attention=(0, 2))
WAYS: dict[str, dict[str, Any]] = {
    "at once": {},
    "one token a step": {"budget": 1},
    "chunks of three": {"budget": 3},
    "preempted": {"num_pages": 7},
    "preempted in the prompt": {"num_pages": 6, "budget": 2},
}


@pytest.fixture(scope="module")
def model(make_llama: MakeLlama) -> tuple[Any, Any]:
    """(plan, transformers twin)."""
    folder, hf_model = make_llama()
    return make_plan(folder, PATTERN), without(hf_model, PATTERN)


def params(**values: Any) -> SamplingParams:
    return SamplingParams(**{"temperature": 0.0, "max_tokens": 6, **values})


def banned(ids: Sequence[int], until: int) -> Callable[[torch.Tensor, Sequence[int]], torch.Tensor]:
    def adjust(row: torch.Tensor, output: Sequence[int]) -> torch.Tensor:
        if len(output) < until:
            row[list(ids)] = -torch.inf
        return row

    return adjust


def test_end_of_sequence_tokens_stop_and_say_no_reason(model: tuple[Any, Any]) -> None:
    plan, oracle = model
    expected = greedy(oracle, PROMPT, 6)
    for place in (0, 3):
        cut = expected.index(expected[place])
        found = run_one(small_engine(plan, eos=(60, expected[place])), PROMPT, params()).outputs[0]
        assert list(found.token_ids) == expected[: cut + 1]
        assert (found.finish_reason, found.stop_reason) == ("stop", None)
    ignoring = run_one(small_engine(plan, eos=(expected[0],)), PROMPT, params(ignore_eos=True))
    assert tokens(ignoring) == expected
    assert ignoring.outputs[0].finish_reason == "length"


def test_stop_token_ids_stop_and_are_the_reason_even_where_eos_is_ignored(model: tuple[Any, Any]) -> None:
    plan, oracle = model
    expected = greedy(oracle, PROMPT, 6)
    stop = expected[2]
    for ignore_eos in (False, True):
        given = params(stop_token_ids=[stop], ignore_eos=ignore_eos)
        found = run_one(small_engine(plan), PROMPT, given).outputs[0]
        assert list(found.token_ids) == expected[: expected.index(stop) + 1]
        assert (found.finish_reason, found.stop_reason) == ("stop", stop)


def test_nothing_ends_before_min_tokens(model: tuple[Any, Any]) -> None:
    plan, oracle = model
    first, second = (
        greedy(oracle, PROMPT, 6)[0],
        greedy(oracle, PROMPT, 1, banned([greedy(oracle, PROMPT, 1)[0]], 1))[0],
    )
    for least in (1, 3, 6):
        expected = greedy(oracle, PROMPT, 6, banned([first, second], least))
        ends = [i for i, token_id in enumerate(expected) if token_id in (first, second)]
        expected = expected[: ends[0] + 1] if ends else expected
        given = params(min_tokens=least, stop_token_ids=[second])
        assert tokens(run_one(small_engine(plan, eos=(first,)), PROMPT, given)) == expected
        assert len(expected) >= least


def test_no_max_tokens_means_as_many_as_the_context_holds(model: tuple[Any, Any]) -> None:
    plan, oracle = model
    found = run_one(small_engine(plan, max_model_len=20), PROMPT, params(max_tokens=None))
    assert tokens(found) == greedy(oracle, PROMPT, 20 - len(PROMPT))
    assert found.outputs[0].finish_reason == "length"


def test_bias_and_allowed_ids_reach_the_sampler(model: tuple[Any, Any]) -> None:
    plan, oracle = model

    def biased(row: torch.Tensor, _: Sequence[int]) -> torch.Tensor:
        row[7] += 1.5
        row[8] -= 100.0
        return row

    found = run_one(small_engine(plan), PROMPT, params(logit_bias={7: 1.5, 8: -100}))
    assert tokens(found) == greedy(oracle, PROMPT, 6, biased)
    few = [2, 30, 44]
    found = run_one(small_engine(plan), PROMPT, params(allowed_token_ids=few))
    assert tokens(found) == greedy(oracle, PROMPT, 6, banned([i for i in range(61) if i not in few], 99))
    assert set(tokens(found)) <= set(few)


def test_penalties_reach_the_sampler(model: tuple[Any, Any]) -> None:
    plan, oracle = model

    def repetition(row: torch.Tensor, output: Sequence[int]) -> torch.Tensor:
        for token_id in {*PROMPT, *output}:
            row[token_id] = row[token_id] / 3 if row[token_id] > 0 else row[token_id] * 3
        return row

    def presence_and_frequency(row: torch.Tensor, output: Sequence[int]) -> torch.Tensor:
        for token_id in range(61):
            row[token_id] -= 0.5 * (token_id in output) + 0.75 * output.count(token_id)
        return row

    always = {"logit_bias": {7: 3.0}, "max_tokens": 12}

    def with_bias(adjust: Adjust) -> Adjust:
        def both(row: torch.Tensor, output: Sequence[int]) -> torch.Tensor:
            row[7] += 3.0
            return adjust(row, output)

        return both

    for values, adjust in (
        ({"repetition_penalty": 3.0}, repetition),
        ({"presence_penalty": 0.5, "frequency_penalty": 0.75}, presence_and_frequency),
    ):
        expected = greedy(oracle, PROMPT, 12, with_bias(adjust))
        for way, sizes in WAYS.items():
            requests = {str(i): (PROMPT, params(**values, **always)) for i in range(2)}
            for output in run_all(small_engine(plan, **sizes), requests).values():
                assert tokens(output) == expected, way
        assert expected != greedy(oracle, PROMPT, 12, with_bias(lambda row, _: row))


@pytest.mark.parametrize("values", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}])
def test_a_filter_that_leaves_one_token_makes_a_hot_draw_greedy(model: tuple[Any, Any], values: dict[str, Any]) -> None:
    plan, oracle = model
    found = run_one(small_engine(plan), PROMPT, params(temperature=3.0, seed=5, **values))
    assert tokens(found) == greedy(oracle, PROMPT, 6)


def test_seeds_decide_and_the_engine_s_own_seed_counts_where_none_is_given(model: tuple[Any, Any]) -> None:
    plan, _ = model

    def draw(engine_seed: int, **values: Any) -> list[int]:
        return tokens(run_one(small_engine(plan, seed=engine_seed), PROMPT, params(temperature=2.0, **values)))

    assert draw(0, seed=1) == draw(9, seed=1)
    assert draw(0, seed=1) != draw(0, seed=2)
    assert draw(0) == draw(0)
    assert draw(0) != draw(9)


def test_two_requests_without_a_seed_draw_differently(model: tuple[Any, Any]) -> None:
    given = params(temperature=2.0)
    outputs = run_all(small_engine(model[0]), {"x": (PROMPT, given), "y": (PROMPT, given)})
    assert tokens(outputs["x"]) != tokens(outputs["y"])


def test_n_sequences_differ_and_the_first_is_that_of_n_one(model: tuple[Any, Any]) -> None:
    plan, _ = model
    for values in ({"seed": 4}, {}):
        given = params(temperature=2.0, n=4, **values)
        output = run_one(small_engine(plan), PROMPT, given)
        found = [tokens(output, index) for index in range(4)]
        assert [each.index for each in output.outputs] == [0, 1, 2, 3]
        assert len({tuple(each) for each in found}) == 4
        single = params(temperature=2.0, **values)
        assert tokens(run_one(small_engine(plan), PROMPT, single)) == found[0]
        several: tuple[dict[str, Any], ...] = ({"max_num_seqs": 1}, {"num_pages": 9}, {"budget": 3})
        for sizes in several:
            other = run_one(small_engine(plan, **sizes), PROMPT, given)
            assert [tokens(other, index) for index in range(4)] == found, sizes


def test_a_request_with_n_is_finished_when_its_last_sequence_is(model: tuple[Any, Any]) -> None:
    plan, _ = model
    engine = small_engine(plan)
    # a token that one of the four draws early and another never
    drawn = run_one(engine, PROMPT, params(temperature=2.0, n=4, seed=4, max_tokens=12))
    stop = next(t for t in tokens(drawn, 1) if any(t not in tokens(drawn, i) for i in range(4)))
    engine.add_request("x", PROMPT, params(temperature=2.0, n=4, seed=4, max_tokens=12, stop_token_ids=[stop]))
    outputs = []
    while engine.has_unfinished:
        outputs += engine.step()
    assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
    assert {each.finish_reason for each in outputs[-1].outputs} == {"stop", "length"}
    for index, each in enumerate(outputs[-1].outputs):
        full = tokens(drawn, index)
        assert list(each.token_ids) == full[: full.index(stop) + 1 if stop in full else None]


def check_logprobs(found: Any, logits: torch.Tensor, token_id: int, count: int) -> None:
    """`found` holds the token and the `count` best, as log_softmax of transformers' row says."""
    expected = logits.double().log_softmax(0)
    best = expected.topk(count).indices.tolist()
    assert set(found) == {token_id, *best}
    for each, logprob in found.items():
        assert isinstance(logprob, Logprob)
        assert logprob.logprob == pytest.approx(float(expected[each]), abs=2e-5)
        assert logprob.rank == 1 + int((expected > expected[each]).sum())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("count", [0, 3])
def test_prompt_logprobs_equal_transformers(model: tuple[Any, Any], way: str, count: int) -> None:
    plan, oracle = model
    engine = small_engine(plan, **WAYS[way])
    other = PROMPT[::-1]
    given = params(prompt_logprobs=count, max_tokens=9)
    outputs = run_all(engine, {"x": (PROMPT, given), "y": (other, given), "z": (PROMPT, params(max_tokens=9))})
    if way.startswith("preempted"):
        assert sum(output.metrics.num_preemptions for output in outputs.values()) > 0
    assert outputs["z"].prompt_logprobs is None
    for name, prompt in (("x", PROMPT), ("y", other)):
        logits = hf_logits(oracle, prompt)
        found = outputs[name].prompt_logprobs
        assert found is not None
        assert len(found) == len(prompt)
        assert found[0] is None
        for i in range(1, len(prompt)):
            check_logprobs(found[i], logits[i - 1], prompt[i], count)
        assert tokens(outputs[name]) == greedy(oracle, prompt, 9)


@pytest.mark.parametrize("way", WAYS)
def test_logprobs_are_of_the_raw_logits_and_keyed_by_token(model: tuple[Any, Any], way: str) -> None:
    plan, oracle = model
    given = params(temperature=1.7, seed=3, logprobs=2, logit_bias={4: 2.0}, top_k=20)
    requests = {"x": (PROMPT, given), "y": (PROMPT, given)}
    for output in run_all(small_engine(plan, **WAYS[way]), requests).values():
        (found,) = output.outputs
        logits = hf_logits(oracle, [*PROMPT, *found.token_ids])[len(PROMPT) - 1 :]
        assert found.logprobs is not None
        assert len(found.logprobs) == len(found.token_ids) == 6
        for i, token_id in enumerate(found.token_ids):
            check_logprobs(found.logprobs[i], logits[i], token_id, 2)
        total = sum(each[token_id].logprob for each, token_id in zip(found.logprobs, found.token_ids, strict=True))
        assert found.cumulative_logprob == pytest.approx(total, abs=1e-9)


def test_no_logprobs_unless_asked_for(model: tuple[Any, Any]) -> None:
    (found,) = run_one(small_engine(model[0]), PROMPT, params()).outputs
    assert found.logprobs is None
    assert found.cumulative_logprob is None


def test_a_stop_string_found_at_the_very_end_is_the_reason(model: tuple[Any, Any], tmp_path: Path) -> None:
    # a run of byte tokens has no text until it ends, so the stop string shows only when the sequence is finished
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(60))]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>"))
    dec = tokenizers.decoders
    backend.decoder = dec.Sequence([dec.ByteFallback(), dec.Fuse()])
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({}))
    engine = small_engine(model[0], tokenizer=Tokenizer(tmp_path))
    only_zeros = params(allowed_token_ids=[vocab["<0x30>"]], max_tokens=4)
    assert run_one(engine, PROMPT, only_zeros).outputs[0].text == "0000"
    given = params(allowed_token_ids=[vocab["<0x30>"]], max_tokens=4, stop="000")
    (found,) = run_one(engine, PROMPT, given).outputs
    assert (found.text, found.finish_reason, found.stop_reason) == ("", "stop", "000")
