"""AsyncLLM: many at once equal the synchronous ones, and whatever ends one leaves the others alone."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest

from pyruntime import LLM, AsyncLLM, RequestOutput, RunError, SamplingParams, UsageError
from tests.generation import tokens

PROMPTS: list[Any] = ["the cat", [5, 6, 7], {"prompt": "once upon a time"}, {"prompt_token_ids": [40, 41]}]
GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
LONG = SamplingParams(temperature=0.0, max_tokens=50, ignore_eos=True)
# a test that hangs is a failure
PATIENCE = 20.0


@pytest.fixture(scope="module")
def expected(text_model: tuple[Path, Any]) -> list[list[int]]:
    return [tokens(output) for output in LLM(text_model[0]).generate(PROMPTS, GREEDY, use_tqdm=False)]


@pytest.fixture
def engine(text_model: tuple[Path, Any]) -> Iterator[AsyncLLM]:
    with AsyncLLM(text_model[0]) as opened:
        yield opened
    assert not opened._thread.is_alive()


def run(work: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    async def bounded() -> Any:
        return await asyncio.wait_for(work(), PATIENCE)

    return asyncio.run(bounded())


def settled(engine: AsyncLLM) -> bool:
    """Whether every page is free and nobody listens, once the engine's thread has done what it was told."""
    inner, end = engine._llm.engine, time.monotonic() + PATIENCE
    while time.monotonic() < end:
        if not engine._commands and not engine._listeners and inner.num_free_pages == inner.config.num_pages:
            return not inner.has_unfinished
        time.sleep(0.005)
    return False


async def finish(outputs: AsyncIterator[RequestOutput]) -> RequestOutput:
    seen = [output async for output in outputs]
    assert seen[-1].finished
    return seen[-1]


def test_concurrent_generates_equal_the_synchronous_ones(engine: AsyncLLM, expected: list[list[int]]) -> None:
    async def work() -> Any:
        return await asyncio.gather(*(finish(engine.generate(prompt, GREEDY)) for prompt in PROMPTS * 3))

    assert [tokens(output) for output in run(work)] == expected * 3
    assert settled(engine)


def test_outputs_come_token_by_token(engine: AsyncLLM, expected: list[list[int]]) -> None:
    async def work() -> Any:
        return [output async for output in engine.generate(PROMPTS[1], GREEDY)]

    seen = run(work)
    assert [tokens(output) for output in seen] == [expected[1][: i + 1] for i in range(8)]
    assert [output.finished for output in seen] == [False] * 7 + [True]


def test_the_authors_defaults_apply_without_params(engine: AsyncLLM, text_model: tuple[Path, Any]) -> None:
    async def work() -> Any:
        return await finish(engine.generate([5, 6, 7]))

    (same,) = LLM(text_model[0]).generate([5, 6, 7], use_tqdm=False)
    assert tokens(run(work)) == tokens(same)


def test_a_cancelled_task_leaves_the_others(engine: AsyncLLM, expected: list[list[int]]) -> None:
    async def work() -> Any:
        started = asyncio.Event()

        async def endless() -> None:
            async for _ in engine.generate([9, 9], LONG):
                started.set()

        doomed = asyncio.create_task(endless())
        others = [asyncio.create_task(finish(engine.generate(prompt, GREEDY))) for prompt in PROMPTS]
        await started.wait()
        doomed.cancel()
        with pytest.raises(asyncio.CancelledError):
            await doomed
        return await asyncio.gather(*others)

    assert [tokens(output) for output in run(work)] == expected
    assert settled(engine)


def test_leaving_the_loop_early_ends_the_request(engine: AsyncLLM) -> None:
    async def work() -> None:
        outputs = engine.generate([9, 9], LONG)
        async for output in outputs:
            if len(tokens(output)) == 2:
                break
        await outputs.aclose()  # type: ignore[attr-defined]

    run(work)
    assert settled(engine)


@pytest.mark.parametrize("delay", [0.0, 0.001, 0.01])
def test_tasks_cancelled_while_they_start_harm_nothing(
    engine: AsyncLLM, expected: list[list[int]], delay: float
) -> None:
    async def work() -> Any:
        tasks = [asyncio.create_task(finish(engine.generate(prompt, LONG))) for prompt in PROMPTS]
        await asyncio.sleep(delay)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        return await finish(engine.generate(PROMPTS[1], GREEDY))

    assert tokens(run(work)) == expected[1]
    assert settled(engine)


