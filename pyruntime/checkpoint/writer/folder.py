"""A folder that appears whole under its name, or not at all: one writer at a time, on the disk before it is named.

The order: checks, lock, room on the disk, a hidden folder beside the target, files, manifest, names, then one rename.
What a kill leaves is hidden, and removed by the next write to the same target or by `recover`.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from pyruntime.checkpoint.atomic import DISK, NewFile, new_file, remove_tree, sync_folder
from pyruntime.checkpoint.files import io_error, is_there
from pyruntime.checkpoint.manifest import MANIFEST, write_manifest
from pyruntime.errors import RunError, UsageError

# of the bytes to be written: what names and blocks that are not full take beside them
_ROOM: Final = 1.05
# what a file system says that cannot exchange two names
_NO_EXCHANGE: Final = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)
_EXISTS: Final = "remove it, choose another name, or say overwrite (--overwrite)"


@dataclass(frozen=True, slots=True)
class _Places:
    """The target and the hidden names beside it."""

    target: Path

    def _beside(self, end: str) -> Path:
        return self.target.with_name(f".{self.target.name}.{end}")

    @property
    def temporary(self) -> Path:
        return self._beside("pyruntime-tmp")

    @property
    def old(self) -> Path:
        """Where the old folder is for a moment if the file system cannot exchange two names."""
        return self._beside("pyruntime-old")

    @property
    def lock(self) -> Path:
        return self._beside("lock")


class NewFolder:
    """A folder in the making; `path` is where it is until `commit` gives it its name."""

    def __init__(self, places: _Places) -> None:
        self._places = places
        self.path = places.temporary
        self.notes: tuple[str, ...] = ()

    def begin(self, num_bytes: int) -> None:
        """Make the folder, if the disk has room for `num_bytes`. Raises RunError IO or OSError."""
        room, needed = DISK.free_bytes(self.path.parent), int(num_bytes * _ROOM)
        if room < needed:
            raise RunError(
                "IO",
                f"cannot write {self._places.target}: ENOSPC ({needed} bytes are needed, {room} are free in "
                f"{self.path.parent}); see to the disk",
            )
        DISK.mkdir(self.path)

    @contextlib.contextmanager
    def file(self, name: str) -> Iterator[NewFile]:
        """A new file of the folder. Raises OSError."""
        with new_file(self.path / name) as file:
            yield file

    def commit(
        self,
        made: Mapping[str, Any],
        check: Callable[[Path], None],
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Write the manifest, let `check` judge the folder and give it its name. Raises OSError and as `check`."""
        # the manifest is the last file, and with its name all names in the folder are brought to the disk
        write_manifest(self.path, made, progress)
        check(self.path)
        _rename(self._places)
        sync_folder(self._places.target.parent)


@contextlib.contextmanager
def new_folder(
    out: Path, *, sources: Sequence[Path] = (), overwrite: bool = False, wait: bool = False
) -> Iterator[NewFolder]:
    """A folder that will be called `out`; without its `commit`, nothing is left of it.

    `sources` are folders that it is made from. Another writer to `out` is waited for, or refused. Raises UsageError
    OUTPUT where `out` may not be written, RunError LOCKED, or RunError IO for every OSError inside.
    """
    folder: NewFolder | None = None
    try:
        places = _places(out, sources)
        _check_target(places.target, overwrite)
        with _locked(places, wait):
            _recover(places)
            # another writer may have been faster
            _check_target(places.target, overwrite)
            folder = NewFolder(places)
            try:
                yield folder
            finally:
                folder.notes += _clean(places)
    except OSError as error:
        left = "".join(f"; {note}" for note in folder.notes) if folder is not None else ""
        failed = io_error(f"cannot write {out}", error)
        raise RunError(failed.code, f"{failed}{left}") from None


