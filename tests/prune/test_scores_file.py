"""The file of scores: a round trip, refusals, and the picture of it."""

from __future__ import annotations

import copy
import itertools
import json
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pyruntime.errors import RunError, UsageError
from pyruntime.prune import Calibration, ScoreOptions, Scores, save_plot, score
from tests.specs import ATTENTION, ATTENTIONS, PLAIN_MLP, model_of, random_model

SPEC = model_of(
    [(ATTENTION, PLAIN_MLP, False), (None, PLAIN_MLP, False), (ATTENTIONS["no residual"], PLAIN_MLP, False)]
)
TEXT = Calibration(
    sequences=((1, 2, 3, 4, 5), (6, 7, 8)), source="a b.txt", text_sha256="1" * 64, tokenizer_sha256="2" * 64, seed=5
)


@pytest.fixture(scope="module")
def scores() -> Scores:
    metrics = ("cosine", "angular", "magnitude", "perplexity")
    return score(random_model(SPEC, torch.float32), TEXT, ScoreOptions(metrics=metrics, target="reference"))


def test_scores_come_back_from_their_file_bit_for_bit(scores: Scores, tmp_path: Path) -> None:
    scores.save(tmp_path / "scores.json")
    assert Scores.load(tmp_path / "scores.json") == scores
    assert list(tmp_path.iterdir()) == [tmp_path / "scores.json"]


def test_the_file_says_on_what_it_was_measured(scores: Scores) -> None:
    data = json.loads(json.dumps(scores.to_json()))
    said = {"text": "a b.txt", "text_sha256": "1" * 64, "tokenizer_sha256": "2" * 64, "seed": 5, "num_seqs": 2}
    assert {name: data[name] for name in said} == said
    assert (data["format"], data["version"], data["num_tokens"], data["dtype"]) == ("pyruntime-scores", 1, 8, "float32")
    assert data["not_droppable"] == ["attention 2"]
    assert [value is None for value in data["values"]["cosine"]["attention"]] == [False, True, True]
    assert [value is None for value in data["values"]["perplexity"]["block"]] == [False, False, True]
    assert sorted(data["runs"]["cosine"]) == ["1", "2", "3"]
    assert data["dense_nll"] > 0


HARM: dict[str, Callable[[dict[str, Any]], object]] = {
    "no format": lambda data: data.pop("format"),
    "another format": lambda data: data.update(format="pyruntime-drop-plan"),
    "a newer version": lambda data: data.update(version=2),
    "true as version": lambda data: data.update(version=True),
    "a missing key": lambda data: data.pop("text"),
    "another key": lambda data: data.update(more=1),
    "an unknown metric": lambda data: data["values"].update(taylor={}),
    "an unknown kind": lambda data: data["values"]["cosine"].update(head=[0.1] * 3),
    "too few values": lambda data: data["values"]["cosine"]["mlp"].pop(),
    "text as value": lambda data: data["values"]["cosine"].update(mlp=["0.1"] * 3),
    "true as value": lambda data: data["values"]["cosine"].update(mlp=[True] * 3),
    "infinity": lambda data: data["values"]["cosine"].update(mlp=[10**400] * 3),
    "values that are a list": lambda data: data.update(values=[]),
    "kinds that are a list": lambda data: data["values"].update(cosine=[]),
    "a run of no layers": lambda data: data["runs"]["cosine"].update({"0": []}),
    "a run of all and one": lambda data: data["runs"]["cosine"].update({"4": []}),
    "a run by another name": lambda data: data["runs"]["cosine"].update({"01": [0.1] * 3}),
    "runs of another metric": lambda data: data["runs"].update(magnitude={}),
    "too few runs": lambda data: data["runs"]["cosine"]["2"].pop(),
    "layers as text": lambda data: data.update(num_layers="3"),
    "no layers": lambda data: data.update(num_layers=0),
    "layers without end": lambda data: data.update(num_layers=10**9),
    "a name for a terminal": lambda data: data.update(text="\x1b[2J"),
    "a family of two lines": lambda data: data.update(family="a\nb"),
    "droppable as text": lambda data: data.update(not_droppable="attention 2"),
    "droppable as numbers": lambda data: data.update(not_droppable=[2]),
    "a hash that is a number": lambda data: data.update(text_sha256=1),
    "an infinite loss": lambda data: data.update(dense_nll=10**400),
    "a loss that is text": lambda data: data.update(dense_nll="1.0"),
}


