"""Calibration text: how it is cut, what it is known by, and what is refused."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path
from typing import Any

import pytest

from pyruntime.engine.tokenizer import Tokenizer
from pyruntime.errors import UsageError
from pyruntime.prune import Calibration, CalibrationOptions, read_calibration

TextModel = tuple[Path, Any]
LINES = ["the cat sat on the mat", "", "once upon a time there was a tab", "a", "it was late and the cat was out"]


@pytest.fixture
def folder(text_model: TextModel) -> Path:
    return text_model[0]


def write(path: Path, lines: list[str]) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps({"text": line, "id": 3}) for line in lines) + "\n")
    else:
        path.write_text("\n".join(lines) + "\n")
    return path


def read(path: Path, folder: Path, **said: Any) -> Calibration:
    return read_calibration(path, folder, 64, CalibrationOptions(**said))


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_separate_texts_are_encoded_each_and_cut(folder: Path, tmp_path: Path, suffix: str) -> None:
    found = read(write(tmp_path / f"text{suffix}", LINES), folder, separate=True, seq_len=7)
    tokenizer = Tokenizer(folder)
    whole = [tokenizer.encode(line) for line in LINES if line]
    assert found.sequences == tuple(tuple(ids[:7]) for ids in whole if len(ids) > 1)
    first = read(tmp_path / f"text{suffix}", folder, separate=True, seq_len=7, num_seqs=2)
    assert first.sequences == found.sequences[:2]


def test_a_stream_holds_every_token_in_order(folder: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "text.txt", LINES * 5)
    found = read(path, folder, seq_len=11, num_seqs=1000)
    tokenizer = Tokenizer(folder)
    head = [] if tokenizer.encode("") == [] else [tokenizer.bos_id]
    assert all(list(sequence[: len(head)]) == head for sequence in found.sequences)
    joined = [token for sequence in found.sequences for token in sequence[len(head) :]]
    stream = tokenizer.encode(path.read_text(), add_special_tokens=False)
    # a last window of a single token is left out
    assert stream[: len(joined)] == joined and len(stream) - len(joined) <= 1
    assert [len(sequence) for sequence in found.sequences[:-1]] == [11] * (len(found.sequences) - 1)


def test_records_are_one_stream_too(folder: Path, tmp_path: Path) -> None:
    found = read(write(tmp_path / "text.jsonl", LINES), folder, num_seqs=100)
    tokenizer = Tokenizer(folder)
    stream = [token for line in LINES for token in tokenizer.encode(line, add_special_tokens=False)]
    assert sum(map(len, found.sequences)) >= len(stream)


@pytest.mark.parametrize("separate", [False, True])
def test_a_seed_draws_the_same_sequences_again(folder: Path, tmp_path: Path, separate: bool) -> None:
    draw = random.Random(0)
    path = write(tmp_path / "text.jsonl", ["".join(draw.choices("abc de", k=40)) for _ in range(50)])
    how = {"separate": separate, "seq_len": 12, "num_seqs": 5}
    first, one, again, two = (read(path, folder, seed=seed, **how) for seed in (None, 1, 1, 2))
    assert one == again
    assert len({each.tokens_sha256 for each in (first, one, two)}) == 3
    everything = set(read(path, folder, separate=separate, seq_len=12, num_seqs=10**6).sequences)
    assert set(one.sequences) <= everything and len(set(one.sequences)) == 5


def test_hashes_are_those_of_the_files(folder: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "text.txt", LINES)
    found = read(path, folder)
    assert found.text_sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert found.tokenizer_sha256 == hashlib.sha256((folder / "tokenizer.json").read_bytes()).hexdigest()
    assert found.source == "text.txt"
    assert found.tokens_sha256 != read(path, folder, seq_len=9).tokens_sha256


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", b"", "holds no text"),
        ("a.txt", b" \n\n\t\n", "holds no text"),
        ("a.jsonl", b'{"text": ""}\n', "holds no text"),
        ("a.txt", b"a", "fewer than two tokens"),
        ("a.txt", b"\xff\xfe", "not UTF-8"),
        ("a.jsonl", b'{"text": "the cat sat"}\n{"txt": "on"}\n', "line 2: has no .text."),
        ("a.jsonl", b'{"text": "the cat sat"}\n["on"]\n', "line 2: is a list"),
        ("a.jsonl", b'{"text": "the cat sat"}\n{"text": 3}\n', "line 2: has no .text."),
        ("a.jsonl", b'{"text": "the cat sat"\n', "line 1.*JSON"),
        ("a.jsonl", b'{"text": "the cat sat", "text": "on"}\n', "stands twice"),
    ],
)
def test_files_without_text_are_refused(folder: Path, tmp_path: Path, name: str, content: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=said) as caught:
        read(tmp_path / name, folder)
    assert caught.value.code == "TEXT"


def test_a_single_token_is_refused_as_separate_text_too(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a\n")
    with pytest.raises(UsageError, match="two tokens"):
        read(tmp_path / "a.txt", folder, separate=True)


def test_sequences_longer_than_the_context_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="65; the model holds 64"):
        read(write(tmp_path / "a.txt", LINES), folder, seq_len=65)


@pytest.mark.parametrize("said", [{"num_seqs": 0}, {"num_seqs": 1.0}, {"seq_len": 1}, {"seq_len": True}, {"seed": 0.5}])
def test_options_that_make_no_sense_are_refused(said: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(said))):
        CalibrationOptions(**said)


def test_a_calibration_of_single_tokens_is_refused() -> None:
    with pytest.raises(UsageError, match="two tokens"):
        Calibration(sequences=((1,), ()))
