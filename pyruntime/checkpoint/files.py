"""Opening what a checkpoint folder holds: regular files only, and links only where they may lead."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import Any, Final

from pyruntime import env
from pyruntime.errors import CheckpointError, RunError

# a FIFO must not hang the reader
_FLAGS: Final = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
_WHOLE: Final = "get the whole checkpoint"
_ADVICE: Final = {
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "the machine has too many open files",
    errno.EACCES: "see to the permissions",
    errno.EPERM: "see to the permissions",
    errno.ENOSPC: "see to the disk",
    errno.EIO: "see to the disk",
}


def io_error(what: str, error: OSError) -> RunError:
    """RunError IO: what failed, the system's name for the reason, such as EIO, and what to see to."""
    number = error.errno or 0
    name = errno.errorcode.get(number, type(error).__name__)
    advice = _ADVICE.get(number, "see to the disk or the permissions")
    return RunError("IO", f"{what}: {name} ({error.strerror or error}); {advice}")


def is_bare_name(name: Any) -> bool:
    """Whether `name` is the printable name of a file that is not hidden, and no path."""
    return (
        isinstance(name, str)
        and 0 < len(name.encode(errors="surrogatepass")) <= 255
        and name.isprintable()
        and not name.startswith(".")
        and not set(name) & {"/", "\\"}
    )


def listed(folder: Path) -> list[str]:
    """Names in `folder`, sorted. Raises RunError IO."""
    try:
        return sorted(os.listdir(folder))
    except OSError as error:
        raise io_error(f"cannot read {folder}", error) from None


def is_there(path: Path) -> bool:
    """Whether anything, be it a link that leads nowhere, is called `path`. Raises RunError IO."""
    try:
        path.lstat()
    except FileNotFoundError:
        return False
    except OSError as error:
        raise io_error(f"cannot read {path}", error) from None
    return True


def missing(path: Path, code: str, message: str) -> CheckpointError | RunError:
    """The error for a file that is not there: its folder may have vanished with it."""
    if path.parent.is_dir():
        return CheckpointError(code, message)
    return io_error(f"cannot read {path.parent}", FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT)))


def open_file(path: Path, code: str) -> int:
    """A descriptor of the regular file `path`; links are followed. Raises CheckpointError `code` or OSError."""
    try:
        return _regular(os.open(path, _FLAGS), path, code)
    except FileNotFoundError:
        if is_there(path):
            raise CheckpointError(code, f"{path.name}: is a link to nothing; {_WHOLE}") from None
        raise


def open_weights(folder: Path, name: str) -> int:
    """A descriptor of the weight file `name` in `folder`; a link may only lead into an allowed folder.

    A hard link cannot be told from its original and is read like any regular file. Raises CheckpointError
    SHARD_MISSING or SHARD_PATH, or RunError IO.
    """
    path = folder / name
    try:
        folder_fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fd = os.open(name, _FLAGS | os.O_NOFOLLOW, dir_fd=folder_fd)
        except OSError as error:
            if error.errno != errno.ELOOP:
                raise
            fd = os.open(_link_target(folder, path), _FLAGS | os.O_NOFOLLOW)
        finally:
            os.close(folder_fd)
    except FileNotFoundError:
        found = "is a link to nothing" if is_there(path) else "is missing"
        raise missing(path, "SHARD_MISSING", f"{name} {found} in {folder}; {_WHOLE}") from None
    except OSError as error:
        # a link to itself, a socket
        if error.errno in (errno.ELOOP, errno.ENXIO):
            raise CheckpointError("SHARD_PATH", f"{path}: {error.strerror}; expected a regular file") from None
        raise io_error(f"cannot open {path}", error) from None
    return _regular(fd, path, "SHARD_PATH")


def _regular(fd: int, path: Path, code: str) -> int:
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise CheckpointError(code, f"{path.name}: is no regular file; expected one")
    return fd


def _link_target(folder: Path, path: Path) -> str:
    """Where the link `path` leads: into the folder, the blobs of the Hub's cache, or what the operator allows."""
    root = Path(os.path.realpath(folder))
    allowed = [root]
    if root.parent.name == "snapshots" and root.parent.parent.name.startswith("models--"):
        # not where blobs leads, should it be a link itself
        allowed.append(root.parent.parent / "blobs")
    if (said := env.link_root()) is not None:
        allowed.append(Path(os.path.realpath(said)))
    # not Path.resolve: it raises RuntimeError for a link to itself, which open refuses in its own way
    target = os.path.realpath(path)
    if not any(Path(target).is_relative_to(each) for each in allowed):
        raise CheckpointError(
            "SHARD_PATH",
            f"{path}: is a link that leads out of {root}; copy the file, or name its folder in PYRUNTIME_LINK_ROOT",
        )
    return target