def recover(out: Path) -> tuple[str, ...]:
    """Put right what a write of `out` left that was killed: the folder as it was, and nothing beside it.

    What was found, in words; nothing while another writer is at work. Raises RunError IO.
    """
    places = _places(out, ())
    left = [path for path in (places.temporary, places.old) if os.path.lexists(path)]
    if not left:
        return ()
    try:
        with _locked(places, wait=False):
            lost = not os.path.lexists(places.target)
            _recover(places)
    except OSError as error:
        raise io_error(f"cannot remove {left[0]}", error) from None
    except RunError as error:
        if error.code != "LOCKED":
            raise
        return ()
    notes = [f"removed {path.name}, left by a write that was killed" for path in left if not lost or path != places.old]
    if lost and places.old in left:
        notes.append(f"gave {places.target.name} back its name, which a write that was killed had taken")
    return tuple(notes)


def _places(out: Path, sources: Sequence[Path]) -> _Places:
    """The names to be used. Raises UsageError OUTPUT for a target that touches one of the `sources`."""
    parent, name = os.path.split(os.path.abspath(out))
    if not name:
        raise UsageError("OUTPUT", f"{out} cannot be written; expected the name of a new folder")
    target = Path(os.path.realpath(parent)) / name
    for source in sources:
        there = Path(os.path.realpath(source))
        if target == there or target.is_relative_to(there) or there.is_relative_to(target):
            raise UsageError("OUTPUT", f"{out} is, holds or lies in {source}, which is never changed; write beside it")
    return _Places(target)


def _check_target(target: Path, overwrite: bool) -> None:
    """Raise UsageError OUTPUT unless a folder may be put at `target`."""
    if target.is_symlink():
        raise UsageError("OUTPUT", f"{target} is a link; name the folder that it leads to, or remove it")
    if not is_there(target):
        return
    if not target.is_dir():
        raise UsageError("OUTPUT", f"{target} exists and is no folder; choose another name")
    if not overwrite:
        raise UsageError("OUTPUT", f"{target} exists; {_EXISTS}")
    if target.stat().st_dev != target.parent.stat().st_dev:
        raise UsageError("OUTPUT", f"{target} is another file system than {target.parent}; write into a folder of it")
    names = os.listdir(target)
    if names and not {MANIFEST, "config.json"} & set(names):
        raise UsageError("OUTPUT", f"{target} holds no checkpoint; remove it yourself if nothing in it is needed")


@contextlib.contextmanager
def _locked(places: _Places, wait: bool) -> Iterator[None]:
    """Hold the lock of the target; its file is removed behind, if it can be.

    The kernel frees the lock of a process that ends. The file is removed while the lock is held, so whoever gets the
    lock of a file that has no name any more takes another turn.
    """
    while True:
        fd = DISK.open(places.lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW)
        try:
            DISK.lock(fd, wait)
            if _is_still(places.lock, fd):
                break
        except BlockingIOError:
            os.close(fd)
            raise RunError(
                "LOCKED",
                f"{places.target} is being written by another process; wait for it (--wait), or write elsewhere",
            ) from None
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)
    try:
        yield
    finally:
        try:
            # a lock file that stays is no harm
            with contextlib.suppress(OSError):
                DISK.unlink(places.lock)
        finally:
            os.close(fd)


def _is_still(path: Path, fd: int) -> bool:
    try:
        return os.path.samestat(os.lstat(path), os.fstat(fd))
    except FileNotFoundError:
        return False


def _rename(places: _Places) -> None:
    """Let the new folder take its name, and the place of an old one."""
    if not is_there(places.target):
        DISK.rename(places.temporary, places.target)
        return
    try:
        DISK.exchange(places.temporary, places.target)
        return
    except OSError as error:
        if error.errno not in _NO_EXCHANGE:
            raise
    # a kill between the two leaves only the old folder under its other name; `_recover` gives it back
    DISK.rename(places.target, places.old)
    DISK.rename(places.temporary, places.target)


def _recover(places: _Places) -> None:
    if is_there(places.old) and not is_there(places.target):
        DISK.rename(places.old, places.target)
    remove_tree(places.old)
    remove_tree(places.temporary)


def _clean(places: _Places) -> tuple[str, ...]:
    """Leave nothing beside the target: be it what was not finished, or what was replaced. Notes on what stays."""
    with contextlib.suppress(OSError, RunError):
        _recover(places)
    left = [path.name for path in (places.temporary, places.old) if os.path.lexists(path)]
    return tuple(f"{name} is left beside it; the next write, or pyruntime verify, removes it" for name in left)
