"""Token losses against transformers' uncached forward, and the sliding window against the guide's own loop."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyruntime.errors import UsageError
from pyruntime.plan import Plan
from pyruntime.plan.likelihood import Window, logit_rows, negative_log_likelihood, strided_windows, token_losses
from tests.helpers import TARGETS, hf_logits, make_plan

MakeLlama = Callable[..., tuple[Path, Any]]


def text(length: int, seed: int = 0) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(61) for _ in range(length)]


def losses(hf_model: Any, window: Window) -> torch.Tensor:
    """Losses of the predicted tokens of a window, in float64 from transformers' logits."""
    rows = hf_logits(hf_model, window.token_ids).double()[window.first - 1 : -1]
    targets = torch.tensor(list(window.token_ids[window.first :]))
    return torch.nn.functional.cross_entropy(rows, targets, reduction="none")


@pytest.mark.parametrize("target", TARGETS)
def test_losses_equal_transformers_for_any_mixture_of_windows(make_llama: MakeLlama, target: str) -> None:
    folder, hf_model = make_llama(max_position_embeddings=1024)
    start = text(300, 9)
    windows = [
        Window(text(5, 1)),
        Window(text(200, 2), 150),
        Window(text(3, 3), 2),
        Window(text(700, 4), 300),
        Window([7]),
        # beginnings in common: all but the end, less than is worth it, more than the other has, with rows asked for
        Window([*start, 1, 2, 3], 300),
        Window([*start, 4, 5], 300),
        Window([*start[:290], 4, 5], 290),
        Window([*start[:10], 4, 5], 10),
        Window(start, 250),
        Window([*start, 1], 100),
        Window([*start, 1], 300),
        Window([*start, 1], 301),
        Window([*start, 2], 300),
        Window(text(40, 5), 39),
    ]
    told: list[int] = []
    found = token_losses(make_plan(folder, target=target), windows, told.append)
    assert told == [len(window.token_ids) for window in windows]
    for window, own in zip(windows, found, strict=True):
        assert len(own) == window.num_predicted
        if window.num_predicted:
            assert torch.allclose(own, losses(hf_model, window), atol=2e-4), window.first


def rows_computed(plan: Plan, windows: Sequence[Window], monkeypatch: pytest.MonkeyPatch) -> int:
    """Rows of the steps that the plan runs for the windows."""
    count = 0
    honest = Plan.run

    def counted(self: Plan, step: Any, watch: Any = None) -> torch.Tensor:
        nonlocal count
        count += sum(len(each.token_ids) for each in step.slices)
        return honest(self, step, watch)

    with monkeypatch.context() as patch:
        patch.setattr(Plan, "run", counted)
        list(logit_rows(plan, windows))
    return count


def test_a_common_beginning_is_computed_once(make_llama: MakeLlama, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = make_plan(make_llama(max_position_embeddings=1024)[0])
    start = text(100)
    windows = [Window([*start, i, i + 1, i + 2], 100) for i in range(4)]
    # the row of the last common token predicts the first own one, and the last token is not read
    assert rows_computed(plan, windows, monkeypatch) == 102 + 3 * 3
    assert rows_computed(plan, [Window(text(100, seed), 98) for seed in range(4)], monkeypatch) == 4 * 99


def test_the_sum_is_that_of_the_losses(make_llama: MakeLlama) -> None:
    folder, hf_model = make_llama()
    sequences = [text(30, 1), text(1, 2), text(20, 3)]
    expected = sum(float(losses(hf_model, Window(each)).sum()) for each in sequences if len(each) > 1)
    found = negative_log_likelihood(make_plan(folder), sequences)
    assert found == (pytest.approx(expected, rel=1e-5), 29 + 19)


def guide(num_tokens: int, length: int, stride: int) -> list[tuple[int, int, int]]:
    """(begin, end, number of labels) of each window, by the loop of the Hugging Face guide on perplexity."""
    found, previous = [], 0
    for begin in range(0, num_tokens, stride):
        end = min(begin + length, num_tokens)
        # the first token of a text has nothing before it
        found.append((begin, end, end - previous - (1 if begin == 0 else 0)))
        previous = end
        if end == num_tokens:
            break
    return found


@given(num_tokens=st.integers(0, 80), length=st.integers(2, 20), data=st.data())
@settings(max_examples=200, deadline=None)
def test_strided_windows_are_those_of_the_guide(num_tokens: int, length: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, length - 1))
    ids = list(range(1000, 1000 + num_tokens))
    found = strided_windows(ids, length, stride)
    assert [(window.token_ids, window.num_predicted) for window in found] == [
        (ids[begin:end], count) for begin, end, count in guide(num_tokens, length, stride)
    ]


@given(num_tokens=st.integers(0, 80), length=st.integers(2, 20), data=st.data())
@settings(max_examples=200, deadline=None)
def test_behind_an_opening_token_every_token_is_predicted_once(
    num_tokens: int, length: int, data: st.DataObject
) -> None:
    stride = data.draw(st.integers(1, length - 1))
    ids = list(range(1000, 1000 + num_tokens))
    found = strided_windows(ids, length, stride, bos=7)
    assert [token for window in found for token in window.token_ids[window.first :]] == ids
    assert all(window.token_ids[0] == 7 and len(window.token_ids) <= length for window in found)
    assert all(window.first >= length - stride for window in found[1:])


@pytest.mark.parametrize("stride", [0, -1, 8, 9])
def test_a_stride_that_would_leave_tokens_without_context_is_refused(stride: int) -> None:
    with pytest.raises(UsageError, match=rf"stride is {stride}; expected 1 to 7"):
        strided_windows([1, 2, 3], 8, stride)
