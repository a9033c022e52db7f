"""What `score` and `prune` refuse before they work, what they tell, and what they do where little is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pyruntime.checkpoint import read_model
from pyruntime.cli.main import run
from pyruntime.engine.texts import default_text
from pyruntime.errors import UsageError
from pyruntime.prune import Calibration, ScoreOptions, Scores, Selection, choose, made_of, prune, score
from pyruntime.spec import DropPlan
from tests.specs import ATTENTION, PLAIN_MLP, model_of, random_model

TextModel = tuple[Path, Any]
Capture = pytest.CaptureFixture[str]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "calib.txt"
    path.write_text("the cat sat on the mat and once upon a time it was late " * 8)
    return path


@pytest.fixture
def scores_file(text_model: TextModel, text: Path, tmp_path: Path, capsys: Capture) -> Path:
    path = tmp_path / "scores.json"
    assert said(capsys, "score", text_model[0], "--text", text, "-o", path, "--seq-len", 32)[0] == 0
    return path


def said(capsys: Capture, *arguments: object) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of a command."""
    code = run([str(each) for each in arguments])
    return code, *capsys.readouterr()


def refused(capsys: Capture, *arguments: object) -> str:
    """What a command that exits with 2 says."""
    code, out, err = said(capsys, *arguments)
    assert (code, out) == (2, "") and len(err.splitlines()) == 1
    return err


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# outputs


def test_scores_are_never_written_over_what_is_read(
    capsys: Capture, text_model: TextModel, text: Path, tmp_path: Path
) -> None:
    model, before = contents(text_model[0]), text.read_bytes()
    again = tmp_path / "again.txt"
    again.hardlink_to(text)
    for output in (text, again, text_model[0] / "config.json", text_model[0] / "scores.json"):
        assert "never changed" in refused(capsys, "score", text_model[0], "--text", text, "-o", output)
        plot = ["--plot", output.with_suffix(".svg")] if output.suffix == ".json" else []
        if plot:
            refused(capsys, "score", text_model[0], "--text", text, "-o", tmp_path / "s.json", *plot)
    # the sums of an unfinished run are a file too
    partial = tmp_path / "s.json.partial"
    partial.write_text("the cat sat on the mat")
    refused(capsys, "score", text_model[0], "--text", partial, "-o", tmp_path / "s.json")
    assert partial.read_text() == "the cat sat on the mat"
    assert contents(text_model[0]) == model and text.read_bytes() == before


@pytest.mark.parametrize("name", ["same.svg", "same.png"])
def test_scores_and_their_picture_are_two_files(
    capsys: Capture, text_model: TextModel, text: Path, tmp_path: Path, name: str
) -> None:
    where = tmp_path / name
    refused(capsys, "score", text_model[0], "--text", text, "-o", where, "--plot", where)
    assert not where.exists()


