"""`pyruntime eval` through `run`: its figures against the library's, what people read, and what is refused."""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from pyruntime.cli.evaluate_options import command_line
from pyruntime.cli.evaluate_table import _copy_rows
from pyruntime.cli.main import run
from pyruntime.spec import DropPlan
from tests.generation import byte_level_bpe
from tests.helpers import hf_logits, without

TextModel = tuple[Path, Any]
Capture = pytest.CaptureFixture[str]
DOCUMENTS = ("the cat sat on the mat. the end", "once upon a time there was a llama")
PRUNED = DropPlan(attention=(1, 2))
ITEMS = (
    {"query": "the cat", "choices": ["sat on the mat", "once upon"], "gold": 0},
    {"query": "once upon", "choices": ["a time", "the mat"], "gold": 1},
)


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """A text with a document a line, and a task."""
    text, task = tmp_path / "text.jsonl", tmp_path / "words.jsonl"
    text.write_text("".join(json.dumps({"text": each}) + "\n" for each in DOCUMENTS))
    task.write_text("".join(json.dumps(each) + "\n" for each in ITEMS))
    return text, task


def succeed(capsys: Capture, *arguments: object) -> str:
    code = run([str(each) for each in arguments])
    out, err = capsys.readouterr()
    assert (code, err) == (0, "")
    return out


def expected(hf_model: Any) -> tuple[float, int]:
    """Negative log-likelihood of the documents, and the number of tokens."""
    nll, count = 0.0, 0
    for document in DOCUMENTS:
        ids = byte_level_bpe(300).encode(document).ids
        rows = hf_logits(hf_model, ids)[:-1].double()
        nll += float(torch.nn.functional.cross_entropy(rows, torch.tensor(ids[1:]), reduction="sum"))
        count += len(ids) - 1
    return nll, count


def test_one_model_alone(capsys: Capture, text_model: TextModel, files: tuple[Path, Path], tmp_path: Path) -> None:
    text, task = files
    saved = tmp_path / "report.json"
    command = ["eval", text_model[0], "--text", text, "--tasks", task, "--drop-attn", "1,2", "--long-context"]
    report = json.loads(succeed(capsys, *command, "--json", "-o", saved))
    assert json.loads(saved.read_text()) == report
    nll, count = expected(without(text_model[1], PRUNED))
    found = report["model"]
    assert "dense" not in report
    assert (found["num_tokens"], found["drop_attn_list"]) == (count, [1, 2])
    assert found["perplexity"] == pytest.approx(math.exp(nll / count), rel=1e-4)
    assert found["tasks"]["words"]["num_items"] == 2
    assert [each["distance"] for each in found["copying"]] == [16, 48]
    assert report["text"]["num_documents"] == 2
    assert report["machine"]["torch"] == torch.__version__


def test_beside_the_dense_model(capsys: Capture, text_model: TextModel, files: tuple[Path, Path]) -> None:
    text, task = files
    command = ["eval", text_model[0], "--text", text, "--tasks", task, "--drop-attn", "1,2", "--dense", text_model[0]]
    report = json.loads(succeed(capsys, *command, "--json"))
    (dense_nll, count), (nll, _) = expected(text_model[1]), expected(without(text_model[1], PRUNED))
    assert report["dense"]["perplexity"] == pytest.approx(math.exp(dense_nll / count), rel=1e-4)
    assert report["model"]["perplexity"] == pytest.approx(math.exp(nll / count), rel=1e-4)
    change = report["change"]["perplexity_change"]
    assert change == pytest.approx(math.exp((nll - dense_nll) / count) - 1, rel=1e-3)
    # float32 against float32: what is left is rounding
    assert 0 <= report["dense"]["divergence"]["kl_mean"] < 1e-6 < report["model"]["divergence"]["kl_mean"]
    points = report["change"]["tasks"]["words"]["acc_change"]
    both = [report[name]["tasks"]["words"]["acc"] for name in ("model", "dense")]
    assert points == pytest.approx(both[0] - both[1])


def test_a_cache_changes_no_figure(
    capsys: Capture, text_model: TextModel, files: tuple[Path, Path], tmp_path: Path
) -> None:
    command = ["eval", text_model[0], "--text", files[0], "--drop-mlp", "0", "--dense", text_model[0], "--json"]
    plain, first, again = (
        json.loads(succeed(capsys, *command, *more)) for more in ([], *[["--cache", tmp_path / "cache"]] * 2)
    )
    assert len(list((tmp_path / "cache").glob("*/index.json"))) == 1
    for name in ("dense", "model", "change"):
        assert plain[name] == first[name] == again[name]


def test_people_read_a_table(capsys: Capture, text_model: TextModel, files: tuple[Path, Path]) -> None:
    text, task = files
    command = ["eval", text_model[0], "--text", text, "--tasks", task, "--drop-attn", "1", "--long-context"]
    out = succeed(capsys, *command, "--dense", text_model[0])
    for words in ("dropped: attention 1", "perplexity", "bits per byte", "top-1 agreement", "words, acc_norm"):
        assert words in out
    assert "copy gain" in out
    assert "noise floor" in out
    assert max(map(len, out.splitlines()[3:-1])) <= 80


