"""The offline API on target cuda: tokens as transformers chooses them, and as the other targets draw them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pyruntime import LLM, SamplingParams
from pyruntime.spec import DropPlan
from tests.generation import greedy
from tests.helpers import without

TextModel = tuple[Path, Any]
PROMPTS = [[5, 0, 36, 11, 2], [30, 7, 19]]


@pytest.fixture(scope="module")
def llm(text_model: TextModel) -> LLM:
    """The tiny model without the attentions of layers 0 and 2."""
    return LLM(text_model[0], drop_attn=[0, 2], target="cuda", dtype="float32", max_num_seqs=4, max_model_len=32)


def ids(llm: LLM, params: SamplingParams | list[SamplingParams]) -> list[list[int]]:
    """New tokens of both prompts."""
    outputs = llm.generate([{"prompt_token_ids": p} for p in PROMPTS], params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def test_greedy_tokens_equal_transformers(llm: LLM, text_model: TextModel) -> None:
    oracle = without(text_model[1], DropPlan(attention=(0, 2))).double()
    expected = [greedy(oracle, prompt, 4) for prompt in PROMPTS]
    assert ids(llm, SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)) == expected


def test_a_seed_draws_the_tokens_that_other_targets_draw(llm: LLM, text_model: TextModel) -> None:
    drawn = SamplingParams(temperature=1.3, top_k=40, top_p=0.95, min_p=0.01, seed=7, max_tokens=4, ignore_eos=True)
    cpu = LLM(text_model[0], drop_attn=[0, 2], target="cpu", device="cpu", dtype="float32", max_model_len=32)
    assert ids(llm, drawn) == ids(cpu, drawn)


def test_requests_that_the_device_cannot_sample_run_beside_those_it_can(llm: LLM, text_model: TextModel) -> None:
    penalised = SamplingParams(temperature=0.0, repetition_penalty=1.5, logprobs=2, max_tokens=3, ignore_eos=True)
    plain = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
    cpu = LLM(text_model[0], drop_attn=[0, 2], target="cpu", device="cpu", dtype="float32", max_model_len=32)
    assert ids(llm, [penalised, plain]) == ids(cpu, [penalised, plain])
