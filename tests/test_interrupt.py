"""Ctrl-C as the terminal sends it, at moments between the steps: no output is lost and nothing is left behind."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pyruntime import LLM, RunError, SamplingParams, UsageError
from pyruntime import llm as llm_module
from pyruntime.engine.engine import Engine
from tests.generation import greedy, tokens

PROMPTS = [[5, 6, 7], [40, 41], [9]]
COUNTS = (9, 3, 1)
PARAMS = [SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True) for count in COUNTS]


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture(scope="module")
def llm(text_model: tuple[Path, Any]) -> LLM:
    return LLM(text_model[0])


@pytest.fixture(autouse=True)
def nothing_is_left(llm: LLM) -> Iterator[None]:
    yield
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert not llm.engine.has_unfinished
    assert llm.engine.num_free_pages == llm.engine.config.num_pages
    assert not llm._latest


class Bar:
    """tqdm's place in `LLM._run`, with a Ctrl-C at one of its moments."""

    def __init__(self, moment: str) -> None:
        self.moment = moment

    def __call__(self, **_: Any) -> Bar:
        return self._reach("made")

    def __enter__(self) -> Bar:
        return self._reach("before the first step")

    def __exit__(self, *_: object) -> None:
        self._reach("after the last step")

    def update(self) -> None:
        self._reach("collected")

    def _reach(self, moment: str) -> Bar:
        if moment == self.moment:
            self.moment = ""
            interrupt()
        return self


def once(honest: Callable[..., Any], num_signals: int, before: bool = True) -> Callable[..., Any]:
    """`honest`, with Ctrl-C on its first call."""
    left = [num_signals]

    def run(*args: Any, **kwargs: Any) -> Any:
        result = None if before else honest(*args, **kwargs)
        while left[0]:
            left[0] -= 1
            interrupt()
        return honest(*args, **kwargs) if before else result

    return run


def check_outputs(outputs: list[Any], hf_model: Any) -> None:
    assert len(outputs) == len(PROMPTS)
    for output, prompt, count in zip(outputs, PROMPTS, COUNTS, strict=True):
        assert output.finished
        found = tokens(output)
        assert found == greedy(hf_model, prompt, len(found))
        assert output.outputs[0].finish_reason == ("length" if len(found) == count else "abort")


@pytest.mark.parametrize(
    ("moment", "num_finished"),
    [("made", 0), ("before the first step", 0), ("collected", 1), ("after the last step", 3)],
)
def test_ctrl_c_between_two_steps_loses_nothing(
    llm: LLM, text_model: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch, moment: str, num_finished: int
) -> None:
    monkeypatch.setattr(llm_module, "tqdm", Bar(moment))
    outputs = llm.generate(PROMPTS, PARAMS)
    check_outputs(outputs, text_model[1])
    assert sum(output.outputs[0].finish_reason == "length" for output in outputs) == num_finished


@pytest.mark.parametrize("method", ["add_request", "step", "abort"])
@pytest.mark.parametrize("before", [True, False])
def test_one_ctrl_c_anywhere_in_the_engine_gives_an_output_for_each_prompt(
    llm: LLM, text_model: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch, method: str, before: bool
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(llm.engine, method, once(getattr(llm.engine, method), 1, before))
        outputs = llm.generate(PROMPTS, PARAMS, use_tqdm=False)
    check_outputs(outputs, text_model[1])


@pytest.mark.parametrize("method", ["add_request", "step", "abort"])
def test_a_second_ctrl_c_raises_and_leaves_nothing(
    llm: LLM, text_model: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(llm.engine, method, once(getattr(llm.engine, method), 2))
        with pytest.raises(KeyboardInterrupt):
            llm.generate(PROMPTS, PARAMS, use_tqdm=False)
    assert not llm.engine.has_unfinished
    check_outputs(llm.generate(PROMPTS, PARAMS, use_tqdm=False), text_model[1])


def test_a_second_ctrl_c_does_not_wait_for_the_step(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    reached = []

    def endless() -> Any:
        interrupt()
        interrupt()
        reached.append("the rest of the step")

    with monkeypatch.context() as patch:
        patch.setattr(llm.engine, "step", endless)
        with pytest.raises(KeyboardInterrupt):
            llm.generate(PROMPTS, PARAMS, use_tqdm=False)
    assert reached == []


def test_ctrl_c_between_taking_an_output_and_keeping_it_loses_nothing(
    llm: LLM, text_model: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Latest(dict[str, Any]):
        def pop(self, *args: Any) -> Any:
            found = super().pop(*args)
            if found is not None and found.finished:
                interrupt()
            return found

    with monkeypatch.context() as patch:
        patch.setattr(llm, "_latest", Latest())
        outputs = llm.generate(PROMPTS, PARAMS, use_tqdm=False)
    check_outputs(outputs, text_model[1])
    assert outputs[2].outputs[0].finish_reason == "length"


def test_a_third_ctrl_c_does_not_tear_what_tidies_up(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(llm.engine, "step", once(llm.engine.step, 2))
        patch.setattr(llm.engine, "abort", once(llm.engine.abort, 2))
        with pytest.raises(KeyboardInterrupt):
            llm.generate(PROMPTS, PARAMS, use_tqdm=False)


def test_a_stream_whose_request_is_gone_ends_instead_of_waiting(llm: LLM) -> None:
    stream = llm.stream([5, 6], PARAMS[0])
    next(stream)
    (request_id,) = llm.engine.unfinished()
    llm.engine.abort(request_id)
    with pytest.raises(RunError, match="ended elsewhere"):
        next(stream)


def test_an_error_wins_over_ctrl_c_and_restores_the_handler(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(llm.engine, "add_request", once(llm.engine.add_request, 1))
        with pytest.raises(UsageError):
            llm.generate([[1], [300]], use_tqdm=False)


def test_a_handler_of_the_host_is_left_in_place(
    llm: LLM, text_model: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    monkeypatch.setattr(Engine, "step", once(Engine.step, 1))
    previous = signal.signal(signal.SIGINT, lambda number, _: seen.append(number))
    try:
        outputs = llm.generate(PROMPTS, PARAMS, use_tqdm=False)
    finally:
        signal.signal(signal.SIGINT, previous)
    assert seen == [signal.SIGINT]
    assert [output.outputs[0].finish_reason for output in outputs] == ["length"] * 3


def test_a_handler_of_the_host_that_raises_while_prompts_are_added_gives_no_key_error(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    def handler(*_: object) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGINT, handler)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(llm.engine, "add_request", once(llm.engine.add_request, 1))
            with pytest.raises(KeyboardInterrupt):
                llm.generate(PROMPTS, PARAMS, use_tqdm=False)
    finally:
        signal.signal(signal.SIGINT, previous)


def test_another_thread_generates_without_touching_signals(llm: LLM, text_model: tuple[Path, Any]) -> None:
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.extend(llm.generate(PROMPTS, PARAMS, use_tqdm=False)))
    thread.start()
    thread.join(20)
    check_outputs(found, text_model[1])


def test_a_stream_raises_after_the_step_that_was_interrupted(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    honest = Engine.step

    def step(self: Engine) -> Any:
        interrupt()
        result = honest(self)
        done.append("whole")
        return result

    stream = llm.stream([5, 6], PARAMS[0])
    next(stream)
    monkeypatch.setattr(Engine, "step", step)
    with pytest.raises(KeyboardInterrupt):
        next(stream)
    assert done == ["whole"]
