"""Several writers of one folder: one at a time, and what is there is whole whoever was last."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from pyruntime.checkpoint.atomic import Disk
from pyruntime.checkpoint.manifest import verify_manifest
from pyruntime.checkpoint.writer import Written, recover, write_native
from pyruntime.errors import PyruntimeError, RunError
from tests.checkpoint.writer.faults import contents, in_child
from tests.specs import ATTENTION, PLAIN_MLP, model_of, random_model

MODEL = random_model(model_of([(ATTENTION, PLAIN_MLP, False)]))
NUM_WRITERS = 8
ROUNDS = 5


def write(out: Path, **options: Any) -> Written:
    return write_native(MODEL, out, dtype="float32", **options)


def attempt(out: Path, **options: Any) -> int:
    """The exit status of a command that writes."""
    try:
        write(out, **options)
    except PyruntimeError as error:
        return error.exit_code
    return 0


def at_the_start(act: Callable[[], object]) -> pytest.MonkeyPatch:
    """Let `act` happen when a writer that holds the lock makes its folder."""
    patch = pytest.MonkeyPatch()
    honest = Disk.mkdir

    def mkdir(disk: Disk, path: Path) -> None:
        act()
        honest(disk, path)

    patch.setattr(Disk, "mkdir", mkdir)
    return patch


def test_of_eight_writers_one_wins_and_the_others_say_so_while_it_writes(tmp_path: Path) -> None:
    for number in range(ROUNDS):
        out = tmp_path / str(number) / "out"
        out.parent.mkdir()
        refused, tell = os.pipe()

        def hold(read: int = refused) -> None:
            for _ in range(NUM_WRITERS - 1):
                os.read(read, 1)

        def work(out: Path = out, say: int = tell) -> int:
            # the winner goes on when all others have been refused
            at_the_start(hold)
            status = attempt(out)
            os.write(say, b"x")
            return status

        waits = [in_child(work) for _ in range(NUM_WRITERS)]
        assert sorted(wait() for wait in waits) == [0] + [6] * (NUM_WRITERS - 1)
        os.close(refused)
        os.close(tell)
        assert len(verify_manifest(out)) == 2
        assert os.listdir(out.parent) == ["out"]


def test_writers_that_wait_all_write(tmp_path: Path) -> None:
    """The lock's file is removed and made anew all the time."""
    for number in range(ROUNDS):
        out = tmp_path / str(number) / "out"
        out.parent.mkdir()
        waits = [in_child(partial(attempt, out, wait=True, overwrite=True)) for _ in range(NUM_WRITERS)]
        assert [wait() for wait in waits] == [0] * NUM_WRITERS
        assert len(verify_manifest(out)) == 2
        assert os.listdir(out.parent) == ["out"]


def test_writers_that_do_not_wait_write_or_are_refused(tmp_path: Path) -> None:
    for number in range(ROUNDS):
        out = tmp_path / str(number) / "out"
        out.parent.mkdir()
        waits = [in_child(partial(attempt, out, overwrite=True)) for _ in range(NUM_WRITERS)]
        statuses = {wait() for wait in waits}
        assert 0 in statuses and statuses <= {0, 6}
        assert len(verify_manifest(out)) == 2
        assert os.listdir(out.parent) == ["out"]


def test_the_lock_of_a_process_that_was_killed_is_free(tmp_path: Path) -> None:
    def work() -> int:
        at_the_start(lambda: os.kill(os.getpid(), signal.SIGKILL))
        return attempt(tmp_path / "out")

    assert in_child(work)() == -signal.SIGKILL
    assert os.listdir(tmp_path) == [".out.lock"]
    write(tmp_path / "out")
    assert os.listdir(tmp_path) == ["out"]


def test_who_finds_the_folder_when_the_lock_is_free_is_told_that_it_exists(tmp_path: Path) -> None:
    first = tmp_path / "out"
    write(first)
    before = contents(first)
    with pytest.raises(PyruntimeError, match="exists"):
        write(first, wait=True)
    assert contents(first) == before


def test_recovery_leaves_a_writer_at_work_alone(tmp_path: Path) -> None:
    out = tmp_path / "out"
    found: list[tuple[str, ...]] = []
    honest = Disk.rename

    def rename(disk: Disk, source: Path, target: Path) -> None:
        if target == out:
            found.append(recover(out))
        honest(disk, source, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Disk, "rename", rename)
        write(out)
    assert found == [()]
    assert len(verify_manifest(out)) == 2


def test_a_refused_writer_names_the_folder_and_what_to_do(tmp_path: Path) -> None:
    errors: list[RunError] = []

    def second() -> None:
        with pytest.raises(RunError, match=r"being written by another process.*--wait") as caught:
            write(tmp_path / "out")
        errors.append(caught.value)

    patch = at_the_start(second)
    try:
        # the second writer runs in here, and finds the lock of the first
        write(tmp_path / "out")
    finally:
        patch.undo()
    assert [(error.code, error.exit_code) for error in errors] == [("LOCKED", 6)]