def test_a_request_cancelled_while_its_command_waits_is_never_run(engine: AsyncLLM) -> None:
    inner, added = engine._llm.engine, []
    honest_step, honest_add = inner.step, inner.add_request

    async def work() -> Any:
        loop, in_step, go = asyncio.get_running_loop(), asyncio.Event(), asyncio.Event()

        def slow_step() -> Any:
            loop.call_soon_threadsafe(in_step.set)
            asyncio.run_coroutine_threadsafe(go.wait(), loop).result(PATIENCE)
            return honest_step()

        def noted_add(request_id: str, *rest: Any) -> None:
            added.append(request_id)
            honest_add(request_id, *rest)

        inner.step, inner.add_request = slow_step, noted_add  # type: ignore[method-assign, assignment]
        first = asyncio.create_task(finish(engine.generate([5, 6, 7], GREEDY)))
        await in_step.wait()
        second = asyncio.create_task(finish(engine.generate([8], GREEDY)))
        while not engine._commands:
            await asyncio.sleep(0.001)
        second.cancel()
        with pytest.raises(asyncio.CancelledError):
            await second
        inner.step = honest_step  # type: ignore[method-assign]
        go.set()
        return await first

    assert len(tokens(run(work))) == 8
    assert settled(engine)
    assert len(added) == 1


@pytest.mark.parametrize("prompt", ["", [], [300], [1] * 70, {"text": "a"}, 5])
def test_a_bad_request_raises_where_it_was_made(engine: AsyncLLM, expected: list[list[int]], prompt: Any) -> None:
    async def work() -> Any:
        good = asyncio.create_task(finish(engine.generate(PROMPTS[1], GREEDY)))
        with pytest.raises(UsageError, match=r"expected|shorten"):
            await finish(engine.generate(prompt, GREEDY))
        return await good

    assert tokens(run(work)) == expected[1]
    assert settled(engine)


