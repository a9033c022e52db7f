"""Perplexity against the cross entropy of transformers' uncached forward."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyruntime.errors import RunError, UsageError
from pyruntime.evaluate import Perplexity, perplexity, windows
from pyruntime.spec import DropPlan
from tests.helpers import hf_logits, make_plan, without

MakeLlama = Callable[..., tuple[Path, Any]]

PATTERNS = {
    "dense": DropPlan(),
    "first attention": DropPlan(attention=(0,)),
    "all attentions": DropPlan(attention=(0, 1, 2, 3)),
    "blocks and an mlp": DropPlan(attention=(1, 3), mlp=(1, 2, 3)),
}


def text(length: int, seed: int = 0) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(61) for _ in range(length)]


def cross_entropy(hf_model: Any, sequence: list[int]) -> float:
    """Sum over the tokens behind the first, in nats."""
    logits = hf_logits(hf_model, sequence)[:-1].double()
    return float(torch.nn.functional.cross_entropy(logits, torch.tensor(sequence[1:]), reduction="sum"))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_one_text_equals_transformers_whatever_its_length(make_llama: MakeLlama, pattern: str) -> None:
    folder, hf_model = make_llama(max_position_embeddings=1024)
    plan, oracle = make_plan(folder, PATTERNS[pattern]), without(hf_model, PATTERNS[pattern])
    # around the chunk of 256 logits and the page of 64 tokens
    for length in (2, 63, 64, 65, 255, 256, 257, 258, 600):
        sequence = text(length, length)
        found = perplexity(plan, [sequence])
        assert found.num_tokens == length - 1
        expected = cross_entropy(oracle, sequence)
        assert found.nll == pytest.approx(expected, rel=1e-5), length
        assert found.value == pytest.approx(math.exp(expected / (length - 1)), rel=1e-4)


def test_texts_do_not_see_each_other(make_llama: MakeLlama) -> None:
    folder, hf_model = make_llama(max_position_embeddings=1024)
    # the second and third reuse the pages of the longer first
    sequences = [text(300, 1), text(40, 2), text(1, 3), text(270, 4)]
    told: list[int] = []
    found = perplexity(make_plan(folder), sequences, told.append)
    expected = sum(cross_entropy(hf_model, sequence) for sequence in sequences if len(sequence) > 1)
    assert found.nll == pytest.approx(expected, rel=1e-5)
    assert found.num_tokens == 299 + 39 + 269
    assert told == [300, 40, 1, 270]


def test_bits_per_byte_are_the_same_sum_in_another_unit() -> None:
    assert Perplexity(nll=10 * math.log(2), num_tokens=5).bits_per_byte(20) == pytest.approx(0.5)
    assert Perplexity(nll=10 * math.log(2), num_tokens=5).value == pytest.approx(4.0)


@pytest.mark.parametrize("sequences", [[], [[]], [[5]], [[5], [6], []]])
def test_a_text_without_anything_to_predict_is_refused(make_llama: MakeLlama, sequences: list[list[int]]) -> None:
    with pytest.raises(UsageError, match="expected at least two tokens"):
        perplexity(make_plan(make_llama()[0]), sequences)


@pytest.mark.parametrize("bad", [61, -1, 1 << 40])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_ids_outside_the_vocabulary_are_refused(make_llama: MakeLlama, bad: int, place: int) -> None:
    sequence = [1, 2, 3]
    sequence[place] = bad
    with pytest.raises(UsageError, match=rf"{bad}.*0 to 60"):
        perplexity(make_plan(make_llama()[0]), [[1, 2], sequence])


def test_logits_that_are_no_numbers_are_an_error(make_llama: MakeLlama) -> None:
    plan = make_plan(make_llama()[0])
    embedding = plan.steps[0].weights["weight"]
    kept = embedding[7].clone()
    embedding[7] = torch.nan
    try:
        assert math.isfinite(perplexity(plan, [[1, 2, 3]]).value)
        with pytest.raises(RunError, match="not finite"):
            perplexity(plan, [[1, 2, 3], [1, 7, 2]])
    finally:
        embedding[7] = kept


@given(
    ids=st.lists(st.integers(0, 60), max_size=60),
    length=st.integers(1, 12),
    bos=st.one_of(st.none(), st.integers(100, 101)),
)
@settings(max_examples=100, deadline=None)
def test_windows_hold_every_token_once_in_order(ids: list[int], length: int, bos: int | None) -> None:
    size = length - (bos is not None)
    if size < 1:
        with pytest.raises(UsageError, match="expected at least 2"):
            windows(ids, length, bos)
        return
    found = windows(ids, length, bos)
    heads = 0 if bos is None else 1
    assert all(window[:heads] == [bos] * heads for window in found)
    assert [token for window in found for token in window[heads:]] == ids
    # only the last one may be shorter
    assert all(len(window) == length for window in found[:-1])
    assert all(heads < len(window) <= length for window in found)


def test_a_text_longer_than_the_context_is_refused(make_llama: MakeLlama) -> None:
    folder, hf_model = make_llama()
    plan, sequence = make_plan(folder), text(65)
    # 64 tokens are read, and the last one is only predicted
    with torch.no_grad():
        rows = hf_model(torch.tensor([sequence[:64]])).logits[0].double()
    expected = float(torch.nn.functional.cross_entropy(rows, torch.tensor(sequence[1:]), reduction="sum"))
    assert perplexity(plan, [sequence]).nll == pytest.approx(expected, rel=1e-5)
    with pytest.raises(UsageError, match=r"66 tokens.*64 and predicts one more"):
        perplexity(plan, [[1] * 66])