def test_an_output_that_cannot_be_is_refused_before_anything_is_scored(
    text_model: TextModel, text: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def scored(*_: object, **__: object) -> None:
        raise AssertionError("it was scored first")

    monkeypatch.setattr("pyruntime.cli.prune.choose", scored)
    monkeypatch.setitem(prune.__globals__, "choose", scored)
    there = tmp_path / "there"
    there.mkdir()
    how = ["--text", text, "--drop-n", 1]
    for out in (there, text_model[0], text_model[0] / "inside"):
        refused(capsys, "prune", text_model[0], out, *how)
        with pytest.raises(UsageError):
            prune(text_model[0], out, Selection(drop_n=1), text=text)
    # a folder that is replaced does not take the text with it
    held = there / "calib.txt"
    held.write_text(text.read_text())
    refused(capsys, "prune", text_model[0], there, "--text", held, "--drop-n", 1, "--overwrite")
    assert held.exists()


@pytest.mark.parametrize("wait", [False, True])
def test_wait_reaches_the_writer(
    text_model: TextModel, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch, wait: bool
) -> None:
    found = []

    def writes(*_: object, **how: object) -> None:
        found.append(how["wait"])
        raise UsageError("TEST", "enough")

    monkeypatch.setattr("pyruntime.cli.prune.write_pruned", writes)
    monkeypatch.setitem(prune.__globals__, "write_pruned", writes)
    refused(capsys, "prune", text_model[0], tmp_path / "out", "--drop-attn", 1, *(["--wait"] if wait else []))
    with pytest.raises(UsageError, match="enough"):
        prune(text_model[0], tmp_path / "out", DropPlan(attention=(1,)), wait=wait)
    assert found == [wait, wait]


# options without effect

UNUSED = [
    (["--drop-attn", "3", "--method", "one-shot"], "--method beside layers that are named"),
    (["--drop-attn", "3", "--metric", "cosine"], "--metric beside layers that are named"),
    (["--drop-attn", "3", "--target-layer", "attn"], "--target-layer beside layers that are named"),
    (["--drop-attn", "3", "--layer-by-layer"], "--layer-by-layer beside layers that are named"),
    (["--drop-attn", "3", "--seed", "1"], "--seed beside layers that are named"),
    (["--drop-n", "1", "--metric", "reverse", "--text", "calib.txt"], "--text beside --metric reverse"),
    (["--drop-n", "1", "--metric", "reverse", "--scores", "scores.json"], "--scores beside --metric reverse"),
    (["--drop-n", "1", "--metric", "reverse", "--seed", "1"], "--seed beside --metric reverse"),
    (["--drop-n", "1", "--metric", "random", "--num-seqs", "4"], "--num-seqs beside --metric random"),
    (["--drop-n", "1", "--method", "last", "--metric", "cosine"], "--metric beside --method last"),
    (["--drop-n", "1", "--method", "keep-last", "--scores", "scores.json"], "--scores beside --method keep-last"),
    (["--drop-n", "1", "--method", "iterative", "--scores", "scores.json"], "--scores beside --method iterative"),
    (["--drop-n", "1", "--scores", "scores.json", "--text", "calib.txt"], "--text beside --scores"),
    (["--drop-n", "1", "--scores", "scores.json", "--separate", "--seed", "1"], "--separate and --seed beside"),
    (["--drop-n", "1", "--scores", "scores.json", "--target", "reference"], "--target beside --scores"),
    (["--drop-n", "1", "--method", "iterative", "--metric", "perplexity", "--layer-by-layer"], "whole model"),
    (["--speedup", "1.1", "--metric", "random", "--batch", "100000000"], "1048576"),
]


@pytest.mark.parametrize(("words", "why"), UNUSED, ids=str)
def test_what_has_no_effect_is_refused(
    capsys: Capture, text_model: TextModel, scores_file: Path, tmp_path: Path, words: list[str], why: str
) -> None:
    files = {"calib.txt", "scores.json"}
    words = [str(tmp_path / each) if each in files else each for each in words]
    needs_text = ["--text", tmp_path / "calib.txt"] if "perplexity" in words else []
    assert why in refused(capsys, "prune", text_model[0], tmp_path / "out", *words, *needs_text)
    assert not (tmp_path / "out").exists()


def test_a_seed_draws_a_random_order(capsys: Capture, text_model: TextModel, tmp_path: Path) -> None:
    how = ["prune", text_model[0], tmp_path / "out", "--drop-n", 2, "--metric", "random", "--dry-run", "--json"]
    found = {tuple(json.loads(said(capsys, *how, "--seed", seed)[1])["dropped"]["attention"]) for seed in range(6)}
    assert len(found) > 1


def test_a_plan_of_what_is_gone_already_is_refused(capsys: Capture, text_model: TextModel, tmp_path: Path) -> None:
    once = tmp_path / "once"
    assert said(capsys, "prune", text_model[0], once, "--drop-attn", "1,2")[0] == 0
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps(DropPlan(attention=(1,)).to_json()))
    assert "drops nothing" in refused(capsys, "prune", once, tmp_path / "two", "--drop-plan", plan)
    for gone in (DropPlan(attention=(2,)), DropPlan()):
        with pytest.raises(UsageError, match="drops nothing"):
            prune(once, tmp_path / "two", gone)
    assert not (tmp_path / "two").exists()


def test_python_refuses_what_it_would_not_look_at(text_model: TextModel, scores_file: Path, text: Path) -> None:
    model, scores = read_model(text_model[0]), Scores.load(scores_file)
    calibration = Calibration(sequences=((1, 2, 3),))
    given: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({"metric": "reverse"}, {"scores": scores}),
        ({"method": "last"}, {"calibration": calibration}),
        ({"method": "iterative"}, {"scores": scores, "calibration": calibration}),
        ({}, {"scores": scores, "calibration": calibration}),
    ]
    for how, beside in given:
        with pytest.raises(UsageError) as caught:
            choose(model, Selection(drop_n=1, **how), **beside)
        assert caught.value.code == "SCORES"
    with pytest.raises(UsageError, match="beside a plan"):
        prune(text_model[0], scores_file.parent / "out", DropPlan(attention=(1,)), text=text)


