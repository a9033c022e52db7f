"""Scoring as work: it is taken up where it was killed, holds one layer at a time, and refuses what is no number."""

from __future__ import annotations

import gc
import json
import sys
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pyruntime.checkpoint import InMemory, Model, Weight, atomic, read_model
from pyruntime.errors import RunError, UsageError
from pyruntime.graph import build, fuse
from pyruntime.passes import drop
from pyruntime.plan import lower
from pyruntime.plan.likelihood import negative_log_likelihood
from pyruntime.prune import Calibration, ScoreOptions, Scores, forget, model_identity, score
from pyruntime.spec import DropPlan
from tests.specs import ATTENTION, PLAIN_MLP, model_of, random_model

Make = Callable[..., tuple[Path, Any]]
SEQUENCES = [[(5 * i * i + i + n) % 37 for i in range(8 + 3 * n)] for n in range(7)]
SPEC = model_of([(ATTENTION, PLAIN_MLP, False)] * 4)
ALL = ("cosine", "angular", "magnitude", "perplexity")


class Killed(BaseException):
    """What no code catches."""


def calibration(sequences: list[list[int]] = SEQUENCES) -> Calibration:
    return Calibration(sequences=tuple(map(tuple, sequences)), source="test")


@pytest.fixture
def model() -> Model:
    return random_model(SPEC, torch.float32)


def options(**changes: Any) -> ScoreOptions:
    return ScoreOptions(**{"target": "reference", "save_every": 1, **changes})


@pytest.mark.parametrize(
    "how",
    [options(metrics=ALL), options(save_every=3), options(layer_by_layer=True, runs=(1, 2), state_bytes=0)],
    ids=["every metric", "now and then", "layer by layer"],
)
def test_scores_are_the_same_after_a_kill_at_each_save(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: ScoreOptions
) -> None:
    expected = score(model, calibration(), how)
    partial = tmp_path / "scores.json.partial"
    # the package's name for it is the function
    module = sys.modules["pyruntime.prune.score"]
    honest = atomic.write_text
    kills = 0

    def killing(path: Path, text: str) -> None:
        honest(path, text)
        raise Killed

    monkeypatch.setattr(module, "write_text", killing)
    while True:
        try:
            found = score(model, calibration(), how, partial=partial)
            break
        except Killed:
            kills += 1
            assert kills < 100
    assert found == expected
    # 7 sequences, then 12 sublayers and nothing dropped
    assert kills == {1: 7, 3: 2}[how.save_every] + 13 * ("perplexity" in how.metrics)
    forget(partial)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("after", [0.2, 0.5, 0.9])
def test_scores_are_the_same_after_a_kill_in_between(model: Model, tmp_path: Path, after: float) -> None:
    expected = score(model, calibration(), options(save_every=2))
    partial = tmp_path / "partial"

    def die(done: int, total: int) -> None:
        if done / total > after:
            raise Killed

    with pytest.raises(Killed):
        score(model, calibration(), options(save_every=2), partial=partial, progress=die)
    assert score(model, calibration(), options(save_every=2), partial=partial) == expected


