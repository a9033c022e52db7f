"""The offline API: forms of prompts, defaults, streams, Ctrl-C, and what is refused."""

from __future__ import annotations

import itertools
import json
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from pyruntime import LLM, SamplingParams, UsageError
from pyruntime.engine.engine import Engine
from tests.generation import CHAT_TEMPLATE, greedy, tokens

TextModel = tuple[Path, Any]

TEXTS = ["the cat sat", "once upon a time there was a llama", "é 🦙", " "]
GREEDY = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(text_model: TextModel) -> LLM:
    return LLM(text_model[0])


@pytest.fixture(autouse=True)
def nothing_is_left(llm: LLM) -> Iterator[None]:
    """Whatever a test does, no request and no page stays behind."""
    yield
    assert not llm.engine.has_unfinished
    assert llm.engine.num_free_pages == llm.engine.config.num_pages
    assert not llm._latest


@pytest.fixture(scope="module")
def backend(text_model: TextModel) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(text_model[0] / "tokenizer.json"))


def copy_of(folder: Path, target: Path, **generation: Any) -> Path:
    shutil.copytree(folder, target)
    (target / "generation_config.json").write_text(json.dumps(generation))
    return target


def test_every_form_of_prompt_gives_the_tokens_of_transformers(
    llm: LLM, text_model: TextModel, backend: tokenizers.Tokenizer
) -> None:
    ids = [backend.encode(text).ids for text in TEXTS]
    expected = [greedy(text_model[1], each, 6) for each in ids]
    many: list[list[Any]] = [
        list(TEXTS),
        list(ids),
        [tuple(each) for each in ids],
        [{"prompt": text} for text in TEXTS],
        [{"prompt_token_ids": each, "prompt": text} for each, text in zip(ids, TEXTS, strict=True)],
        [TEXTS[0], ids[1], {"prompt": TEXTS[2]}, {"prompt_token_ids": ids[3]}],
    ]
    for prompts in many:
        outputs = llm.generate(prompts, GREEDY, use_tqdm=False)
        assert [tokens(output) for output in outputs] == expected
        assert [list(output.prompt_token_ids) for output in outputs] == ids
        assert [output.outputs[0].finish_reason for output in outputs] == ["length"] * 4
    one: tuple[Any, ...] = (TEXTS[1], ids[1], tuple(ids[1]), {"prompt": TEXTS[1]}, {"prompt_token_ids": ids[1]})
    for prompt in one:
        (output,) = llm.generate(prompt, GREEDY, use_tqdm=False)
        assert tokens(output) == expected[1]


def test_the_text_of_an_output_is_what_follows_the_prompt(llm: LLM, backend: tokenizers.Tokenizer) -> None:
    for output in llm.generate(TEXTS, SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True), use_tqdm=False):
        assert output.prompt in TEXTS
        whole = backend.decode([*output.prompt_token_ids, *output.outputs[0].token_ids])
        assert output.prompt + output.outputs[0].text == whole


def test_outputs_keep_the_order_of_prompts_that_end_at_different_times(llm: LLM, text_model: TextModel) -> None:
    prompts = [[5, i, 7] for i in range(8)]
    params = [SamplingParams(temperature=0.0, max_tokens=9 - i, ignore_eos=True) for i in range(8)]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    assert [tokens(output) for output in outputs] == [greedy(text_model[1], prompts[i], 9 - i) for i in range(8)]


def test_no_prompts_give_no_outputs(llm: LLM) -> None:
    assert llm.generate([], use_tqdm=False) == []


def test_params_and_prompts_must_match_in_number(llm: LLM) -> None:
    with pytest.raises(UsageError, match="2 sampling params for 3 prompts"):
        llm.generate([[1], [2], [3]], [GREEDY, GREEDY], use_tqdm=False)


BAD_PROMPTS: dict[str, Any] = {
    "empty text": "",
    "empty ids": [[]],
    "empty mapping": {},
    "unknown key": {"text": "a"},
    "bytes": b"ab",
    "a number": 5,
    "no sequence": {1, 2},
    "a generator": (text for text in TEXTS),
    "number among texts": ["a", 5],
    "ids out of range": [[1], [300]],
    "float": [[1.5]],
    "text that is no text": {"prompt_token_ids": [1], "prompt": 5},
    "surrogate": "a\ud800",
    "too long": [[1], [1] * 70],
}