@pytest.mark.parametrize("name", HARM)
def test_what_is_no_scores_is_refused(scores: Scores, tmp_path: Path, name: str) -> None:
    data = copy.deepcopy(json.loads(json.dumps(scores.to_json())))
    HARM[name](data)
    with pytest.raises(UsageError) as caught:
        Scores.from_json(data)
    assert caught.value.code == "SCORES"
    (tmp_path / "scores.json").write_text(json.dumps(data))
    with pytest.raises(UsageError):
        Scores.load(tmp_path / "scores.json")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"format": "pyruntime-scores", "format": 1}', b"\xff"])
def test_files_that_are_no_json_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "scores.json").write_bytes(content)
    with pytest.raises(UsageError, match=r"scores\.json"):
        Scores.load(tmp_path / "scores.json")


def test_every_field_is_written(scores: Scores) -> None:
    assert {each.name for each in fields(Scores)} | {"format", "version"} == set(scores.to_json())


# pictures


@pytest.mark.parametrize(("name", "magic"), [("a.svg", b"<?xml"), ("a.png", b"\x89PNG")])
def test_a_picture_is_drawn(scores: Scores, tmp_path: Path, name: str, magic: bytes) -> None:
    pytest.importorskip("matplotlib")
    save_plot(scores, tmp_path / name)
    first = (tmp_path / name).read_bytes()
    assert first.startswith(magic)
    save_plot(scores, tmp_path / name)
    assert (tmp_path / name).read_bytes() == first
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_picture_has_a_curve_for_each_kind_and_a_field_for_each_metric(scores: Scores, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    save_plot(scores, tmp_path / "a.svg")
    picture = (tmp_path / "a.svg").read_text()
    # labels stand as comments beside the glyphs
    for text in ("cosine", "angular", "magnitude", "perplexity", "whole layer", "MLP"):
        assert f"<!-- {text} -->" in picture


@pytest.mark.parametrize("least", [0.2, 0.05, 0.004, 0.0003])
def test_labels_of_an_axis_do_not_overlap(scores: Scores, tmp_path: Path, least: float) -> None:
    """Of an axis over three decades, the labels stand at least their height apart, and there are two or more."""
    figures = pytest.importorskip("matplotlib.figure")
    values = {"cosine": {"attention": (1.0, 0.3, least)}}
    seen: list[list[float]] = []
    honest = figures.Figure.savefig

    def look(figure: Any, *arguments: Any, **how: Any) -> None:
        honest(figure, *arguments, **how)
        axis = figure.axes[0].yaxis
        low, high = sorted(axis.get_view_interval())
        ticks = [*axis.get_major_ticks(), *axis.get_minor_ticks()]
        labels = [tick.label1 for tick in ticks if tick.label1.get_text() and low <= tick.get_loc() <= high]
        boxes = sorted((label.get_window_extent() for label in labels), key=lambda box: box.y0)
        seen.append([above.y0 - below.y1 for below, above in itertools.pairwise(boxes)])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures.Figure, "savefig", look)
        save_plot(replace(scores, values=values), tmp_path / "a.png")
    assert seen[0] and min(seen[0]) > 0


def test_other_formats_are_refused(scores: Scores, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"\.svg or \.png"):
        save_plot(scores, tmp_path / "a.pdf")


def test_a_picture_that_cannot_be_written_is_an_error(scores: Scores, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(RunError, match="cannot write"):
        save_plot(scores, tmp_path / "none" / "a.svg")


def test_a_missing_matplotlib_is_said(scores: Scores, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UsageError, match=r"pyruntime-llm\[plot\]"):
        save_plot(scores, tmp_path / "a.svg")
