"""The whole engine under any order of requests, steps, aborts and failing steps, on real plans and a cache too small.

Each request is held against itself alone in an engine with room for it: whatever happened around it, its tokens and
text are the same, and its log-probabilities, on target cpu to the last bit. By hand, 20,000 runs with their figures:

    pytest -s --hypothesis-profile=stress tests/engine/test_stress.py
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, ClassVar, TypeVar
from unittest import mock

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from pyruntime.engine.engine import Engine
from pyruntime.engine.params import SamplingParams
from pyruntime.engine.request import RequestOutput, RunningSequence
from pyruntime.engine.tokenizer import Tokenizer
from pyruntime.errors import UsageError
from pyruntime.ops import sample
from pyruntime.ops.sample_native import NativeSampler
from pyruntime.plan import Plan
from tests.engine.stress import KINDS, Kind, all_values, prompt_of, roomy_engine, values_of, words
from tests.generation import drain, run_all, run_one, small_engine
from tests.helpers import page_size_of

T = TypeVar("T")

MODEL = "small"
EOS = (4, 19)
# a step on the reference takes as long as twenty in C++, so it gets fewer of the runs
DRAWN_KINDS = (*KINDS, *KINDS[1:], *KINDS[1:])
FAILURES: dict[str, tuple[tuple[Any, str], ...]] = {
    "plan": ((Plan, "run"),),
    "sampler": ((sample, "reference"), (NativeSampler, "sample")),
    "prompt logprobs": ((sample, "token_logprobs"), (NativeSampler, "token_logprobs")),
    "detokenizer": ((Tokenizer, "decode"),),
    "outputs": ((RunningSequence, "completion"),),
}
# called for every sequence that advances in a step
OFTEN_CALLED = ("detokenizer", "outputs")
# what the runs of a property must have met, or it says little
MUST_HAPPEN = (
    "preempted",
    "preempted twice",
    "refused",
    "finished by length",
    "finished by stop",
    "finished by a stop string",
    "aborted before its first step",
    "aborted inside its prompt",
    "aborted between two tokens",
    "aborted after a preemption",
    "failed in the plan",
    "failed in the sampler",
    "failed in the prompt logprobs",
    "failed in the detokenizer",
    "failed in the outputs",
)


@st.composite
def sampling_params(draw: st.DrawFn) -> SamplingParams:
    """Greedy or seeded, with every way to stop."""
    return SamplingParams(
        n=draw(st.sampled_from((1, 1, 2, 3))),
        temperature=draw(st.sampled_from((0.0, 1.5))),
        seed=draw(st.integers(0, 2)),
        top_k=draw(st.sampled_from((0, 8))),
        repetition_penalty=draw(st.sampled_from((1.0, 1.3))),
        max_tokens=None,
        min_tokens=draw(st.sampled_from((0, 0, 3))),
        stop=draw(st.sampled_from(((), (), ("中", "cab")))),
        stop_token_ids=draw(st.sampled_from(((), (1, 7, 30)))),
        ignore_eos=draw(st.booleans()),
        logprobs=draw(st.sampled_from((None, 2))),
        prompt_logprobs=draw(st.sampled_from((None, None, 1))),
    )


@functools.lru_cache(maxsize=1 << 12)
def alone(kind: Kind, max_model_len: int, prompt: tuple[int, ...], params: SamplingParams) -> RequestOutput:
    """The request by itself."""
    engine = roomy_engine(kind.plan(MODEL), max_model_len=max_model_len, tokenizer=words(), eos=EOS)
    return run_one(engine, prompt, params)


def close(found: Any, expected: Any) -> bool:
    """Equality, but for the last bits of floats."""
    if isinstance(expected, tuple):
        return len(found) == len(expected) and all(map(close, found, expected))
    return bool(found == (pytest.approx(expected, abs=1e-9) if isinstance(expected, float) else expected))


class EngineMachine(RuleBasedStateMachine):
    """`live` are the requests that are not finished, oldest first, each with its last output; `seen` counts events."""

    seen: ClassVar[Counter[str]]

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[str, RequestOutput | None] = {}
        self.asked: dict[str, tuple[tuple[int, ...], SamplingParams]] = {}
        self.num_finished = 0

    @initialize(
        kind=st.sampled_from(DRAWN_KINDS),
        num_pages=st.integers(2, 6),
        max_num_seqs=st.integers(1, 6),
        budget=st.sampled_from((3, 8, 20, 256)),
        short_context=st.booleans(),
    )
    def start(self, kind: Kind, num_pages: int, max_num_seqs: int, budget: int, short_context: bool) -> None:
        self.seen["runs"] += 1
        self.kind, self.num_pages = kind, num_pages
        self.page_size = 16 if kind.target == "cpu" else 4
        self.max_model_len = 2 * self.page_size + 5 if short_context else 100
        self.engine: Engine = small_engine(
            kind.plan(MODEL),
            num_pages=num_pages,
            page_size=self.page_size,
            max_model_len=self.max_model_len,
            max_num_seqs=max_num_seqs,
            budget=budget,
            tokenizer=words(),
            eos=EOS,
        )

    @precondition(lambda self: len(self.live) < 6)
    @rule(old=st.integers(1, 8), new=st.integers(1, 10), count=st.integers(1, 3), params=sampling_params())
    def add(self, old: int, new: int, count: int, params: SamplingParams) -> None:
        """`count` prompts of `old` quarters of a page, with `new` quarters for the answer."""
        for variant in range(count):
            self._add(prompt_of(old * self.page_size // 4, variant), 2 + new * self.page_size // 4, params)

    def _add(self, prompt: tuple[int, ...], max_tokens: int, params: SamplingParams) -> None:
        params = replace(params, max_tokens=max_tokens)
        name = str(len(self.asked))
        room = self.max_model_len - len(prompt)
        # every token but the last needs its place
        places = len(prompt) + min(max_tokens, room) - 1
        if room < 1 or places > self.num_pages * self.page_size:
            with pytest.raises(UsageError, match=r"the prompt has|cache pages"):
                self.engine.add_request(name, prompt, params)
            self.seen["refused"] += 1
            return
        self.engine.add_request(name, prompt, params)
        self.live[name] = None
        self.asked[name] = (prompt, params)
        self.seen["requests"] += 1

    @rule(count=st.integers(1, 10))
    def step(self, count: int) -> None:
        for _ in range(count):
            self._step()

    # after a few requests only, or most engines would be empty most of the time
    @precondition(lambda self: len(self.asked) > 6)
    @rule()
    def run_to_the_end(self) -> None:
        # the oldest sequence advances in every step, so this many are enough if nobody starves; one more for an output
        # that could not be made
        for _ in range(1 + sum(each.num_tokens + each.max_tokens for each in self._unfinished())):
            if not self.engine.has_unfinished:
                break
            self._step()
        assert not self.live
        assert not self.engine.has_unfinished
        assert self.engine.num_free_pages == self.num_pages
        assert self.engine.step() == []

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(list(self.live)))
        self.seen[f"aborted {_stage([each for each in self._unfinished() if each.request_id == name])}"] += 1
        output = self.engine.abort(name)
        assert output is not None
        assert output.finished
        self._take([output])
        assert self.engine.abort(name) is None

    @precondition(lambda self: self.live)
    @rule(where=st.sampled_from(list(FAILURES)), after=st.integers(0, 5))
    def fail_in(self, where: str, after: int) -> None:
        """A step that runs out of memory: the next one does its work."""
        try:
            self._take(failing(self.engine.step, where, after if where in OFTEN_CALLED else 0))
        except MemoryError:
            self.seen[f"failed in the {where}"] += 1

    @invariant()
    def every_page_is_free_or_owned_once(self) -> None:
        owned = [page for each in self._unfinished() for page in each.pages]
        allocator = self.engine._allocator
        assert sorted([*owned, *allocator._free]) == list(range(self.num_pages))
        assert allocator._owned == set(owned)
        assert self.engine.num_free_pages + len(owned) == self.num_pages

    @invariant()
    def every_request_is_waiting_running_or_finished(self) -> None:
        scheduler = self.engine._scheduler
        assert list(self.engine.unfinished()) == list(self.live)
        assert self.num_finished + len(self.live) == len(self.asked)
        unfinished = self._unfinished()
        assert list(scheduler.sequences()) == unfinished
        assert scheduler.num_running + scheduler.num_waiting == len(unfinished)
        for each in scheduler._waiting:
            assert (each.pages, each.num_computed) == ([], 0)
        for each in scheduler._running:
            assert each.num_computed < each.num_tokens
            assert each.num_computed <= len(each.pages) * self.page_size
            assert len(each.pages) * self.page_size < each.num_tokens + self.page_size

    def teardown(self) -> None:
        if hasattr(self, "engine"):
            self.run_to_the_end()

    def _unfinished(self) -> list[RunningSequence]:
        requests = self.engine._requests.values()
        return [each for request in requests for each in request.sequences if each.finish_reason is None]

    def _step(self) -> None:
        before = {id(each): each.num_preemptions for each in self._unfinished()}
        oldest = next(self.engine._scheduler.sequences(), None)
        self._take(self.engine.step())
        self.seen["steps"] += 1
        self.seen["preempted"] += sum(each.num_preemptions - before[id(each)] for each in self._unfinished())
        assert oldest is None or oldest.num_preemptions == before[id(oldest)], "the oldest lost its cache"

    def _take(self, outputs: Sequence[RequestOutput]) -> None:
        """Hold each output against the request alone; those that are not finished yet against its beginning."""
        for output in outputs:
            name = output.request_id
            last = self.live[name]
            expected = alone(self.kind, self.max_model_len, *self.asked[name])
            for i, (found, right) in enumerate(zip(output.outputs, expected.outputs, strict=True)):
                assert found.token_ids == right.token_ids[: len(found.token_ids)]
                # an abort releases what was held back, as if nothing came behind it
                assert found.finish_reason == "abort" or right.text.startswith(found.text)
                assert last is None or len(found.token_ids) >= len(last.outputs[i].token_ids)
            assert output.finished or _num_tokens(output) > (0 if last is None else _num_tokens(last)), "nothing new"
            self.live[name] = output
            if output.finished:
                self._finish(output, expected)

    def _finish(self, output: RequestOutput, expected: RequestOutput) -> None:
        del self.live[output.request_id]
        self.num_finished += 1
        self.seen["preempted twice"] += output.metrics.num_preemptions > 1
        reasons = [str(each.finish_reason) for each in output.outputs]
        self.seen.update(f"finished by {reason}" for reason in reasons)
        self.seen["finished by a stop string"] += any(isinstance(each.stop_reason, str) for each in output.outputs)
        if "abort" not in reasons:
            found, right = values_of(output), values_of(expected)
            assert found == right if self.kind.exact else close(found, right)


def _num_tokens(output: RequestOutput) -> int:
    return sum(len(each.token_ids) for each in output.outputs)


def _stage(sequences: Sequence[RunningSequence]) -> str:
    """How far the request is that consists of these sequences and of finished ones."""
    if any(each.num_preemptions > 0 for each in sequences):
        return "after a preemption"
    if any(each.output_token_ids for each in sequences):
        return "between two tokens"
    return "inside its prompt" if any(each.num_computed > 0 for each in sequences) else "before its first step"


def failing(call: Callable[[], T], where: str, after: int = 0) -> T:
    """`call()` while a part of the engine has no memory, from its call number `after` on."""
    count = itertools.count()
    with contextlib.ExitStack() as patches:
        for owner, name in FAILURES[where]:
            patches.enter_context(mock.patch.object(owner, name, _no_memory(getattr(owner, name), count, after)))
        return call()


def _no_memory(honest: Callable[..., Any], count: Iterator[int], after: int) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        if next(count) >= after:
            raise MemoryError
        return honest(*args, **kwargs)

    return call


# scores, texts of two sequences, and ends by length and by a stop string
REQUESTS = {
    "3": (prompt_of(3, 0), SamplingParams(temperature=1.5, seed=1, max_tokens=6, logprobs=2, prompt_logprobs=1)),
    "17": (prompt_of(17, 0), SamplingParams(temperature=1.5, seed=1, max_tokens=6, logprobs=2, prompt_logprobs=1)),
    "30": (prompt_of(30, 0), SamplingParams(n=2, temperature=1.5, seed=1, max_tokens=6, stop=("c",))),
}


@pytest.mark.parametrize("where", FAILURES)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_step_that_runs_out_of_memory_is_computed_again(kind: Kind, where: str) -> None:
    plan = kind.plan(MODEL)
    expected = all_values(run_all(roomy_engine(plan, tokenizer=words()), REQUESTS))
    for after in itertools.count():
        engine = small_engine(plan, page_size=page_size_of(plan), budget=8, tokenizer=words())
        for name, request in REQUESTS.items():
            engine.add_request(name, *request)
        num_failed, found = 0, {}
        while engine.has_unfinished:
            try:
                outputs = failing(engine.step, where, after)
            except MemoryError:
                num_failed += 1
                outputs = engine.step()
            found.update({output.request_id: values_of(output) for output in outputs if output.finished})
        assert all(close(found[name], expected[name]) for name in REQUESTS)
        # by now no step calls it so often
        if num_failed == 0:
            assert after > 0
            break


@pytest.mark.parametrize("where", ["detokenizer", "outputs"])
def test_an_aborted_request_is_gone_even_where_its_output_cannot_be_made(where: str) -> None:
    engine = roomy_engine(KINDS[1].plan(MODEL), tokenizer=words())
    expected = run_all(engine, {"17": REQUESTS["17"]})
    for name, request in REQUESTS.items():
        engine.add_request(name, *request)
    engine.step()
    for name in ("3", "30"):
        with pytest.raises(MemoryError):
            failing(functools.partial(engine.abort, name), where)
    assert list(engine.unfinished()) == ["17"]
    assert all_values(drain(engine)) == all_values(expected)


def test_no_order_of_events_loses_a_page_or_a_request_or_changes_an_output() -> None:
    class Machine(EngineMachine):
        seen: ClassVar[Counter[str]] = Counter()

    chosen = settings(
        max_examples=max(500, settings().max_examples),
        stateful_step_count=25,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(Machine, settings=chosen)
    print(dict(Machine.seen))
    assert [what for what in MUST_HAPPEN if Machine.seen[what] == 0] == []