CHANGES: dict[str, Callable[[dict[str, Any]], object]] = {
    "fewer than no sequences": lambda data: data["statistics"].update(num_seqs=-2),
    "more sequences than there are": lambda data: data["statistics"].update(num_seqs=8),
    "another number of tokens": lambda data: data["statistics"].update(num_tokens=1),
    "a number that is text": lambda data: data["statistics"].update(num_seqs="7"),
    "a sum that is none": lambda data: data["statistics"]["sums"]["attention cosine"].__setitem__(1, "nan"),
    "an infinite sum": lambda data: data["statistics"]["sums"]["attention cosine"].__setitem__(1, "inf"),
    "a loss that is none": lambda data: data["losses"].update({"attention 1": "nan"}),
    "a loss of nothing known": lambda data: data["losses"].update({"attention 9": "0x1p0"}),
    "another target": lambda data: data.update(target="auto"),
    "losses and no sums": lambda data: data.update(losses={"dense": "0x1p0"}, statistics={}),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_partial_file_that_was_changed_is_not_used(
    model: Model, tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    how = options(metrics=("cosine", "perplexity"), kinds=("attention",))
    partial = tmp_path / "partial"
    expected = score(model, calibration(), how, partial=partial)
    data = json.loads(partial.read_text())
    CHANGES[name](data)
    partial.write_text(json.dumps(data))
    assert score(model, calibration(), how, partial=partial) == expected
    assert "is not used" in caplog.text


def test_scores_say_which_target_measured_them(model: Model, tmp_path: Path) -> None:
    how = options(metrics=("perplexity",), kinds=("attention",), target="auto")
    lowered = lower(fuse(build(SPEC)), model, target="auto")
    partial = tmp_path / "partial"
    assert score(model, calibration(), how, partial=partial).target == lowered.target != "auto"
    # nothing is left to measure
    assert score(model, calibration(), how, partial=partial).target == lowered.target


@pytest.mark.parametrize("what", ["text", "options", "model", "broken", "no JSON", "other layers"])
def test_a_partial_file_of_other_work_is_not_used(
    model: Model, tmp_path: Path, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    expected = score(model, calibration(), options())
    partial = tmp_path / "partial"
    other = {
        "text": lambda: score(model, calibration(SEQUENCES[1:]), options(), partial=partial),
        "options": lambda: score(model, calibration(), options(dtype="bfloat16"), partial=partial),
        "model": lambda: score(drop(model, DropPlan(mlp=(1,))), calibration(), options(), partial=partial),
    }
    other.get(what, lambda: score(model, calibration(), options(), partial=partial))()
    if what == "broken":
        partial.write_text(json.dumps({**json.loads(partial.read_text()), "statistics": {}}))
    elif what == "no JSON":
        partial.write_text("{")
    elif what == "other layers":
        data = json.loads(partial.read_text())
        data["statistics"]["sums"]["attention cosine"] = ["0x0p0"]
        partial.write_text(json.dumps(data))
    assert score(model, calibration(), options(), partial=partial) == expected
    assert "is not used" in caplog.text


def test_a_whole_partial_file_needs_no_pass(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    partial = tmp_path / "partial"
    told: list[int] = []
    score(model, calibration(), options(), partial=partial)
    score(model, calibration(), options(), partial=partial, progress=lambda done, total: told.append(done))
    assert told == [sum(map(len, SEQUENCES))]


def test_progress_ends_at_its_total(model: Model) -> None:
    told: list[tuple[int, int]] = []
    score(model, calibration(), options(metrics=ALL), progress=lambda done, total: told.append((done, total)))
    tokens = sum(map(len, SEQUENCES))
    assert told[-1] == (14 * tokens, 14 * tokens)
    assert [done for done, _ in told] == sorted(done for done, _ in told)


def test_perplexity_scores_are_what_a_drop_costs(model: Model) -> None:
    found = score(model, calibration(), options(metrics=("perplexity",)))

    def loss(plan: DropPlan) -> float:
        left = drop(model, plan)
        nll, count = negative_log_likelihood(lower(fuse(build(left.spec)), left), SEQUENCES)
        return nll / count

    dense = loss(DropPlan())
    assert found.dense_nll == pytest.approx(dense, rel=1e-12)
    plans = {
        "attention": lambda i: DropPlan(attention=(i,)),
        "mlp": lambda i: DropPlan(mlp=(i,)),
        "block": lambda i: DropPlan(attention=(i,), mlp=(i,)),
    }
    for kind, plan in plans.items():
        expected = [loss(plan(i)) - dense for i in range(4)]
        assert found.of("perplexity", kind) == pytest.approx(expected, rel=1e-9, abs=1e-12)


# numbers that are none


@pytest.mark.parametrize("by_layer", [False, True], ids=["whole", "layer by layer"])
@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("layers.2.attention.o.weight", "layer 2 attention"),
        ("layers.2.mlp.down.weight", "layer 2 mlp"),
        ("layers.3.attention.pre.weight", "layer 3 attention"),
        ("embedding.weight", "layer 0 attention"),
    ],
)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_score_that_is_no_number_names_its_layer(
    model: Model, name: str, named: str, bad: float, by_layer: bool
) -> None:
    tensor = model.weights[name].read().clone()
    tensor.view(-1)[5::7] = bad
    broken = replace(model, weights={**model.weights, name: InMemory(tensor)})
    with pytest.raises(RunError, match=named) as caught:
        score(broken, calibration(), options(layer_by_layer=by_layer))
    assert (caught.value.code, caught.value.exit_code) == ("NUMERICS", 4)


def test_a_stream_of_zeros_has_a_score(model: Model) -> None:
    """A padding token's row may be zero: it has no direction, and is no reason to stop."""
    table = model.weights["embedding.weight"].read().clone()
    table[1] = 0
    found = score(
        replace(model, weights={**model.weights, "embedding.weight": InMemory(table)}), calibration(), options()
    )
    assert all(0 <= value <= 2 for value in found.of("cosine", "attention") if value is not None)


# memory


@dataclass(frozen=True, eq=False)
class Watched:
    """A weight whose tensors are counted as long as they live."""

    inner: Weight
    live: dict[str, int]
    name: str

    @property
    def shape(self) -> tuple[int, ...]:
        return self.inner.shape

    @property
    def num_bytes(self) -> int:
        return self.inner.num_bytes

    def refs(self) -> Iterator[Weight]:
        yield from self.inner.refs()

    def read(self) -> torch.Tensor:
        tensor = self.inner.read().clone()
        self.live[self.name] = self.live.get(self.name, 0) + 1
        weakref.finalize(tensor, self._dead)
        return tensor

    def _dead(self) -> None:
        self.live[self.name] -= 1


def most_layers(model: Model, how: ScoreOptions) -> int:
    """The largest number of layers, the embedding among them, whose weights were alive at once."""
    live: dict[str, int] = {}
    watched = {name: Watched(weight, live, name) for name, weight in model.weights.items()}
    most = 0

    def look(*_: Any) -> None:
        nonlocal most
        # what is frozen is not looked at, which makes this fast
        gc.collect()
        owners = {name.split(".")[1] if name.startswith("layers.") else "0 rest" for name, n in live.items() if n > 0}
        most = max(most, len(owners))

    class Looking(Watched):
        def read(self) -> torch.Tensor:
            tensor = super().read()
            look()
            return tensor

    looking = {name: Looking(each.inner, live, name) for name, each in watched.items()}
    gc.collect()
    gc.freeze()
    try:
        score(replace(model, weights=looking), calibration(), how, progress=look)
    finally:
        gc.unfreeze()
    return most


def test_layer_by_layer_holds_the_weights_of_one_layer(model: Model) -> None:
    assert most_layers(model, options(layer_by_layer=True)) == 1
    # the counter counts: the whole model has its four layers and the rest
    assert most_layers(model, options()) == 5


# refusals


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"metrics": ("cosin",)}, "cosin"),
        ({"metrics": ()}, "missing"),
        ({"kinds": ("attn",)}, "attn"),
        ({"save_every": 0}, "save_every"),
        ({"layer_by_layer": True, "metrics": ("perplexity",)}, "whole model"),
        ({"layer_by_layer": True, "target": "cpu"}, "reference"),
    ],
)
def test_options_that_make_no_sense_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        options(**changes)


