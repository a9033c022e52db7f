"""`pyruntime score` and `pyruntime prune`, and the Python call that does both."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pyruntime.checkpoint import read_model
from pyruntime.cli.main import run
from pyruntime.errors import UsageError
from pyruntime.prune import (
    CalibrationOptions,
    ScoreOptions,
    Scores,
    Selection,
    prune,
    read_calibration,
    score,
    select,
)
from pyruntime.spec import DropPlan
from tests.helpers import all_logits, hf_logits, make_plan, relative_error, without

TextModel = tuple[Path, Any]
Capture = pytest.CaptureFixture[str]
WORDS = "the cat sat on the mat and once upon a time it was late "


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "calib.txt"
    path.write_text(WORDS * 12)
    return path


@pytest.fixture
def scores_file(text_model: TextModel, text: Path, tmp_path: Path, capsys: Capture) -> Path:
    path = tmp_path / "scores.json"
    succeed(capsys, "score", text_model[0], "--text", text, "-o", path, "--seq-len", 32)
    return path


def succeed(capsys: Capture, *arguments: object) -> str:
    """Standard output of a command that must succeed and say nothing on standard error."""
    code = run([str(each) for each in arguments])
    out, err = capsys.readouterr()
    assert (code, err) == (0, "")
    return out


def fail(capsys: Capture, *arguments: object) -> tuple[int, str]:
    code = run([str(each) for each in arguments])
    out, err = capsys.readouterr()
    assert code != 0 and out == "" and len(err.splitlines()) == 1
    return code, err


def test_score_writes_what_python_measures(capsys: Capture, text_model: TextModel, text: Path, tmp_path: Path) -> None:
    out = succeed(capsys, "score", text_model[0], "--text", text, "-o", tmp_path / "s.json", "--seq-len", 32)
    model = read_model(text_model[0])
    calibration = read_calibration(text, text_model[0], 64, CalibrationOptions(seq_len=32))
    expected = score(model, calibration, ScoreOptions())
    assert Scores.load(tmp_path / "s.json") == expected
    order = sorted(range(4), key=lambda i: expected.of("cosine", "attention")[i] or 0.0)
    assert f"attention {', '.join(map(str, order))}" in out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["calib.txt", "s.json"]


def test_score_options_reach_the_scores(capsys: Capture, text_model: TextModel, text: Path, tmp_path: Path) -> None:
    how = ["--metric", "cosine", "--metric", "perplexity", "--runs", "2,3", "--num-seqs", 2, "--separate", "--seed", 3]
    how += ["--dtype", "bfloat16", "--target", "reference", "--json"]
    found = json.loads(succeed(capsys, "score", text_model[0], "--text", text, "-o", tmp_path / "s.json", *how))
    assert found == json.loads((tmp_path / "s.json").read_text())
    assert sorted(found["values"]) == ["cosine", "perplexity"] and sorted(found["runs"]["cosine"]) == ["2", "3"]
    assert (found["num_seqs"], found["seed"], found["dtype"], found["target"]) == (1, 3, "bfloat16", "reference")


def test_score_layer_by_layer(capsys: Capture, text_model: TextModel, text: Path, tmp_path: Path) -> None:
    how = ["--text", text, "-o", tmp_path / "s.json", "--seq-len", 32, "--json"]
    whole = json.loads(succeed(capsys, "score", text_model[0], *how, "--target", "reference"))
    parts = json.loads(succeed(capsys, "score", text_model[0], *how, "--layer-by-layer"))
    assert parts["values"] == whole["values"] and parts["layer_by_layer"] and not whole["layer_by_layer"]


def test_score_goes_on_where_it_ended(capsys: Capture, text_model: TextModel, text: Path, tmp_path: Path) -> None:
    how = ["score", text_model[0], "--text", text, "-o", tmp_path / "s.json", "--seq-len", 16, "--json"]
    expected = json.loads(succeed(capsys, *how))
    calibration = read_calibration(text, text_model[0], 64, CalibrationOptions(seq_len=16))

    class Killed(BaseException):
        pass

    def die(done: int, total: int) -> None:
        if 2 * done > total:
            raise Killed

    partial = tmp_path / "s.json.partial"
    with pytest.raises(Killed):
        score(read_model(text_model[0]), calibration, ScoreOptions(save_every=1), partial=partial, progress=die)
    assert partial.exists()
    again = json.loads(succeed(capsys, *how))
    assert again == expected and not partial.exists()


@pytest.mark.parametrize(
    ("said", "why"),
    [
        (["--metric", "taylor"], "taylor"),
        (["--runs", "a"], "--runs"),
        (["--runs", "5"], "1 to 4"),
        (["--plot", "a.pdf"], ".svg or .png"),
        (["--num-seqs", "0"], "--num-seqs"),
        (["--seq-len", "65"], "64"),
        (["--layer-by-layer", "--target", "cpu"], "reference"),
        (["--dtype", "int8"], "int8"),
    ],
)
def test_score_refuses_what_it_cannot_do(
    capsys: Capture, text_model: TextModel, text: Path, tmp_path: Path, said: list[str], why: str
) -> None:
    code, err = fail(capsys, "score", text_model[0], "--text", text, "-o", tmp_path / "s.json", *said)
    assert code == 2 and why in err
    assert not (tmp_path / "s.json").exists()


def test_score_refuses_an_output_that_cannot_be(
    capsys: Capture, text_model: TextModel, text: Path, tmp_path: Path
) -> None:
    code, err = fail(capsys, "score", text_model[0], "--text", text, "-o", tmp_path / "none" / "s.json")
    assert code == 5 and "cannot write" in err


# prune


def logits_equal(folder: Path, text_model: TextModel, plan: DropPlan) -> None:
    prompt = [(7 * i * i + 3 * i) % 300 for i in range(23)]
    (found,) = all_logits(make_plan(folder), [prompt], 7)
    assert relative_error(found, hf_logits(without(text_model[1], plan).double(), prompt)) < 1e-5


def test_prune_writes_what_the_scores_choose(
    capsys: Capture, text_model: TextModel, scores_file: Path, tmp_path: Path
) -> None:
    out = succeed(capsys, "prune", text_model[0], tmp_path / "out", "--drop-n", 2, "--scores", scores_file)
    expected = select(read_model(text_model[0]).spec, Scores.load(scores_file), Selection(drop_n=2))
    assert read_model(tmp_path / "out").spec.dropped("attention") == expected.attention
    assert read_model(tmp_path / "out").spec.dropped("mlp") == ()
    assert expected.origin in out and "(batch 1, context 63)" in out
    logits_equal(tmp_path / "out", text_model, expected)
    made = json.loads((tmp_path / "out/pyruntime_manifest.json").read_text())["made"]
    assert made["chosen"] == expected.origin
    values = Scores.load(scores_file).of("cosine", "attention")
    assert made["scores"]["of_dropped"]["cosine"]["attention"] == {str(i): values[i] for i in expected.attention}


def test_prune_scores_by_itself(capsys: Capture, text_model: TextModel, scores_file: Path, tmp_path: Path) -> None:
    how = ["--target-layer", "joint", "--drop-n", 3, "--dry-run", "--json"]
    from_file = json.loads(succeed(capsys, "prune", text_model[0], tmp_path / "out", *how, "--scores", scores_file))
    text = ["--text", tmp_path / "calib.txt", "--seq-len", 32]
    itself = json.loads(succeed(capsys, "prune", text_model[0], tmp_path / "out", *how, *text))
    assert itself["dropped"] == from_file["dropped"] and itself["origin"] == from_file["origin"]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "said",
    [
        ["--method", "last", "--drop-n", "2"],
        ["--metric", "reverse", "--drop-n", "2"],
        ["--drop-attn", "last:2"],
        ["--drop-attn", "2,3"],
        ["--metric", "reverse", "--kv-bytes", f"{2 * 2 * 16 * 4 * 10}", "--context", "10"],
        ["--metric", "reverse", "--drop-ratio", "0.5"],
    ],
    ids=str,
)
def test_every_way_to_say_it_writes_the_same_checkpoint(
    capsys: Capture, text_model: TextModel, tmp_path: Path, said: list[str]
) -> None:
    succeed(capsys, "prune", text_model[0], tmp_path / "out", *said)
    assert read_model(tmp_path / "out").spec.dropped("attention") == (2, 3)
    logits_equal(tmp_path / "out", text_model, DropPlan(attention=(2, 3)))


@pytest.mark.parametrize("metric", ["cosine", "perplexity"])
def test_prune_iteratively(capsys: Capture, text_model: TextModel, text: Path, tmp_path: Path, metric: str) -> None:
    how = ["--text", text, "--seq-len", 32, "--method", "iterative", "--metric", metric, "--drop-n", 2, "--json"]
    found = json.loads(succeed(capsys, "prune", text_model[0], tmp_path / "out", *how))
    assert len(found["dropped"]["attention"]) == 2 and found["origin"].count("attention ") == 2
    assert list(read_model(tmp_path / "out").spec.dropped("attention")) == found["dropped"]["attention"]


def test_prune_a_run_of_blocks(capsys: Capture, text_model: TextModel, scores_file: Path, tmp_path: Path) -> None:
    how = ["--target-layer", "block", "--method", "consecutive", "--drop-n", 2, "--scores", scores_file, "--json"]
    found = json.loads(succeed(capsys, "prune", text_model[0], tmp_path / "out", *how))["dropped"]
    distances = Scores.load(scores_file).run("cosine", 2)
    first = min(range(3), key=lambda i: distances[i] or 0.0)
    assert found == {"attention": [first, first + 1], "mlp": [first, first + 1]}


def test_prune_for_speed_says_batch_and_context(
    capsys: Capture, text_model: TextModel, scores_file: Path, tmp_path: Path
) -> None:
    how = ["--target-layer", "joint", "--speedup", 1.3, "--batch", 4, "--context", 40, "--scores", scores_file]
    out = succeed(capsys, "prune", text_model[0], tmp_path / "out", *how, "--dry-run")
    assert "speedup 1.3, batch 4" in out and "(batch 4, context 40)" in out
    found = json.loads(succeed(capsys, "prune", text_model[0], tmp_path / "out", *how, "--json"))
    assert found["predicted_speedup_of_input"] >= 1.3
    code, err = fail(capsys, "prune", text_model[0], tmp_path / "two", *how[:2], "--speedup", 99, *how[4:])
    assert code == 2 and "out of reach" in err


def test_prune_writes_other_dialects_and_configs_alone(capsys: Capture, text_model: TextModel, tmp_path: Path) -> None:
    named = ["--drop-attn", "1", "--drop-mlp", "2"]
    succeed(capsys, "prune", text_model[0], tmp_path / "lists", *named, "--dialect", "llm-drop")
    config = json.loads((tmp_path / "lists/config.json").read_text())
    assert (config["drop_attn_list"], config["drop_mlp_list"]) == ([1], [2])
    succeed(capsys, "prune", text_model[0], tmp_path / "config", *named, "--config-only")
    assert not list((tmp_path / "config").glob("*.safetensors"))
    code, _ = fail(capsys, "prune", text_model[0], tmp_path / "lists", *named)
    assert code == 2
    succeed(capsys, "prune", text_model[0], tmp_path / "lists", "--drop-attn", "0", "--overwrite")
    assert read_model(tmp_path / "lists").spec.dropped("attention") == (0,)


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ([], "no budget"),
        (["--drop-n", "0", "--metric", "reverse"], "drop_n is 0"),
        (["--drop-n", "5", "--metric", "reverse"], "4 of target attn"),
        (["--drop-n", "1", "--drop-attn", "3"], "--drop-n beside layers that are named"),
        (["--drop-attn", "3", "--text", "x"], "--text beside layers that are named"),
        (["--drop-attn", "4"], "does not exist"),
        (["--kv-bytes", "2 cats"], "--kv-bytes"),
        (["--kv-bytes", "0", "--metric", "reverse", "--context", "64"], "holds at most 63"),
        (["--drop-n", "1", "--metric", "reverse", "--dialect", "gguf"], "dialect"),
        (["--drop-n", "1", "--scores", "none.json"], "none.json"),
        (["--drop-n", "1", "--metric", "reverse", "--dtype", "int4"], "int4"),
    ],
    ids=str,
)
def test_prune_refuses_what_it_cannot_do(
    capsys: Capture, text_model: TextModel, tmp_path: Path, said: list[str], why: str
) -> None:
    code, err = fail(capsys, "prune", text_model[0], tmp_path / "out", *said)
    assert code == 2 and why in err
    assert not (tmp_path / "out").exists()


def test_scores_of_another_model_are_refused(
    capsys: Capture, text_model: TextModel, scores_file: Path, tmp_path: Path
) -> None:
    succeed(capsys, "prune", text_model[0], tmp_path / "one", "--drop-attn", "0")
    code, err = fail(capsys, "prune", tmp_path / "one", tmp_path / "two", "--drop-n", 1, "--scores", scores_file)
    assert code == 2 and "another model" in err


@pytest.mark.parametrize(("size", "kept"), [("1KiB", 4), ("0.75KiB", 3), ("1 KB", 3), ("0.25 KiB", 1), ("0", 0)])
def test_sizes_have_units(capsys: Capture, text_model: TextModel, tmp_path: Path, size: str, kept: int) -> None:
    """A token leaves 2 x 2 heads x 8 values x 4 bytes in each of four layers: 512 bytes, two of them a KiB."""
    how = ["--kv-bytes", size, "--metric", "reverse", "--batch", 2, "--context", 1, "--dry-run", "--json"]
    if kept == 4:
        code, err = fail(capsys, "prune", text_model[0], tmp_path / "out", *how)
        assert code == 2 and "as it is" in err
        return
    found = json.loads(succeed(capsys, "prune", text_model[0], tmp_path / "out", *how))
    assert len(found["dropped"]["attention"]) == 4 - kept and found["kv_bytes"] == 256 * kept


# from Python


def test_one_call_scores_chooses_and_writes(text_model: TextModel, text: Path, tmp_path: Path) -> None:
    cut = CalibrationOptions(seq_len=32)
    found = prune(text_model[0], tmp_path / "out", Selection(target="mlp", drop_n=1), text=text, calibration=cut)
    assert found.scores is not None and found.plan.attention == () and len(found.plan.mlp) == 1
    assert read_model(tmp_path / "out").spec.dropped("mlp") == found.plan.mlp
    assert found.written.path == tmp_path / "out"
    found.scores.save(tmp_path / "s.json")
    again = prune(text_model[0], tmp_path / "two", Selection(target="mlp", drop_n=1), scores=tmp_path / "s.json")
    assert again.plan == found.plan


def test_a_plan_is_written_as_it_is(text_model: TextModel, tmp_path: Path) -> None:
    found = prune(text_model[0], tmp_path / "out", DropPlan(attention=(1,), origin="by hand"))
    assert found.scores is None and read_model(tmp_path / "out").spec.dropped("attention") == (1,)


def test_an_input_is_never_an_output(text_model: TextModel) -> None:
    before = {path.name: path.read_bytes() for path in text_model[0].iterdir()}
    with pytest.raises(UsageError):
        prune(text_model[0], text_model[0], DropPlan(attention=(1,)), overwrite=True)
    assert {path.name: path.read_bytes() for path in text_model[0].iterdir()} == before
    assert torch.is_inference_mode_enabled() is False
