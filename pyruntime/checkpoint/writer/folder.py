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

from pyruntime.checkpoint.atomic import DISK, NewFile, check_folder, new_file, remove_tree, sync_folder
from pyruntime.checkpoint.files import io_error, is_there
from pyruntime.checkpoint.manifest import MANIFEST, write_manifest
from pyruntime.checkpoint.writer.names import is_checkpoint_file
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

    def __init__(self, places: _Places, overwrite: bool) -> None:
        self._places = places
        self._overwrite = overwrite
        # where the old folder is while it might have to be put back
        self._old: Path | None = None
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
        """Write the manifest, let `check` judge the folder and give it its name.

        Raises OSError, as `check`, and UsageError OUTPUT for what came into the old folder in the meantime.
        """
        # the manifest is the last file, and with its name all names in the folder are brought to the disk
        write_manifest(self.path, made, progress)
        check(self.path)
        _check_target(self._places.target, self._overwrite)
        self._old = _rename(self._places)
        try:
            sync_folder(self._places.target.parent)
        except BaseException:
            self._put_back()
            raise
        self._old = None

    def clean(self) -> None:
        """Leave nothing beside the target, be it what was not finished or what was replaced; `notes` on what stays."""
        target, old = self._places.target, self._old
        if old is not None and os.path.lexists(target):
            note = f"{old.name} beside it is the old folder: move it away before the next write or verify removes it"
            self.notes += (note,)
            return
        with contextlib.suppress(OSError, RunError):
            _recover(self._places)
        left = [path for path in (self._places.temporary, self._places.old) if os.path.lexists(path)]
        does = "removes it" if os.path.lexists(target) or self._places.old not in left else "puts it right"
        self.notes += tuple(
            f"{path.name} is left beside it; the next write, or pyruntime verify, {does}" for path in left
        )

    def _put_back(self) -> None:
        """Take the name back from the new folder, and give it to the old one, if there was one."""
        places, old = self._places, self._old
        try:
            if old == places.temporary:
                DISK.exchange(places.temporary, places.target)
            else:
                DISK.rename(places.target, places.temporary)
                if old is not None:
                    DISK.rename(old, places.target)
        except OSError:
            if old is None:
                self.notes += ("the new folder has its name, but a power cut may take it",)
            return
        self._old = None
        # the disk has refused it once
        with contextlib.suppress(OSError):
            sync_folder(places.target.parent)


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
            folder = NewFolder(places, overwrite)
            try:
                yield folder
            finally:
                folder.clean()
    except OSError as error:
        left = "".join(f"; {note}" for note in folder.notes) if folder is not None else ""
        failed = io_error(f"cannot write {out}", error)
        raise RunError(failed.code, f"{failed}{left}") from None


def check_target(out: Path, sources: Sequence[Path], overwrite: bool) -> None:
    """Raise what a write to `out` would raise before it begins: for work whose result must not be lost at its end.

    UsageError OUTPUT where `out` may not be written, RunError IO where its parent cannot be; not RunError LOCKED.
    """
    places = _places(out, sources)
    try:
        _check_target(places.target, overwrite)
        check_folder(places.target.parent)
    except OSError as error:
        raise io_error(f"cannot write {out}", error) from None


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
    _check_entries(target)


def _check_entries(target: Path) -> None:
    """Raise UsageError OUTPUT where the folder holds anything beside the files of a checkpoint."""
    with os.scandir(target) as found:
        entries = sorted(found, key=lambda entry: entry.name)
    if entries and not {MANIFEST, "config.json"} & {entry.name for entry in entries}:
        raise UsageError("OUTPUT", f"{target} holds no checkpoint; remove it yourself if nothing in it is needed")
    for entry in entries:
        if not (entry.is_file(follow_symlinks=False) and is_checkpoint_file(entry.name)):
            raise UsageError(
                "OUTPUT",
                f"{target} holds {entry.name!r}, which no checkpoint needs; move it away, or write to another folder",
            )


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


def _rename(places: _Places) -> Path | None:
    """Let the new folder take its name, and the place of an old one; where that is now."""
    if not is_there(places.target):
        DISK.rename(places.temporary, places.target)
        return None
    try:
        DISK.exchange(places.temporary, places.target)
        return places.temporary
    except OSError as error:
        if error.errno not in _NO_EXCHANGE:
            raise
    # a kill between the two leaves only the old folder under its other name; `_recover` gives it back
    DISK.rename(places.target, places.old)
    DISK.rename(places.temporary, places.target)
    return places.old


def _recover(places: _Places) -> None:
    if is_there(places.old) and not is_there(places.target):
        DISK.rename(places.old, places.target)
    remove_tree(places.old)
    remove_tree(places.temporary)