def test_an_error_in_a_step_reaches_every_caller(engine: AsyncLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    honest, calls = engine._llm.engine.step, 0

    def step() -> Any:
        nonlocal calls
        calls += 1
        if calls > 3:
            raise RuntimeError("the machine is on fire")
        return honest()

    async def work() -> Any:
        monkeypatch.setattr(engine._llm.engine, "step", step)
        tasks = [finish(engine.generate(prompt, LONG)) for prompt in PROMPTS]
        return await asyncio.gather(*tasks, return_exceptions=True)

    errors = run(work)
    assert any("on fire" in str(error) for error in errors)
    for error in errors:
        # who came too late hears that it is closed
        assert "on fire" in str(error) or (isinstance(error, RunError) and error.code == "CLOSED")

    async def late() -> Any:
        await finish(engine.generate([1], GREEDY))

    with pytest.raises(RunError, match="shut down"):
        run(late)


def test_shutdown_ends_those_who_wait(text_model: tuple[Path, Any]) -> None:
    engine = AsyncLLM(text_model[0])

    async def work() -> Any:
        first = asyncio.Event()

        async def endless() -> None:
            async for _ in engine.generate([9, 9], LONG):
                first.set()
                # slower than the engine by far: it is shut down in the middle
                await asyncio.sleep(0.01)

        task = asyncio.create_task(endless())
        await first.wait()
        honest = engine._llm.engine.step

        def slow_step() -> list[RequestOutput]:
            time.sleep(0.001)
            return honest()

        engine._llm.engine.step = slow_step  # type: ignore[method-assign]
        waiting = [asyncio.create_task(finish(engine.generate([i], LONG))) for i in range(3)]
        await asyncio.sleep(0.02)
        await asyncio.to_thread(engine.shutdown)
        engine.shutdown()
        return await asyncio.gather(*waiting, task, return_exceptions=True)

    found = run(work)
    assert all(isinstance(each, RunError) and each.code == "CLOSED" for each in found[:3]), found
    with pytest.raises(RunError, match="shut down"):
        run(lambda: finish(engine.generate([1], GREEDY)))


def test_an_event_loop_closed_over_a_request_does_not_end_the_engine(
    engine: AsyncLLM, expected: list[list[int]]
) -> None:
    loop = asyncio.new_event_loop()
    outputs = engine.generate([9, 9], LONG)
    loop.run_until_complete(outputs.__anext__())
    # nobody closes `outputs`: the next token finds a loop that is no more
    loop.run_until_complete(loop.shutdown_default_executor())
    loop.close()

    async def work() -> Any:
        return await asyncio.gather(*(finish(engine.generate(prompt, GREEDY)) for prompt in PROMPTS))

    assert [tokens(output) for output in run(work)] == expected
    assert settled(engine)


class Panic(BaseException):
    """What a Rust panic of the tokenizers library is to Python."""


def test_a_panic_in_a_step_reaches_every_caller(text_model: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    engine = AsyncLLM(text_model[0])
    honest, calls = engine._llm.engine.step, 0

    def step() -> Any:
        nonlocal calls
        calls += 1
        if calls > 3:
            raise Panic("index out of bounds")
        return honest()

    async def work() -> Any:
        monkeypatch.setattr(engine._llm.engine, "step", step)
        return await asyncio.gather(*(finish(engine.generate(each, LONG)) for each in PROMPTS), return_exceptions=True)

    errors = run(work)
    assert all(isinstance(error, RunError) and error.code in ("ENGINE", "CLOSED") for error in errors), errors
    first = next(error for error in errors if error.code == "ENGINE")
    assert "index out of bounds" in str(first)
    assert isinstance(first.__cause__, Panic)
    engine.shutdown()


def test_a_panic_over_one_request_leaves_the_others(
    engine: AsyncLLM, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = engine._llm.engine.add_request

    def add(request_id: str, ids: Any, *rest: Any) -> None:
        if list(ids) == [8, 8]:
            raise Panic("bad id")
        honest(request_id, ids, *rest)

    async def work() -> Any:
        monkeypatch.setattr(engine._llm.engine, "add_request", add)
        with pytest.raises(RunError, match="bad id") as failure:
            await finish(engine.generate([8, 8], GREEDY))
        assert failure.value.code == "ENGINE"
        return await finish(engine.generate(PROMPTS[1], GREEDY))

    assert tokens(run(work)) == expected[1]
    assert settled(engine)


def test_it_is_the_twin_of_llm(engine: AsyncLLM, text_model: tuple[Path, Any]) -> None:
    twin = LLM(text_model[0])
    messages = [{"role": "user", "content": "the cat"}]

    async def work() -> Any:
        return await finish(engine.chat(messages, GREEDY))

    assert run(work).outputs == twin.chat(messages, GREEDY, use_tqdm=False)[0].outputs
    assert engine.model.spec == twin.model.spec
    assert engine.plan.explain() == twin.plan.explain()
    assert engine.get_default_sampling_params() == twin.get_default_sampling_params()
    assert engine.get_tokenizer().encode("the cat") == twin.get_tokenizer().encode("the cat")
    assert settled(engine)


def test_closing_a_chat_early_ends_its_request(engine: AsyncLLM) -> None:
    async def work() -> None:
        outputs = engine.chat([{"role": "user", "content": "the cat"}], LONG)
        await outputs.__anext__()
        await outputs.aclose()  # type: ignore[attr-defined]

    run(work)
    assert settled(engine)


def test_async_with_shuts_it_down_without_blocking_the_loop(
    text_model: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work() -> Any:
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                ticks += 1
                await asyncio.sleep(0.005)

        ticking = asyncio.create_task(tick())
        async with AsyncLLM(text_model[0]) as opened:
            output = await finish(opened.generate([5, 6], GREEDY))
            honest = opened.shutdown

            def slow_shutdown() -> None:
                time.sleep(0.2)
                honest()

            monkeypatch.setattr(opened, "shutdown", slow_shutdown)
            before = ticks
        ticking.cancel()
        assert ticks - before > 3
        return opened, output

    opened, output = run(work)
    assert not opened._thread.is_alive()
    assert output.finished


EXITS = """
import asyncio, sys
from pyruntime import AsyncLLM, SamplingParams

async def main(mode):
    llm = AsyncLLM(sys.argv[1], skip_tokenizer_init=True)
    params = SamplingParams(temperature=0.0, max_tokens=50, ignore_eos=True)

    async def read():
        async for _ in llm.generate([1, 2], params):
            if mode == "raise":
                raise KeyError("the user's own")
    if mode == "raise":
        await read()
    task = asyncio.create_task(read())
    await asyncio.sleep(0.2)

asyncio.run(main(sys.argv[2]))
"""


@pytest.mark.parametrize("mode, code", [("raise", 1), ("task", 0)])
def test_a_process_that_forgets_to_shut_down_ends_with_its_own_code(
    make_llama: Callable[..., tuple[Path, Any]], mode: str, code: int
) -> None:
    for _ in range(3):
        done = subprocess.run(
            [sys.executable, "-c", EXITS, str(make_llama()[0]), mode], capture_output=True, text=True, check=False
        )
        assert done.returncode == code, done.stderr
        assert "terminate called" not in done.stderr
