"""What a new checkpoint takes over from the folder that it is made from, beside weights and configuration."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final

from pyruntime.checkpoint.files import io_error, is_bare_name, listed, open_file, open_weights
from pyruntime.checkpoint.header import header_bytes
from pyruntime.checkpoint.manifest import MANIFEST
from pyruntime.checkpoint.writer.folder import NewFolder
from pyruntime.checkpoint.writer.names import is_side_file

_CODE: Final = "UNSUPPORTED_FORMAT"
_CHUNK_BYTES: Final = 1 << 22


def side_files(source: Path) -> tuple[str, ...]:
    """Names of the files of `source` that go along: tokenizer, chat template, generation settings, licence."""
    return tuple(
        name for name in listed(source) if is_bare_name(name) and is_side_file(name) and (source / name).is_file()
    )


def size_of(source: Path, names: Iterable[str]) -> int:
    """Bytes of these files together. Raises OSError."""
    return sum((source / name).stat().st_size for name in names)


def copy_files(source: Path, names: Iterable[str], folder: NewFolder) -> None:
    """Copy these files into `folder`. Raises CheckpointError for what is no regular file, RunError IO, or OSError."""
    for name in names:
        with folder.file(name) as file:
            for chunk in _chunks(source / name):
                file.write(chunk)


def origin_of(source: Path, weight_files: Iterable[str]) -> dict[str, Any]:
    """What a manifest says of the folder that something was made from: its name, and a hash that tells it from others.

    The hash is of its manifest; without one, of its config.json and the headers of its weight files.
    """
    about: dict[str, Any] = {"name": Path(os.path.abspath(source)).name}
    if MANIFEST in listed(source):
        return {**about, "manifest_sha256": hashlib.sha256(b"".join(_chunks(source / MANIFEST))).hexdigest()}
    found = hashlib.sha256(b"".join(_chunks(source / "config.json")))
    for name in sorted(weight_files):
        fd = open_weights(source, name)
        try:
            found.update(os.pread(fd, 8 + header_bytes(fd, name), 0))
        except OSError as error:
            raise io_error(f"cannot read {source / name}", error) from None
        finally:
            os.close(fd)
    return {**about, "config_and_headers_sha256": found.hexdigest()}


def _chunks(path: Path) -> Iterator[bytes]:
    try:
        with open(open_file(path, _CODE), "rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                yield chunk
    except OSError as error:
        raise io_error(f"cannot read {path}", error) from None
