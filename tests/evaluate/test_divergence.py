"""Divergence against the formula on transformers' float32 logits, and the cache of reference logits."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from pyruntime.errors import CheckpointError, RunError, UsageError
from pyruntime.evaluate import LogitsCache, divergence
from pyruntime.evaluate import reference as reference_module
from pyruntime.plan import Plan
from pyruntime.plan.likelihood import LogitRows, Window, logit_rows
from pyruntime.spec import DropPlan
from tests.helpers import hf_logits, make_plan, without

MakeLlama = Callable[..., tuple[Path, Any]]
PRUNED = DropPlan(attention=(1,), mlp=(2,))


def windows(*lengths: int) -> list[Window]:
    draw = random.Random(0)
    return [Window([draw.randrange(61) for _ in range(length)], min(3, max(1, length - 1))) for length in lengths]


def test_every_figure_equals_the_formula_on_transformers_logits(make_llama: MakeLlama) -> None:
    folder, hf_model = make_llama(max_position_embeddings=1024)
    texts = windows(40, 2, 1, 300, 64)
    found = divergence(logit_rows(make_plan(folder), texts), make_plan(folder, PRUNED), texts, range(len(texts)))
    kl, same, losses = [], [], []
    for window in texts:
        if window.num_predicted:
            p, q = (
                hf_logits(model, window.token_ids).double()[window.first - 1 : -1]
                for model in (hf_model, without(hf_model, PRUNED))
            )
            kl += torch.nn.functional.kl_div(q.log_softmax(-1), p.softmax(-1), reduction="none").sum(-1).tolist()
            same += (p.argmax(-1) == q.argmax(-1)).tolist()
            targets = torch.tensor(list(window.token_ids[window.first :]))
            losses += torch.nn.functional.cross_entropy(q, targets, reduction="none").tolist()
    figures = found.to_json()
    count = len(kl)
    ordered = sorted(kl)
    assert figures["num_tokens"] == count
    assert figures["kl_mean"] == pytest.approx(sum(kl) / count, rel=1e-3)
    assert figures["kl_median"] == pytest.approx(ordered[(count - 1) // 2], rel=1e-3)
    assert figures["kl_p99"] == pytest.approx(ordered[math.ceil(0.99 * count) - 1], rel=1e-3)
    assert figures["kl_max"] == pytest.approx(ordered[-1], rel=1e-3)
    assert figures["top1_agreement"] == pytest.approx(sum(same) / count)
    assert torch.cat(found.losses).tolist() == pytest.approx(losses, abs=2e-4)


def test_a_model_does_not_differ_from_itself(make_llama: MakeLlama) -> None:
    folder, _ = make_llama()
    texts = windows(40, 30)
    plan = make_plan(folder)
    figures = divergence(logit_rows(plan, texts), make_plan(folder), texts, range(2)).to_json()
    assert (figures["kl_max"], figures["top1_agreement"]) == (0.0, 1.0)


def test_the_noise_floor_of_half_precision_lies_between_nothing_and_dropping(make_llama: MakeLlama) -> None:
    folder, _ = make_llama()
    texts = windows(60, 50)
    floor, pruned = (
        divergence(logit_rows(make_plan(folder), texts), plan, texts, range(2)).to_json()["kl_mean"]
        for plan in (make_plan(folder, dtype="bfloat16"), make_plan(folder, PRUNED))
    )
    assert 0 < floor < pruned / 10


def test_rows_of_another_text_are_refused(make_llama: MakeLlama) -> None:
    plan = make_plan(make_llama()[0])
    with pytest.raises(UsageError, match="expected the same text and vocabulary"):
        divergence(logit_rows(plan, windows(20, 30)), plan, windows(30, 20), range(2))


def test_logits_that_are_no_numbers_are_an_error(make_llama: MakeLlama) -> None:
    plan = make_plan(make_llama()[0])

    def broken() -> Iterator[LogitRows]:
        for rows in logit_rows(plan, windows(20)):
            yield rows._replace(logits=rows.logits * torch.inf)

    with pytest.raises(RunError, match="not finite"):
        divergence(broken(), plan, windows(20), range(1))


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference_module, "_SHARD_BYTES", 20_000)


def taken(cache: LogitsCache, plan: Plan | None) -> list[LogitRows]:
    return [rows._replace(logits=rows.logits.clone()) for rows in cache.rows(plan)]


@pytest.mark.usefixtures("small_shards")
def test_the_cache_gives_back_every_bit_without_the_plan(make_llama: MakeLlama, tmp_path: Path) -> None:
    plan, texts = make_plan(make_llama()[0]), windows(60, 5, 1, 60, 60)
    cache = LogitsCache(tmp_path, {"model_sha256": "a"}, texts)
    first = taken(cache, plan)
    assert cache.is_complete
    assert len(list(tmp_path.glob("*/logits-*.safetensors"))) > 1
    again = taken(LogitsCache(tmp_path, {"model_sha256": "a"}, texts), None)
    assert [each[:2] for each in again] == [each[:2] for each in first]
    assert all(torch.equal(a.logits, b.logits) for a, b in zip(first, again, strict=True))


@pytest.mark.usefixtures("small_shards")
def test_a_cache_that_was_not_finished_is_written_anew(make_llama: MakeLlama, tmp_path: Path) -> None:
    plan, texts = make_plan(make_llama()[0]), windows(60, 60, 60, 60, 60, 60, 60, 60, 60)
    cache = LogitsCache(tmp_path, {"model_sha256": "a"}, texts)
    rows = cache.rows(plan)
    for _ in range(7):
        next(rows)
    rows.close()
    assert list(tmp_path.glob("*/logits-*.safetensors"))
    assert not cache.is_complete
    assert len(taken(cache, plan)) == 9
    assert cache.is_complete


def test_another_model_text_or_setting_has_a_cache_of_its_own(make_llama: MakeLlama, tmp_path: Path) -> None:
    plan = make_plan(make_llama()[0])
    taken(LogitsCache(tmp_path, {"model_sha256": "a"}, windows(20)), plan)
    assert LogitsCache(tmp_path, {"model_sha256": "a"}, windows(20)).is_complete
    for key, texts in (({"model_sha256": "b"}, windows(20)), ({"model_sha256": "a"}, windows(21))):
        assert not LogitsCache(tmp_path, key, texts).is_complete


@pytest.mark.parametrize("harm", ["cut", "gone", "flipped", "version", "order", "list", "text", "nothing"])
def test_a_cache_that_was_changed_is_refused(make_llama: MakeLlama, tmp_path: Path, harm: str) -> None:
    plan, texts = make_plan(make_llama()[0]), windows(20)
    cache = LogitsCache(tmp_path, {}, texts)
    taken(cache, plan)
    (shard,), (index,) = tmp_path.glob("*/*.safetensors"), tmp_path.glob("*/index.json")
    data, about = shard.read_bytes(), json.loads(index.read_text())
    match harm:
        case "cut":
            shard.write_bytes(data[:-9])
        case "gone":
            shard.unlink()
        case "flipped":
            # a logit
            shard.write_bytes(data[:-2] + bytes([data[-2] ^ 1]) + data[-1:])
        case "version":
            index.write_text(json.dumps(about | {"version": 1}))
        case "order":
            about["shards"][0]["rows"][0] = [0, 2]
            index.write_text(json.dumps(about))
        case "list":
            index.write_text(json.dumps(about | {"shards": 3}))
        case "text":
            index.write_text("{")
        case "nothing":
            del about["shards"]
            index.write_text(json.dumps(about))
    with pytest.raises(CheckpointError, match="remove") as caught:
        taken(cache, None)
    assert caught.value.code == "CACHE"
