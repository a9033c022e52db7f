"""Files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from pyruntime.errors import RunError


def write_text(path: Path, text: str) -> None:
    """Write `text` as the file `path`, whole or not at all. Raises RunError IO."""
    # a rename would put a file in the place of a link, a device or a pipe
    target = _resolved(path)
    temporary = _beside(target)
    try:
        _check_regular(target)
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise RunError("IO", f"cannot write {path}: {error.strerror}") from None


def check_writable(path: Path) -> None:
    """Raise RunError IO unless `write_text` could begin: for work whose result must not be lost at its end."""
    target = _resolved(path)
    temporary = _beside(target)
    try:
        _check_regular(target)
        temporary.touch()
        temporary.unlink()
    except OSError as error:
        raise RunError("IO", f"cannot write {path}: {error.strerror}") from None


def _resolved(path: Path) -> Path:
    # unlike Path.resolve, this raises nothing for a link to itself
    return Path(os.path.realpath(path))


def _beside(target: Path) -> Path:
    # a rename does not cross file systems
    return target.with_name(f".{target.name}.{os.getpid()}.tmp")


def _check_regular(target: Path) -> None:
    if target.exists() and not target.is_file():
        raise OSError(None, "it exists and is no regular file")
