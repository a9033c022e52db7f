"""The one door to the disk: every file and folder that pyruntime writes goes through here, whole or not at all."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import re
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from pyruntime.checkpoint.files import io_error
from pyruntime.errors import RunError, UsageError

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
    _check_regular(target, path)
    try:
        with _temporary(target) as temporary:
            with new_file(temporary) as file:
                file.write(data)
            DISK.rename(temporary, target)
            sync_folder(target.parent)
    except OSError as error:
        raise io_error(f"cannot write {path}", error) from None


def check_writable(path: Path) -> None:
    """Raise RunError IO unless `write_text` could begin: for work whose result must not be lost at its end."""
    target = _resolved(path)
    _check_regular(target, path)
    try:
        _try(target)
    except OSError as error:
        raise io_error(f"cannot write {path}", error) from None


def check_folder(folder: Path) -> None:
    """Raise OSError unless files can be made in `folder`."""
    _try(_resolved(folder) / "pyruntime")


def check_output(path: Path, inputs: Sequence[Path]) -> None:
    """Raise UsageError OUTPUT where the file `path`, by whatever way, is one of the `inputs` or lies in one."""
    target = _resolved(path)
    for each in inputs:
        there = _resolved(each)
        # a hard link is the same file under another name
        same = target == there or (target.is_file() and there.is_file() and target.samefile(there))
        if same or target.is_relative_to(there):
            what = "is" if same else "lies in"
            raise UsageError("OUTPUT", f"{path} {what} {each}, which is read and never changed; write to another file")


def make_folder(path: Path) -> None:
    """Make the folder `path`, and those that it lies in, unless they are there. Raises RunError IO."""
    try:
        for folder in (*reversed(path.parents), path):
            if not folder.is_dir():
                with contextlib.suppress(FileExistsError):
                    DISK.mkdir(folder)
        if not path.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
    except OSError as error:
        raise io_error(f"cannot make the folder {path}", error) from None


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


def _try(target: Path) -> None:
    with _temporary(target) as temporary:
        with new_file(temporary):
            pass
        DISK.unlink(temporary)


@contextlib.contextmanager
def _temporary(target: Path) -> Iterator[Path]:
    """A hidden name beside `target`, since a rename does not cross file systems; whatever fails, nothing is left there.

    What killed processes left there is removed too.
    """
    _sweep(target)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        yield temporary
    except BaseException:
        with contextlib.suppress(OSError):
            DISK.unlink(temporary)
        raise


def _sweep(target: Path) -> None:
    form = re.compile(rf"\.{re.escape(target.name)}\.([1-9][0-9]{{0,8}})\.tmp")
    # a folder that lets nobody list it may still be written to
    with contextlib.suppress(OSError):
        for name in os.listdir(target.parent):
            if (found := form.fullmatch(name)) and not _is_alive(int(found[1])):
                DISK.unlink(target.parent / name)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        # somebody else's
        return True
    return True


def _check_regular(target: Path, path: Path) -> None:
    if target.exists() and not target.is_file():
        raise RunError("IO", f"cannot write {path}: it exists and is no regular file; write to another file")