USAGE: dict[str, tuple[list[object], str]] = {
    "nothing": ([], "EVAL]: nothing is to be measured"),
    "no text": (["--text", "no-such.txt"], "TEXT]: no-such.txt is no file"),
    "no task": (["--tasks", "no-such.jsonl"], "TASK]: no-such.jsonl is no file"),
    "twice": (["--tasks", "a/x.jsonl,b/x.jsonl"], "TASK]: two tasks are called 'x'"),
    "window": (["--text", "TEXT", "--window", 65], "TEXT]: the window is 65 tokens; expected 2 to 64"),
    "stride": (["--text", "TEXT", "--stride", 64], "TEXT]: stride is 64; expected 1 to 63"),
    "layer": (["--text", "TEXT", "--drop-attn", 9], "DROP]: layer 9 does not exist"),
    "over the text": (["--text", "TEXT", "-o", "TEXT"], "OUTPUT]"),
    "over a task": (["--tasks", "TASK", "-o", "TASK"], "OUTPUT]"),
    "in the model": (["--text", "TEXT", "-o", "MODEL/config.json"], "OUTPUT]"),
    "cache in the model": (["--text", "TEXT", "--dense", "MODEL", "--cache", "MODEL/cache"], "OUTPUT]"),
    "cache alone": (["--text", "TEXT", "--cache", "c"], "EVAL]: --cache was given without --dense"),
    "cache without text": (["--tasks", "TASK", "--dense", "MODEL", "--cache", "c"], "--cache was given without --text"),
    "limit": (["--text", "TEXT", "--limit", 3], "EVAL]: --limit was given without --tasks"),
    "shots": (["--tasks", "TASK", "--num-fewshot", 3], "EVAL]: --num-fewshot was given without"),
    "include": (["--tasks", "TASK", "--include-path", "."], "EVAL]: --include-path was given without"),
    "window alone": (["--tasks", "TASK", "--window", 30], "EVAL]: --window was given without --text"),
    "bos alone": (["--tasks", "TASK", "--no-bos"], "EVAL]: --bos was given without --text"),
    "stride alone": (["--long-context", "--stride", 30], "EVAL]: --stride was given without --text"),
    "characters alone": (["--long-context", "--max-chars", 30], "EVAL]: --max-chars was given without --text"),
}


@pytest.mark.parametrize("case", USAGE)
def test_what_cannot_be_measured_is_refused_in_one_line(
    capsys: Capture, text_model: TextModel, files: tuple[Path, Path], case: str
) -> None:
    arguments, message = USAGE[case]
    names = {"TEXT": files[0], "TASK": files[1], "MODEL": text_model[0]}
    words = [str(each) for each in arguments]
    for name, path in names.items():
        words = [word.replace(name, str(path)) for word in words]
    before = [path.read_bytes() for path in files]
    assert run(["eval", str(text_model[0]), *words]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert message in err
    assert [path.read_bytes() for path in files] == before


def test_the_cache_reads_the_dense_model_as_the_command_says(
    capsys: Capture, text_model: TextModel, files: tuple[Path, Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(text_model[0], tmp_path / "unknown")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quaint_key": 1}))
    command = ["eval", folder, "--text", files[0], "--dense", folder, "--ignore-config-keys", "quaint_key", "--json"]
    report = json.loads(succeed(capsys, *command, "--cache", tmp_path / "cache"))
    assert report["dense"]["divergence"]["kl_mean"] < 1e-6


def test_tasks_that_are_not_there_are_said_before_anything_runs(
    capsys: Capture, text_model: TextModel, files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    # as where the extra is not installed
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "pyruntime.integrations.lm_eval", raising=False)
    monkeypatch.setattr("pyruntime.cli.evaluate.load", None)
    assert run(["eval", str(text_model[0]), "--text", str(files[0]), "--tasks", "piqa"]) == 2
    assert "LM_EVAL]: tasks piqa need lm-eval" in capsys.readouterr().err


def test_a_report_says_where_nothing_lies(capsys: Capture, text_model: TextModel, files: tuple[Path, Path]) -> None:
    report = json.loads(succeed(capsys, "eval", text_model[0], f"--text={files[0]}", "--json"))
    assert report["model"]["model"] == text_model[0].name


@pytest.mark.parametrize(
    ("word", "kept"),
    [
        ("/a/b/model", "model"),
        ("--text=/a/b/c.txt", "--text=c.txt"),
        ("--tasks=/a/x.jsonl,piqa,/b/y.jsonl", "--tasks=x.jsonl,piqa,y.jsonl"),
        ("/a/x.jsonl,/b/y.jsonl", "x.jsonl,y.jsonl"),
        ("-o/a/b/r.json", "-or.json"),
        ("--drop-attn=1,8", "--drop-attn=1,8"),
        ("org/model", "org/model"),
    ],
)
def test_the_command_of_a_report_names_no_folder(monkeypatch: pytest.MonkeyPatch, word: str, kept: str) -> None:
    monkeypatch.setattr(sys, "argv", ["pyruntime", "eval", word])
    assert command_line() == ["pyruntime", "eval", kept]


def test_the_table_shows_what_is_left_of_a_gain() -> None:
    # the second distance: the dense model gains nothing, so that no part of it is left
    lines = [{"distance": each, "gain_nats": 2.0, "gain_nats_stderr": 0.1} for each in (16, 64)]
    kept = [{"distance": 16, "gain_kept": 0.625}, {"distance": 64, "gain_kept": None}]
    report = {"model": {"copying": lines}, "dense": {"copying": lines}, "change": {"copying": kept}}
    assert [row[-1] for row in _copy_rows(report)] == ["62.5% kept", ""]
    assert [row[-1] for row in _copy_rows({"model": {"copying": lines}})] == ["", ""]


def test_a_dense_model_with_other_tokens_is_refused(
    capsys: Capture, text_model: TextModel, files: tuple[Path, Path], tmp_path: Path
) -> None:
    other = shutil.copytree(text_model[0], tmp_path / "other")
    byte_level_bpe(280).save(str(other / "tokenizer.json"))
    assert run(["eval", str(text_model[0]), "--text", str(files[0]), "--dense", str(other)]) == 2
    assert "cut the text into different tokens" in capsys.readouterr().err