@pytest.mark.parametrize("what", BAD_PROMPTS)
def test_a_bad_prompt_is_refused_and_none_is_run(llm: LLM, what: str) -> None:
    with pytest.raises(UsageError, match=r"expected|shorten"):
        llm.generate(BAD_PROMPTS[what], GREEDY, use_tqdm=False)


def test_without_params_the_authors_defaults_apply(text_model: TextModel, tmp_path: Path) -> None:
    folder, hf_model = text_model
    # greedy and seven tokens, says the fixture's generation_config.json
    (output,) = LLM(folder).generate([5, 6, 7], use_tqdm=False)
    expected = greedy(hf_model, [5, 6, 7], 7)
    assert tokens(output) == expected[: expected.index(1) + 1 if 1 in expected else None]
    warm = LLM(copy_of(folder, tmp_path / "m", temperature=0.5, top_k=9, max_new_tokens=3))
    assert warm.get_default_sampling_params() == SamplingParams(temperature=0.5, top_k=9, max_tokens=3)


def test_each_of_several_eos_ids_ends_a_text(text_model: TextModel, tmp_path: Path) -> None:
    folder, hf_model = text_model
    prompts = [[5, 6, 7], [40, 41]]
    expected = [greedy(hf_model, prompt, 6) for prompt in prompts]
    ends = [expected[0][2], expected[1][4]]
    llm = LLM(copy_of(folder, tmp_path / "m", eos_token_id=ends))
    outputs = llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=6), use_tqdm=False)
    for output, full in zip(outputs, expected, strict=True):
        cut = min(i for i, token_id in enumerate(full) if token_id in ends)
        assert tokens(output) == full[: cut + 1]
        assert (output.outputs[0].finish_reason, output.outputs[0].stop_reason) == ("stop", None)


def test_a_stop_string_ends_the_text_before_it(llm: LLM) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True)
    full = llm.generate("the", params, use_tqdm=False)[0].outputs[0].text
    stop = full[10:12]
    given = SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True, stop=stop)
    found = llm.generate("the", given, use_tqdm=False)[0].outputs[0]
    assert found.text == full[: full.index(stop)]
    assert (found.finish_reason, found.stop_reason) == ("stop", stop)


def test_logprobs_carry_the_text_of_their_tokens(llm: LLM, backend: tokenizers.Tokenizer) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, logprobs=3)
    (found,) = llm.generate("the cat", params, use_tqdm=False)[0].outputs
    assert found.logprobs is not None
    for step in found.logprobs:
        for token_id, logprob in step.items():
            assert logprob.decoded_token == backend.decode([token_id], skip_special_tokens=False)


# streams


def test_a_stream_grows_to_what_generate_gives(llm: LLM) -> None:
    (whole,) = llm.generate("the cat", GREEDY, use_tqdm=False)
    seen = list(llm.stream("the cat", GREEDY))
    assert [len(tokens(output)) for output in seen] == [1, 2, 3, 4, 5, 6]
    assert [output.finished for output in seen] == [False] * 5 + [True]
    assert all(whole.outputs[0].text.startswith(output.outputs[0].text) for output in seen)
    assert seen[-1].outputs == whole.outputs


def test_interleaved_streams_do_not_disturb_each_other(llm: LLM, text_model: TextModel) -> None:
    prompts = [[5, 6, 7], [40, 41], [9]]
    params = [SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True) for count in (5, 9, 2)]
    streams = [llm.stream(prompt, own) for prompt, own in zip(prompts, params, strict=True)]
    last: dict[int, list[int]] = {}
    for _ in range(9):
        for i, stream in enumerate(streams):
            for output in itertools.islice(stream, 1):
                last[i] = tokens(output)
        # a batch in between takes its own outputs only
        assert len(tokens(llm.generate([5, 5], GREEDY, use_tqdm=False)[0])) == 6
    assert [list(stream) for stream in streams] == [[], [], []]
    assert last == {i: greedy(text_model[1], prompts[i], params[i].max_tokens or 0) for i in range(3)}


