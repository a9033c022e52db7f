"""Files are written whole or not at all, and links, devices and folders are not replaced."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pyruntime.checkpoint.atomic import check_writable, write_text
from pyruntime.errors import RunError


def test_text_is_written_over_old_text_and_nothing_is_left_behind(tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    for text in ("longer than the next", "é\n"):
        check_writable(file)
        write_text(file, text)
        assert file.read_bytes() == text.encode()
    assert os.listdir(tmp_path) == ["out.json"]


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "target")
    write_text(tmp_path / "link", "x")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_text() == "x"


@pytest.mark.parametrize("place", ["missing/out", "file/out", "folder", "pipe", "/dev/null", "/proc/out"])
def test_what_cannot_be_written_is_refused_by_both(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    before = sorted(os.listdir(tmp_path))
    for refuse in (check_writable, lambda path: write_text(path, "x")):
        with pytest.raises(RunError, match=f"cannot write {tmp_path / place}: ") as caught:
            refuse(tmp_path / place)
        assert (caught.value.code, caught.value.exit_code) == ("IO", 5)
        assert "None" not in str(caught.value)
    assert sorted(os.listdir(tmp_path)) == before


def test_a_write_that_fails_leaves_the_old_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_text(tmp_path / "out", "old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match="No space left"):
        write_text(tmp_path / "out", "new")
    assert (tmp_path / "out").read_text() == "old"
    assert os.listdir(tmp_path) == ["out"]
