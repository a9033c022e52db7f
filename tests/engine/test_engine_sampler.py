"""Which sampler the engine takes, and that the choice of it changes no output."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pyruntime.engine.engine import Engine
from pyruntime.engine.params import SamplingParams
from pyruntime.graph import build, fuse
from pyruntime.ops import sample
from pyruntime.plan import Plan, lower
from pyruntime.spec import DropPlan
from tests.generation import Requests, run_all, small_engine
from tests.helpers import pruned_model

MakeLlama = Callable[..., tuple[Path, Any]]

PARAMS = {
    "greedy": SamplingParams(temperature=0.0, max_tokens=8),
    "early end": SamplingParams(temperature=0.0, max_tokens=8, min_tokens=4, stop_token_ids=list(range(40))),
    "random": SamplingParams(temperature=1.5, max_tokens=8, seed=3),
    "filters": SamplingParams(temperature=2.0, max_tokens=8, seed=4, top_k=20, top_p=0.9, min_p=0.01),
    "penalties": SamplingParams(
        temperature=1.0, max_tokens=8, seed=5, repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.2
    ),
    "masks": SamplingParams(
        temperature=1.0, max_tokens=8, seed=6, allowed_token_ids=[3, 4, 5, 60], logit_bias={4: 2.5}, n=2
    ),
    "logprobs": SamplingParams(temperature=1.0, max_tokens=8, seed=7, logprobs=5, prompt_logprobs=3),
}
REQUESTS: Requests = {name: ([5, 9, 33, 12, 1][: 2 + i % 4], params) for i, (name, params) in enumerate(PARAMS.items())}


def engine_on(folder: Path, target: str) -> Engine:
    model = pruned_model(folder, DropPlan())
    plan: Plan = lower(fuse(build(model.spec)), model, target=target, dtype="float32")
    return small_engine(plan, page_size=16, seed=2)


def test_target_cpu_samples_in_cpp_and_outputs_stay_the_same(
    make_llama: MakeLlama, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = make_llama()
    in_python = engine_on(folder, "cpu")
    monkeypatch.setattr(in_python, "_native", None)
    expected = run_all(in_python, REQUESTS)

    def refuse(*arguments: Any) -> None:
        raise AssertionError("the reference was asked")

    in_cpp, elsewhere = engine_on(folder, "cpu"), engine_on(folder, "reference")
    monkeypatch.setattr(sample, "reference", refuse)
    monkeypatch.setattr(sample, "token_logprobs", refuse)
    found = run_all(in_cpp, REQUESTS)
    for name in PARAMS:
        for ours, theirs in zip(found[name].outputs, expected[name].outputs, strict=True):
            assert (ours.token_ids, ours.finish_reason) == (theirs.token_ids, theirs.finish_reason)
    for ours, theirs in zip(
        [*(found["logprobs"].prompt_logprobs or ())[1:], *(found["logprobs"].outputs[0].logprobs or ())],
        [*(expected["logprobs"].prompt_logprobs or ())[1:], *(expected["logprobs"].outputs[0].logprobs or ())],
        strict=True,
    ):
        assert ours is not None and theirs is not None
        assert {i: each.rank for i, each in ours.items()} == {i: each.rank for i, each in theirs.items()}
        assert [e.logprob for e in ours.values()] == pytest.approx([e.logprob for e in theirs.values()], abs=1e-5)
    with pytest.raises(AssertionError, match="the reference was asked"):
        run_all(elsewhere, REQUESTS)
