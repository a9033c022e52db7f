"""The long-context probes: their sequences, their figures by hand, and a model that is known to copy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pyruntime.errors import UsageError
from pyruntime.evaluate import Window, copy_losses, copy_probe, losses_by_position
from pyruntime.evaluate import long_context as module
from tests.helpers import hf_logits, make_plan

MakeLlama = Callable[..., tuple[Path, Any]]


def test_losses_are_sorted_into_buckets_by_what_stands_before() -> None:
    windows = [Window(range(6)), Window(range(9), 4), Window([1])]
    losses = [torch.tensor([1.0, 2, 3, 4, 5]), torch.tensor([10.0, 20, 30, 40, 50]), torch.empty(0)]
    found = [(each.begin, each.end, each.num_tokens, each.loss.mean) for each in losses_by_position(windows, losses)]
    # positions 1 to 5, and 4 to 8
    assert found == [
        (1, 2, 1, 1.0),
        (2, 4, 2, 2.5),
        (4, 8, 6, pytest.approx((4 + 5 + 10 + 20 + 30 + 40) / 6)),
        (8, 9, 1, 50.0),
    ]


@pytest.mark.parametrize("bos", [None, 3])
def test_a_passage_comes_twice_at_each_distance(bos: int | None) -> None:
    probe = copy_probe(50, 300, bos=bos, avoid={0, 1, 2, 3}, repeats=2)
    head = [] if bos is None else [bos]
    assert probe.distances == (16, 64, 256, 300 - 16 - len(head))
    assert len(probe.windows) == 4 * 2 * 2
    for number, distance in enumerate(probe.distances):
        for short, whole in zip(*[iter(probe.windows[4 * number : 4 * number + 4])] * 2, strict=True):
            body = list(whole.token_ids[len(head) :])
            assert list(whole.token_ids) == head + body
            assert len(body) == distance + 16
            assert body[distance:] == body[:16] == list(short.token_ids[len(head) :])
            # the first token of the copy cannot be known
            assert (short.num_predicted, whole.num_predicted) == (15, 15)
            assert set(body) <= set(range(4, 50))
    assert copy_probe(50, 300, bos=bos, seed=1).windows != copy_probe(50, 300, bos=bos, seed=2).windows


def test_a_context_that_holds_no_copy_is_refused() -> None:
    with pytest.raises(UsageError, match="31 tokens is too short"):
        copy_probe(50, 31, bos=None)
    assert copy_probe(50, 32, bos=None).distances == (16,)


def test_a_vocabulary_of_special_tokens_alone_is_refused() -> None:
    with pytest.raises(UsageError, match="each of the 50 tokens is special") as caught:
        copy_probe(50, 100, bos=None, avoid=list(range(60)))
    assert caught.value.code == "PROBE"


def test_special_tokens_are_looked_up_once() -> None:
    class Counted(list[int]):
        """A list that says how often it was walked through."""

        walks = 0

        def __iter__(self) -> Iterator[int]:
            self.walks += 1
            return super().__iter__()

    avoid = Counted([1, 2])
    copy_probe(1000, 100, bos=None, avoid=avoid)
    assert avoid.walks == 1


def test_losses_equal_transformers(make_llama: MakeLlama) -> None:
    folder, hf_model = make_llama(max_position_embeddings=1024)
    probe = copy_probe(61, 100, bos=None, repeats=3)
    found = copy_losses(make_plan(folder), probe)
    for number, each in enumerate(found):
        own = probe.windows[6 * number : 6 * number + 6]
        losses = []
        for window in own:
            rows = hf_logits(hf_model, window.token_ids)[-16:-1].double()
            losses.append(float(torch.nn.functional.cross_entropy(rows, torch.tensor(list(window.token_ids[-15:])))))
        assert each.first.mean == pytest.approx(sum(losses[::2]) / 3, rel=1e-4)
        assert each.second.mean == pytest.approx(sum(losses[1::2]) / 3, rel=1e-4)
        assert each.gain.mean == pytest.approx(each.first.mean - each.second.mean)


def test_a_model_that_copies_gains_and_one_that_cannot_see_so_far_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    probe = copy_probe(50, 300, bos=None, repeats=2)

    def loss(ids: list[int], i: int) -> float:
        pair = ids[i - 1 : i + 1]
        return 1.0 if any(ids[k - 1 : k + 1] == pair for k in range(max(1, i - 100), i)) else 4.0

    def copying(plan: Any, windows: Any, progress: Any) -> list[torch.Tensor]:
        """Each token that followed its predecessor within the last hundred costs 1 nat, any other 4."""
        return [
            torch.tensor([loss(list(window.token_ids), i) for i in range(window.first, len(window.token_ids))])
            for window in windows
        ]

    monkeypatch.setattr(module, "token_losses", copying)
    plan: Any = None
    near, _, far, furthest = copy_losses(plan, probe)
    assert near.gain.mean > 2.5
    assert abs(far.gain.mean) < 0.5
    assert abs(furthest.gain.mean) < 0.5
