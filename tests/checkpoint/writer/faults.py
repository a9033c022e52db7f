"""A disk whose nth call fails or kills the process, and what a folder holds."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import pytest

from pyruntime.checkpoint.atomic import Disk
from pyruntime.checkpoint.manifest import verify_manifest
from pyruntime.checkpoint.writer import recover

CALLS = tuple(name for name in vars(Disk) if not name.startswith("_") and name != "free_bytes")
KILLED = 9
# more calls than any write of these tests makes
MANY = 1000

Write = Callable[[Path, int], object]


class Faults:
    """Counts the calls that change the disk; the `at`th ends in `fault`, and where `forever`, all behind it too."""

    def __init__(self, at: int, fault: Callable[[], NoReturn], forever: bool = False) -> None:
        self.at = at
        self.fault = fault
        self.forever = forever
        self.count = 0

    @property
    def fired(self) -> bool:
        return self.count >= self.at

    def due(self) -> bool:
        self.count += 1
        return self.count == self.at or (self.forever and self.fired)


def full() -> NoReturn:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def broken() -> NoReturn:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def killed() -> NoReturn:
    os._exit(KILLED)


@contextmanager
def injected(faults: Faults) -> Iterator[Faults]:
    """Every call that changes the disk goes through `faults`."""
    with pytest.MonkeyPatch.context() as patch:
        for name in CALLS:
            patch.setattr(Disk, name, _faulty(name, getattr(Disk, name), faults))
        yield faults


def _faulty(name: str, honest: Callable[..., Any], faults: Faults) -> Callable[..., Any]:
    def call(disk: Disk, *args: Any) -> Any:
        if not faults.due():
            return honest(disk, *args)
        if name == "write":
            # half of the data gets there
            honest(disk, args[0], args[1][: len(args[1]) // 2])
        if name == "close":
            # what fails to close is closed all the same
            honest(disk, *args)
        return faults.fault()

    return call


@contextmanager
def no_fsync() -> Iterator[None]:
    """A disk that is asked to keep nothing: these tests pull no plug."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Disk, "fsync", lambda disk, fd: None)
        yield


@contextmanager
def no_exchange() -> Iterator[None]:
    """A file system that cannot let two names change places."""

    def refuse(disk: Disk, one: Path, other: Path) -> NoReturn:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Disk, "exchange", refuse)
        yield


def contents(folder: Path) -> dict[str, bytes] | None:
    """Every file of a folder; None where there is no folder."""
    if not folder.is_dir():
        return None
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@dataclass(frozen=True)
class Case:
    """A writer of two versions of a folder, and a folder with the first of them, or None."""

    write: Write
    before: Path | None
    versions: tuple[dict[str, bytes] | None, dict[str, bytes] | None]
    two_steps: bool

    def start(self, parent: Path) -> Path:
        """A folder `out` as it is before the write."""
        parent.mkdir()
        if self.before is not None:
            shutil.copytree(self.before, parent / "out")
        return parent / "out"

    def check(self, out: Path, finished: bool, recoverable: bool) -> None:
        """What is there verifies and is new where `finished`, else old; the next write succeeds, leaving nothing else.

        What is `recoverable`, since a kill or a disk that refuses everything lets nothing be put back, may be either,
        and where old and new cannot change places at once, may have lost its name for the moment.
        """
        if self.two_steps and recoverable:
            recover(out)
        found = contents(out)
        old = self.versions[0] if self.before is not None else None
        assert found in ([self.versions[1]] if finished else [old, self.versions[1]] if recoverable else [old])
        if found is not None:
            verify_manifest(out)
        self.write(out, 1)
        assert contents(out) == self.versions[1]
        assert os.listdir(out.parent) == ["out"]
        shutil.rmtree(out.parent)


def in_child(work: Callable[[], int]) -> Callable[[], int]:
    """Start `work` in a child process; what is returned waits for its exit status."""
    pid = os.fork()
    if pid == 0:
        status = 70
        try:
            status = work()
        finally:
            # nothing of the test runner's own may run here
            os._exit(status)

    def wait() -> int:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    return wait