# the built-in text


def test_little_need_be_said(capsys: Capture, text_model: TextModel, tmp_path: Path) -> None:
    how = ["--seq-len", 32, "--num-seqs", 4]
    line = "scored on the built-in text; --text FILE for your own\n"
    code, out, err = said(capsys, "score", text_model[0], "-o", tmp_path / "s.json", *how, "--json")
    assert (code, err) == (0, line)
    assert json.loads(out)["text"] == default_text().name
    code, out, err = said(capsys, "prune", text_model[0], tmp_path / "a", "--target-layer", "attn", "--drop-n", 2, *how)
    assert (code, err) == (0, line) and default_text().name in out
    chosen = ["--speedup", 1.5, "--batch", 8, "--context", 60]
    code, out, err = said(capsys, "prune", text_model[0], tmp_path / "b", *chosen, *how, "--json")
    found = json.loads(out)
    assert (code, err) == (0, line) and found["predicted_speedup_of_input"] >= 1.5
    assert found["origin"].startswith("one-shot joint")
    # nothing is measured for a rule
    assert said(capsys, "prune", text_model[0], tmp_path / "c", "--method", "last", "--drop-n", 2)[2] == ""


def test_python_says_that_it_takes_the_built_in_text(
    text_model: TextModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = prune(text_model[0], tmp_path / "out", Selection(drop_n=1))
    assert found.scores is not None and found.scores.text == default_text().name
    assert "comes with the package" in caplog.text


# what is told


def test_a_block_is_recorded_with_the_score_that_chose_it() -> None:
    model = random_model(model_of([(ATTENTION, PLAIN_MLP, False)] * 4))
    calibration = Calibration(sequences=((1, 2, 3, 4, 5, 6),))
    scores = score(model, calibration, ScoreOptions(target="reference"))
    blocks = Selection(target="block", drop_n=2)
    plan, _ = choose(model, blocks, scores=scores)
    for metric, kinds in made_of(plan, scores, blocks)["scores"]["of_dropped"].items():
        assert kinds == {"block": {str(i): scores.of(metric, "block")[i] for i in plan.attention}}
    run_of = Selection(target="block", drop_n=2, method="consecutive")
    plan, _ = choose(model, run_of, scores=scores)
    first = plan.attention[0]
    found = made_of(plan, scores, run_of)["scores"]["of_dropped"]["cosine"]["run of 2"]
    assert found == {str(first): scores.run("cosine", 2)[first]}
    assert scores.run("cosine", 2)[first] == min(each for each in scores.run("cosine", 2) if each is not None)


def test_each_choice_of_a_search_is_shown(capsys: Capture, text_model: TextModel, text: Path, tmp_path: Path) -> None:
    how = ["--method", "iterative", "--drop-n", 2, "--text", text, "--seq-len", 32]
    code, out, err = said(capsys, "prune", text_model[0], tmp_path / "out", *how)
    lines = [line.split()[1:3] for line in out.splitlines() if line.startswith("dropped") and "attention " in line]
    origin = next(line for line in out.splitlines() if line.startswith("chosen by"))
    assert (code, err) == (0, "")
    shown = ", ".join(" ".join(words).rstrip(",") for words in lines[:2])
    assert origin.endswith(f": {shown}")


def test_prune_tells_of_what_it_wrote(capsys: Capture, text_model: TextModel, tmp_path: Path) -> None:
    """The input declares drops whose tensors it still holds; the output holds them no more."""
    lists = tmp_path / "lists"
    lists.mkdir()
    for name, data in contents(text_model[0]).items():
        (lists / name).write_bytes(data)
    config = json.loads((lists / "config.json").read_text())
    (lists / "config.json").write_text(json.dumps({**config, "drop_attn_list": [0], "drop_mlp_list": []}))
    assert read_model(lists).unread_bytes > 0
    code, out, _ = said(capsys, "prune", lists, tmp_path / "out", "--drop-attn", "1")
    assert code == 0 and "not read" not in out
    left = read_model(tmp_path / "out")
    assert left.unread_bytes == 0
    assert out.splitlines()[-1].endswith(f"tensors, {left.weight_bytes} bytes")
