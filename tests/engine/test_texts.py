"""Texts in files: what is read, by line or whole, what is refused, and the text that comes with the package."""

from __future__ import annotations

import hashlib
import json
import tomllib
from pathlib import Path

import pytest

from pyruntime.engine import texts
from pyruntime.engine.texts import default_text, read_records, read_texts
from pyruntime.errors import UsageError

ROOT = Path(__file__).parents[2]
LINES = ["the cat", "", "  ", "sat\ron \u00fc", "end"]


def test_the_text_of_the_package_is_that_of_the_examples() -> None:
    assert default_text().read_bytes() == (ROOT / "examples/held_out.txt").read_bytes()
    (text,) = read_texts(default_text()).texts
    assert len(text) > 40_000


def test_the_text_is_part_of_the_wheel() -> None:
    data = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["package-data"]
    assert any(default_text().match(pattern) for pattern in data["*"])


def test_a_file_is_one_text_or_one_a_line(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("\n".join(LINES).encode())
    assert read_texts(path).texts == (path.read_bytes().decode(),)
    assert read_texts(path, by_line=True).texts == ("the cat", "sat\ron \u00fc", "end")
    assert read_texts(path).sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("by_line", [False, True])
def test_records_are_a_text_each(tmp_path: Path, by_line: bool) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\n\n".join(json.dumps({"text": each, "id": 1}) for each in LINES))
    assert read_texts(path, by_line=by_line).texts == ("the cat", "sat\ron \u00fc", "end")


@pytest.mark.parametrize("by_line", [False, True])
def test_texts_beyond_the_limit_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by_line: bool) -> None:
    monkeypatch.setattr(texts, "MAX_TEXT_BYTES", 30)
    path = tmp_path / "a.txt"
    path.write_text("a" * 30 + ("\nb" if by_line else ""))
    assert read_texts(path, by_line=by_line).texts[0] == "a" * 30
    path.write_text("a" * 31)
    with pytest.raises(UsageError, match=r"has 31 bytes; texts of at most 30 are read: cut it, or save it as \.jsonl"):
        read_texts(path, by_line=by_line)


def test_records_beyond_the_limit_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n{"text": "ab"}\n')
    monkeypatch.setattr(texts, "MAX_TEXT_BYTES", 13)
    for read in (read_texts, lambda path: list(read_records(path, "TEXT"))):
        with pytest.raises(UsageError, match="line 2: has 14 bytes"):
            read(path)


def test_files_beyond_the_limit_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    path.write_text("the cat")
    monkeypatch.setattr(texts, "MAX_FILE_BYTES", 7)
    assert read_texts(path).texts == ("the cat",)
    monkeypatch.setattr(texts, "MAX_FILE_BYTES", 6)
    with pytest.raises(UsageError, match="has 7 bytes; at most 6 are read: cut it"):
        read_texts(path)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none.txt", tmp_path / "none.jsonl"):
        with pytest.raises(UsageError, match="is no file"):
            read_texts(path)
