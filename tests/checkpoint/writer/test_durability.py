"""A power cut: nothing gets the target's name before all of it is on the disk, data and names alike."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pyruntime.checkpoint.atomic import Disk, write_text
from tests.checkpoint.writer.faults import CALLS, Case


class Memory:
    """What a disk has heard of and not yet kept: data of files, names in folders."""

    def __init__(self) -> None:
        self.paths: dict[int, Path] = {}
        self.data: set[Path] = set()
        self.names: set[Path] = set()
        self.named: list[Path] = []

    def hear(self, call: str, args: tuple[Any, ...], result: Any) -> None:
        if call == "open":
            self.paths[result] = args[0]
            if args[1] & os.O_CREAT:
                self.data.add(args[0])
                self.names.add(args[0].parent)
        elif call == "write":
            self.data.add(self.paths[args[0]])
        elif call == "fsync":
            path = self.paths[args[0]]
            (self.names if path.is_dir() else self.data).discard(path)
        elif call in ("rename", "exchange"):
            # data go with the file; who looks for them under the new name finds what was kept under the old
            self.data = {args[1] if path == args[0] else path for path in self.data}
            self.names |= {args[0].parent, args[1].parent}
        elif call in ("mkdir", "unlink", "rmdir"):
            self.names.add(args[0].parent)

    def before(self, call: str, args: tuple[Any, ...], out: Path) -> None:
        """What takes the name `out` must be kept whole."""
        if call in ("rename", "exchange") and args[1] == out:
            self.named.append(args[0])
            assert not [path for path in self.data if path == args[0] or args[0] in path.parents]
            assert args[0] not in self.names


def watched(patch: pytest.MonkeyPatch, memory: Memory, out: Path) -> None:
    def watch(name: str, honest: Callable[..., Any]) -> Callable[..., Any]:
        def call(disk: Disk, *args: Any) -> Any:
            memory.before(name, args, out)
            result = honest(disk, *args)
            memory.hear(name, args, result)
            return result

        return call

    for name in CALLS:
        patch.setattr(Disk, name, watch(name, getattr(Disk, name)))


def test_a_folder_is_on_the_disk_before_it_is_named(case: Case, tmp_path: Path) -> None:
    out = case.start(tmp_path / "parent")
    memory = Memory()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Disk, "fsync", lambda disk, fd: os.fsync(fd))
        watched(patch, memory, out)
        case.write(out, 1)
    assert set(memory.named) == {out.with_name(".out.pyruntime-tmp")}
    assert not memory.data - {out.parent / ".out.lock"}


def test_the_new_name_is_on_the_disk_before_the_old_folder_is_removed(case: Case, tmp_path: Path) -> None:
    """Else a power cut could leave neither."""
    out = case.start(tmp_path / "parent")
    memory = Memory()
    kept: list[bool] = []
    honest = Disk.unlink

    def unlink(disk: Disk, path: Path) -> None:
        if path.parent.name in (".out.pyruntime-tmp", ".out.pyruntime-old") and path.name == "config.json":
            kept.append(out.parent not in memory.names)
        honest(disk, path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Disk, "unlink", unlink)
        watched(patch, memory, out)
        case.write(out, 1)
    assert kept == ([] if case.before is None else [True])


@pytest.mark.parametrize("before", ["nothing", "a text"])
def test_a_text_is_on_the_disk_before_it_is_named_and_its_name_after_it(before: str, tmp_path: Path) -> None:
    out, memory = tmp_path / "scores.json", Memory()
    if before == "a text":
        write_text(out, "old")
    unkept: list[set[Path]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "before", lambda call, *_: unkept.append(set(memory.data)) if call == "rename" else None)
        watched(patch, memory, out)
        write_text(out, "new")
    assert unkept == [set()]
    assert not memory.data and not memory.names
    assert out.read_text() == "new"
