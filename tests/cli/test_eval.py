"""`pyruntime eval` through `run`: its figures against the library's, what people read, and what is refused."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

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
    "no text": (["--text", "no-such.txt"], "TEXT]: no-such.txt is missing"),
    "no task": (["--tasks", "no-such.jsonl"], "TASK]: no-such.jsonl is missing"),
    "twice": (["--tasks", "a/x.jsonl,b/x.jsonl"], "TASK]: two tasks are called 'x'"),
    "window": (["--text", "TEXT", "--window", 65], "TEXT]: the window is 65 tokens; expected 2 to 64"),
    "stride": (["--text", "TEXT", "--stride", 64], "TEXT]: stride is 64; expected 1 to 63"),
    "layer": (["--text", "TEXT", "--drop-attn", 9], "DROP]: layer 9 does not exist"),
}


@pytest.mark.parametrize("case", USAGE)
def test_what_cannot_be_measured_is_refused_in_one_line(
    capsys: Capture, text_model: TextModel, files: tuple[Path, Path], case: str
) -> None:
    arguments, message = USAGE[case]
    words = [str(files[0]) if each == "TEXT" else str(each) for each in arguments]
    assert run(["eval", str(text_model[0]), *words]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert message in err


def test_a_dense_model_with_other_tokens_is_refused(
    capsys: Capture, text_model: TextModel, files: tuple[Path, Path], tmp_path: Path
) -> None:
    other = shutil.copytree(text_model[0], tmp_path / "other")
    byte_level_bpe(280).save(str(other / "tokenizer.json"))
    assert run(["eval", str(text_model[0]), "--text", str(files[0]), "--dense", str(other)]) == 2
    assert "cut the text into different tokens" in capsys.readouterr().err