def test_closing_a_stream_frees_its_pages_and_its_outputs(llm: LLM) -> None:
    long = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
    closed, other = llm.stream([5, 6, 7], long), llm.stream([8, 9], long)
    next(closed), next(other)
    # the other's step computes a token for this one too, which nobody will fetch
    next(other)
    closed.close()  # type: ignore[attr-defined]
    assert len(list(llm.engine.unfinished())) == 1
    assert len(tokens(list(other)[-1])) == 40


# Ctrl-C


def test_ctrl_c_returns_what_is_finished_and_aborts_the_rest(
    llm: LLM, text_model: TextModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest, calls = llm.engine.step, 0

    def step() -> Any:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise KeyboardInterrupt
        return honest()

    monkeypatch.setattr(llm.engine, "step", step)
    prompts = [[5, 6, 7], [40, 41], [9]]
    params = [SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True) for count in (9, 3, 8)]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    assert [output.outputs[0].finish_reason for output in outputs] == ["abort", "length", "abort"]
    assert all(output.finished for output in outputs)
    for output, prompt, count in zip(outputs, prompts, (4, 3, 4), strict=True):
        assert tokens(output) == greedy(text_model[1], prompt, count)


@pytest.mark.parametrize("where", ["plan", "_sample", "_output", "step", "add_request"])
@pytest.mark.parametrize("calls_before", [0, 2, 4])
def test_ctrl_c_at_any_moment_loses_no_output_and_harms_no_stream(
    llm: LLM, text_model: TextModel, monkeypatch: pytest.MonkeyPatch, where: str, calls_before: int
) -> None:
    stream = llm.stream([8, 9], SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True))
    next(stream)
    calls = 0

    def interrupted(honest: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if where in ("step", "_output"):
                result = honest(*args, **kwargs)
                if calls == calls_before + 1:
                    signal.raise_signal(signal.SIGINT)
                return result
            if calls == calls_before + 1:
                signal.raise_signal(signal.SIGINT)
            return honest(*args, **kwargs)

        return run

    with monkeypatch.context() as patch:
        if where == "plan":
            kind = type(llm.engine.plan)
            patch.setattr(kind, "run", interrupted(kind.run))
        else:
            patch.setattr(Engine, where, interrupted(getattr(Engine, where)))
        prompts = [[5, 6, 7], [40, 41], [9], [3, 3], [4]]
        params = [SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True) for count in (9, 3, 1, 2, 2)]
        outputs = llm.generate(prompts, params, use_tqdm=False)
    assert len(outputs) == 5
    assert any(output.outputs[0].finish_reason == "abort" for output in outputs)
    for output, prompt, own in zip(outputs, prompts, params, strict=True):
        assert output.finished
        count = len(tokens(output))
        assert tokens(output) == greedy(text_model[1], prompt, count)
        assert output.outputs[0].finish_reason == ("length" if count == own.max_tokens else "abort")
    assert tokens(list(stream)[-1]) == greedy(text_model[1], [8, 9], 30)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


# chat


def test_chat_renders_the_template_and_answers(llm: LLM, text_model: TextModel) -> None:
    one = [{"role": "user", "content": "the cat"}]
    two = [*one, {"role": "assistant", "content": "sat"}, {"role": "user", "content": "on"}]
    rendered = ["<s>user: the cat</s>assistant:", "<s>user: the cat</s><s>assistant: sat</s><s>user: on</s>assistant:"]
    assert CHAT_TEMPLATE.count("<s>") == 1
    tokenizer = tokenizers.Tokenizer.from_file(str(text_model[0] / "tokenizer.json"))
    expected = [tokenizer.encode(text).ids for text in rendered]
    outputs = llm.chat([one, two], GREEDY, use_tqdm=False)
    assert [list(output.prompt_token_ids) for output in outputs] == expected
    assert [tokens(output) for output in outputs] == [greedy(text_model[1], ids, 6) for ids in expected]
    (alone,) = llm.chat(one, GREEDY, use_tqdm=False)
    assert tokens(alone) == tokens(outputs[0])
