"""`pyruntime tradeoff` through `run`: its points against the library's figures; no time is required."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from pyruntime.bench import decode_case
from pyruntime.cli.main import run
from pyruntime.evaluate import Findings, Measures, report
from pyruntime.spec import DropPlan
from tests.generation import byte_level_bpe
from tests.helpers import hf_logits, make_plan, without

TextModel = tuple[Path, Any]
Capture = pytest.CaptureFixture[str]
WORDS = "the cat sat on the mat. once upon a time"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(WORDS)
    return path


def command(model: TextModel, text: Path, *more: object) -> list[str]:
    words = ["tradeoff", model[0], "--text", text, "-o", text.parent / "report", "--repeats", 3, *more]
    return [str(each) for each in words]


def perplexity(hf_model: Any) -> float:
    ids = byte_level_bpe(300).encode(WORDS).ids
    rows = hf_logits(hf_model, ids)[:-1].double()
    return math.exp(float(torch.nn.functional.cross_entropy(rows, torch.tensor(ids[1:]))))


def test_every_point_is_the_model_without_what_it_says(capsys: Capture, text_model: TextModel, text: Path) -> None:
    more = ("--drop-n", "0-3+1", "--no-plot", "--json", "--batch-size", 2, "--context", 20)
    assert run(command(text_model, text, *more)) == 0
    out = capsys.readouterr().out
    points = json.loads(out)
    # what drops nothing is one model, timed once
    assert [(each["target"], each["num_dropped"]) for each in points] == [
        ("dense", 0),
        *((target, count) for target in ("attn", "mlp", "block", "joint") for count in range(1, 4)),
    ]
    dense = make_plan(text_model[0])
    case = decode_case(2, 20)
    for each in points:
        attention, mlp = each["drop_attn_list"], each["drop_mlp_list"]
        sizes = {
            "dense": len(attention + mlp),
            "attn": len(attention),
            "mlp": len(mlp),
            "block": len(attention),
            "joint": len(attention + mlp),
        }
        assert sizes[each["target"]] == each["num_dropped"]
        plan = DropPlan(tuple(attention), tuple(mlp))
        assert each["perplexity"] == pytest.approx(perplexity(without(text_model[1], plan)), rel=1e-4)
        pruned = make_plan(text_model[0], plan)
        ratio = dense.total_cost(case.work).num_bytes / pruned.total_cost(case.work).num_bytes
        assert each["predicted"] == pytest.approx(ratio)
        assert each["speedup_p20"] <= each["speedup"] <= each["speedup_p80"]
        assert 0 <= each["gate_nmse"] < 1e-6
    saved = json.loads((text.parent / "report" / "tradeoff.json").read_text())
    assert saved["points"] == points
    assert (saved["batch"], saved["context"], saved["num_tokens"]) == (
        2,
        20,
        len(byte_level_bpe(300).encode(WORDS).ids) - 1,
    )
    assert len((text.parent / "report" / "tradeoff.csv").read_text().splitlines()) == 1 + len(points)


def test_a_killed_run_goes_on_where_it_was(
    capsys: Capture, text_model: TextModel, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[str] = []
    honest = report.measure

    def counted(loaded: Any, measures: Measures, bars: Any, what: str, reference: Any = None) -> Findings:
        measured.append(what)
        if len(measured) == 4:
            raise KeyboardInterrupt
        return honest(loaded, measures, bars, what, reference)

    monkeypatch.setattr("pyruntime.cli.tradeoff.measure", counted)
    arguments = command(text_model, text, "--drop-n", "0-3", "--target-layer", "attn,mlp", "--no-plot", "--json")
    assert run(arguments) == 130
    assert measured == ["dense", "attn 1", "attn 2", "attn 3"]
    capsys.readouterr()
    assert run(arguments) == 0
    assert measured[4:] == ["dense", "attn 3", "mlp 1", "mlp 2", "mlp 3"]
    first = json.loads(capsys.readouterr().out)
    assert run(arguments) == 0
    # nothing but the dense model, which the others would be compared with
    assert measured[9:] == ["dense"]
    assert json.loads(capsys.readouterr().out) == first


def test_tasks_pictures_and_a_table(capsys: Capture, text_model: TextModel, text: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra plot)")
    task = text.parent / "words.jsonl"
    task.write_text('{"query": "the cat", "choices": ["sat", "once"], "gold": 0}\n')
    assert run(command(text_model, text, "--drop-n", "0,2", "--target-layer", "attn", "--tasks", task)) == 0
    out = capsys.readouterr().out
    for words in ("attn 2", "speed-up", "p20-p80", "points of accuracy lost for each % of speed-up", "batch 1"):
        assert words in out
    folder = text.parent / "report"
    assert {path.name for path in folder.iterdir()} == {f"tradeoff.{kind}" for kind in ("json", "csv", "svg", "png")}
    assert "acc_words" in (folder / "tradeoff.csv").read_text().splitlines()[0]


@pytest.mark.parametrize(("counts", "first"), [("50", 50), ("0,1,14,60", 14), ("0-20", 9)])
def test_more_than_any_target_has_is_refused_before_weights_are_read(
    capsys: Capture, text_model: TextModel, text: Path, monkeypatch: pytest.MonkeyPatch, counts: str, first: int
) -> None:
    monkeypatch.setattr("pyruntime.cli.tradeoff.load", None)
    assert run(command(text_model, text, "--drop-n", counts, "--no-plot")) == 2
    assert f"SELECT]: --drop-n has {first}; at most 8 can be dropped" in capsys.readouterr().err


def test_points_that_a_target_does_not_have_are_said(capsys: Capture, text_model: TextModel, text: Path) -> None:
    assert run(command(text_model, text, "--drop-n", "1,5", "--target-layer", "mlp,joint", "--no-plot", "--json")) == 0
    out, err = capsys.readouterr()
    assert [(each["target"], each["num_dropped"]) for each in json.loads(out)] == [
        ("mlp", 1),
        ("joint", 1),
        ("joint", 5),
    ]
    assert err == "left out: mlp 5 (it has 4)\n"


def test_without_a_text_the_packages_own_is_taken_and_named(capsys: Capture, text_model: TextModel, text: Path) -> None:
    words = command(text_model, text, "--drop-n", "0", "--no-plot", "--json", "--max-chars", 300)
    del words[words.index("--text") : words.index("--text") + 2]
    assert run(words) == 0
    assert capsys.readouterr().err == "no --text: default_text.txt is taken, which comes with pyruntime\n"
    assert json.loads((text.parent / "report" / "tradeoff.json").read_text())["text"] == "default_text.txt"


def test_a_report_of_something_else_is_kept(capsys: Capture, text_model: TextModel, text: Path) -> None:
    arguments = command(text_model, text, "--drop-n", "0", "--no-plot")
    assert run(arguments) == 0
    report = text.parent / "report" / "tradeoff.json"
    before = report.read_bytes()
    capsys.readouterr()
    assert run([*arguments, "--batch-size", "3"]) == 2
    assert "OUTPUT]" in (err := capsys.readouterr().err) and "choose another folder, or remove it" in err
    assert report.read_bytes() == before


@pytest.mark.parametrize("where", ["model", "text"])
def test_a_report_overwrites_nothing_that_is_read(
    capsys: Capture, text_model: TextModel, tmp_path: Path, where: str
) -> None:
    text = tmp_path / "tradeoff.csv"
    text.write_text(WORDS)
    folder = text_model[0] if where == "model" else tmp_path
    assert run(["tradeoff", str(text_model[0]), "--text", str(text), "-o", str(folder), "--no-plot"]) == 2
    assert "OUTPUT]" in capsys.readouterr().err
    assert text.read_text() == WORDS
    assert not (text_model[0] / "tradeoff.json").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--target-layer", "heads"], "SELECT]: --target-layer has 'heads'"),
        (["--drop-n", "x"], "'x' names no layers"),
        (["--context", 64], "CONTEXT]: context is 64"),
        (["--tasks", "piqa"], "TASK]: tasks piqa are lm-eval's"),
        (["--scores", "no-such.json"], "no-such.json is missing"),
        (["--max-chars", 1], "no token to predict"),
        (["--limit", 1], "EVAL]: --limit was given without --tasks"),
        (["--scores", "s.json", "--calib", "c.txt"], "EVAL]: --calib was given without scoring"),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_line(
    capsys: Capture, text_model: TextModel, text: Path, more: list[object], message: str
) -> None:
    assert run(command(text_model, text, "--no-plot", *more)) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert message in err
