"""The main job in one breath: read, drop, plan, generate. Run before every commit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from pyruntime import LLM, SamplingParams
from pyruntime.spec import DropPlan
from tests.helpers import hf_logits, without


def test_greedy_text_of_a_pruned_model_is_the_uncached_forwards(make_llama: Callable[..., tuple[Path, Any]]) -> None:
    folder, hf_model = make_llama()
    llm = LLM(folder, drop_attn="0,2", drop_mlp=[3], skip_tokenizer_init=True)
    params = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
    (output,) = llm.generate([5, 4, 3], params, use_tqdm=False)
    oracle = without(hf_model, DropPlan(attention=(0, 2), mlp=(3,)))
    tokens = [5, 4, 3]
    for token in output.outputs[0].token_ids:
        assert token == int(hf_logits(oracle, tokens)[-1].argmax())
        tokens.append(token)
    assert len(tokens) == 23
