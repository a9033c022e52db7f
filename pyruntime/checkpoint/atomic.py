"""The one door to the disk: every file and folder that pyruntime writes goes through here, whole or not at all."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from pyruntime.errors import RunError

_AT_FDCWD: Final = -100
_RENAME_EXCHANGE: Final = 2


class Disk:
    """The calls that change a disk, a method each: a test that lets the nth of them fail sees all there are.

    All raise OSError.
    """

    def open(self, path: Path, flags: int) -> int:
        """A descriptor of `path`; a new file has the mode that the umask leaves."""
        return os.open(path, flags | os.O_CLOEXEC, 0o666)

    def write(self, fd: int, data: memoryview) -> int:
        """How many bytes of `data` were written."""
        return os.write(fd, data)

    def fsync(self, fd: int) -> None:
        """Bring a file, or the names in a folder, to the disk itself."""
        os.fsync(fd)

    def close(self, fd: int) -> None:
        """Close a descriptor."""
        os.close(fd)

    def rename(self, source: Path, target: Path) -> None:
        """Give `source` the name `target`, whose file, or empty folder, is gone then."""
        os.rename(source, target)

    def exchange(self, one: Path, other: Path) -> None:
        """Let two names change places at once. Where the file system cannot: OSError EINVAL or ENOSYS."""
        call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
        if call is None:
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
        if call(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))

    def mkdir(self, path: Path) -> None:
        """Make a folder with the mode that the umask leaves."""
        os.mkdir(path)

    def unlink(self, path: Path) -> None:
        """Remove a name that is no folder's."""
        os.unlink(path)

    def rmdir(self, path: Path) -> None:
        """Remove an empty folder."""
        os.rmdir(path)

    def lock(self, fd: int, wait: bool) -> None:
        """Lock the open file against other processes. Without `wait`, BlockingIOError where one has it."""
        fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))

    def free_bytes(self, folder: Path) -> int:
        """Bytes that may still be written to the file system of `folder`."""
        status = os.statvfs(folder)
        return status.f_bavail * status.f_frsize


DISK: Final = Disk()


def write_text(path: Path, text: str) -> None:
    """Write `text` as the file `path`, whole or not at all. Raises RunError IO."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` as the file `path`, whole or not at all. Raises RunError IO."""
    # a rename would put a file in the place of a link, a device or a pipe
    target = _resolved(path)
    temporary = _beside(target)
    try:
        _check_regular(target)
        with new_file(temporary) as file:
            file.write(data)
        DISK.rename(temporary, target)
        sync_folder(target.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            DISK.unlink(temporary)
        raise RunError("IO", f"cannot write {path}: {error.strerror}") from None


def check_writable(path: Path) -> None:
    """Raise RunError IO unless `write_text` could begin: for work whose result must not be lost at its end."""
    target = _resolved(path)
    temporary = _beside(target)
    try:
        _check_regular(target)
        with new_file(temporary):
            pass
        DISK.unlink(temporary)
    except OSError as error:
        with contextlib.suppress(OSError):
            DISK.unlink(temporary)
        raise RunError("IO", f"cannot write {path}: {error.strerror}") from None


class NewFile:
    """A file that is being written, from its beginning on."""

    def __init__(self, path: Path) -> None:
        self.fd = DISK.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW)

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Append all of `data`. Raises OSError."""
        left = memoryview(data)
        while left:
            left = left[DISK.write(self.fd, left) :]


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[NewFile]:
    """A new file in place of what is called `path`; behind the block it is on the disk itself. Raises OSError."""
    file = NewFile(path)
    try:
        yield file
        DISK.fsync(file.fd)
    except BaseException:
        with contextlib.suppress(OSError):
            DISK.close(file.fd)
        raise
    DISK.close(file.fd)


def sync_folder(folder: Path) -> None:
    """Bring the names in `folder` to the disk itself. Raises OSError."""
    fd = DISK.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        DISK.fsync(fd)
    finally:
        DISK.close(fd)


def remove_tree(path: Path) -> None:
    """Remove `path` with everything in it, if it is there; links are removed, not followed. Raises OSError."""
    try:
        status = path.lstat()
    except FileNotFoundError:
        return
    if not stat.S_ISDIR(status.st_mode):
        DISK.unlink(path)
        return
    for name in sorted(os.listdir(path)):
        remove_tree(path / name)
    DISK.rmdir(path)


def _resolved(path: Path) -> Path:
    # unlike Path.resolve, this raises nothing for a link to itself
    return Path(os.path.realpath(path))


def _beside(target: Path) -> Path:
    # a rename does not cross file systems
    return target.with_name(f".{target.name}.{os.getpid()}.tmp")


def _check_regular(target: Path) -> None:
    if target.exists() and not target.is_file():
        raise OSError(None, "it exists and is no regular file")
