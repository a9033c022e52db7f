"""Files are written whole or not at all, and links, devices and folders are not replaced."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from pyruntime.checkpoint.atomic import Disk, check_output, check_writable, make_folder, write_text
from pyruntime.errors import RunError, UsageError
from tests.checkpoint.writer.faults import in_child


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
        # what to do
        assert "; " in str(caught.value)
    assert sorted(os.listdir(tmp_path)) == before


def test_a_write_that_fails_leaves_the_old_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_text(tmp_path / "out", "old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match=r"ENOSPC \(No space left on device\); see to the disk"):
        write_text(tmp_path / "out", "new")
    assert (tmp_path / "out").read_text() == "old"
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("call", ["open", "write", "fsync", "close", "rename"])
def test_an_interrupt_leaves_the_old_text_and_nothing_else(
    tmp_path: Path, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_text(tmp_path / "out", "old")
    honest = getattr(Disk, call)

    def interrupt(*args: object) -> None:
        if call != "rename":
            honest(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(Disk, call, interrupt)
    calls: tuple[Callable[[Path], None], ...] = (lambda path: write_text(path, "new"), check_writable)
    for write in calls if call in ("open", "fsync", "close") else calls[:1]:
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path / "out")
        assert os.listdir(tmp_path) == ["out"]
    assert (tmp_path / "out").read_text() == "old"


def test_what_killed_processes_left_is_removed_by_the_next_write_and_nothing_else_is(tmp_path: Path) -> None:
    def work() -> int:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Disk, "rename", lambda *_: os._exit(9))
            write_text(tmp_path / "out.json", "half")
        return 0

    assert in_child(work)() == 9
    (left,) = os.listdir(tmp_path)
    assert left.startswith(".out.json.")
    # of a process that is alive, of another file, and of somebody else
    others = [f".out.json.{os.getppid()}.tmp", left.replace("out", "other"), ".out.json.1x.tmp", left + "x"]
    for name in others:
        (tmp_path / name).touch()
    write_text(tmp_path / "out.json", "new")
    assert sorted(os.listdir(tmp_path)) == sorted(["out.json", *others])


def test_an_output_that_is_an_input_or_lies_in_one_is_refused(tmp_path: Path) -> None:
    model, text = tmp_path / "model", tmp_path / "text"
    (model / "deep").mkdir(parents=True)
    text.write_text("x")
    (tmp_path / "hard").hardlink_to(text)
    (tmp_path / "link").symlink_to(text)
    (tmp_path / "way").symlink_to(model)
    inputs = [model, text, tmp_path / "nowhere"]
    bad = ("text", "hard", "link", "model", "model/new", "model/deep/new", "way/new", "model/../text", "nowhere")
    for name in bad:
        with pytest.raises(UsageError, match=r"(is|lies in) .*; write to another file") as caught:
            check_output(tmp_path / name, inputs)
        assert caught.value.code == "OUTPUT"
    for name in ("new", "model.json", "text.json", "missing/new"):
        check_output(tmp_path / name, inputs)


def test_a_folder_is_made_with_those_that_it_lies_in(tmp_path: Path) -> None:
    for _ in range(2):
        make_folder(tmp_path / "a" / "b")
        assert (tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").touch()
    for place, name in (("file", "ENOTDIR"), ("file/b", "ENOTDIR")):
        with pytest.raises(RunError, match=f"cannot make the folder {tmp_path / place}: {name}") as caught:
            make_folder(tmp_path / place)
        assert caught.value.code == "IO"


def test_a_folder_that_cannot_be_made_is_an_error_of_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(Disk, "mkdir", broken)
    with pytest.raises(RunError, match="EIO") as caught:
        make_folder(tmp_path / "a")
    assert caught.value.exit_code == 5