@pytest.mark.parametrize("runs", [(0,), (5,), (-1, 2)])
def test_runs_longer_than_the_model_are_refused(model: Model, runs: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match="1 to 4"):
        score(model, calibration(), options(runs=runs))


@pytest.mark.parametrize(("sequence", "said"), [([1, 37], "37"), ([1, -1], "-1"), ([1] * 257, "257 tokens")])
def test_sequences_that_the_model_cannot_run_are_refused(model: Model, sequence: list[int], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        score(model, calibration([[1, 2], sequence]), options())


def test_the_identity_follows_what_the_model_is(make_llama: Make, tmp_path: Path) -> None:
    folder, _ = make_llama()
    model = read_model(folder)
    same = read_model(folder)
    assert model_identity(model) == model_identity(same)
    others = [
        drop(model, DropPlan(attention=(1,))),
        read_model(make_llama(rms_norm_eps=1e-6)[0]),
        read_model(make_llama(intermediate_size=64)[0]),
        random_model(SPEC, torch.float32),
    ]
    assert len({model_identity(each) for each in [model, *others]}) == 5


def test_scores_know_their_model(model: Model) -> None:
    found: Scores = score(model, calibration(), options())
    found.check_model(model)
    with pytest.raises(UsageError, match="another model"):
        found.check_model(drop(model, DropPlan(mlp=(0,))))
