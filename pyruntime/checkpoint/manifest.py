"""What a writer vouches for: size and hash of each file of a checkpoint folder, in `pyruntime_manifest.json`."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from pyruntime.checkpoint.atomic import check_writable, write_text
from pyruntime.checkpoint.files import io_error, is_bare_name, is_there, listed, open_weights
from pyruntime.checkpoint.folder import shard_names
from pyruntime.checkpoint.header import header_bytes
from pyruntime.checkpoint.hub import is_fetched
from pyruntime.checkpoint.strict_json import read_object
from pyruntime.errors import CheckpointError

MANIFEST: Final = "pyruntime_manifest.json"
_FORMAT: Final = "pyruntime-manifest"
_VERSION: Final = 1
_CHUNK_BYTES: Final = 1 << 22
_HEX: Final = frozenset("0123456789abcdef")
_WRITE: Final = "write it with pyruntime verify FOLDER --write"
_FIX: Final = f"get the file again, or if the change was meant, remove {MANIFEST} and {_WRITE}"

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Entry:
    """What a manifest says of one file; `header_sha256` covers the 8 + N bytes before the tensors of a weight file."""

    num_bytes: int
    sha256: str
    header_sha256: str | None


def make_manifest(folder: Path, made: Mapping[str, Any], progress: Progress | None = None) -> dict[str, Any]:
    """The manifest of the files in `folder` that belong to the model; `made` says whence they are.

    `progress` is called with (bytes read, bytes in all). Raises CheckpointError for a weight file with a bad header or
    a link that leads away, RunError IO.
    """
    names, files, total = _names(folder, shard_names(folder)), {}, 0
    for name in names:
        with _Open(folder, name) as file:
            total += file.num_bytes
    count = _counter(total, progress)
    for name in names:
        with _Open(folder, name) as file:
            files[name] = {"bytes": file.num_bytes, "sha256": file.sha256(count)}
            if name.endswith(".safetensors"):
                files[name]["header_sha256"] = file.header_sha256()
    return {"format": _FORMAT, "version": _VERSION, "files": files, "made": dict(made)}


def write_manifest(folder: Path, made: Mapping[str, Any], progress: Progress | None = None) -> dict[str, Entry]:
    """Write the manifest of `folder`, which must have none, whole or not at all; what it lists.

    Raises CheckpointError MANIFEST, or as `make_manifest`.
    """
    if is_there(folder / MANIFEST):
        raise CheckpointError("MANIFEST", f"{folder}: holds {MANIFEST} already; remove it first to write it anew")
    check_writable(folder / MANIFEST)
    whole = make_manifest(folder, made, progress)
    if not whole["files"]:
        raise CheckpointError("MANIFEST", f"{folder}: holds no file of a model; expected config.json and weights")
    write_text(folder / MANIFEST, json.dumps(whole, indent=1) + "\n")
    return read_manifest(folder)


def check_manifest(folder: Path) -> None:
    """Compare sizes and headers of the files in `folder` with its manifest, if there is one.

    Raises CheckpointError MANIFEST or MANIFEST_MISMATCH, or RunError IO; no tensor byte is read.
    """
    if MANIFEST in listed(folder):
        _check(folder, read_manifest(folder))


def verify_manifest(folder: Path, progress: Progress | None = None) -> dict[str, Entry]:
    """Compare every byte of the listed files with the manifest, which must be there; what was compared.

    `progress` is called with (bytes read, bytes in all). Raises as `check_manifest`.
    """
    entries = _check(folder, read_manifest(folder))
    count = _counter(sum(entry.num_bytes for entry in entries.values()), progress)
    for name, entry in entries.items():
        with _Open(folder, name) as file:
            _compare(name, "sha256", file.sha256(count), entry.sha256)
    return entries


def read_manifest(folder: Path) -> dict[str, Entry]:
    """The files that the manifest of `folder` lists. Raises CheckpointError MANIFEST."""
    if not is_there(folder / MANIFEST):
        raise CheckpointError("MANIFEST", f"{MANIFEST} is missing in {folder}; {_WRITE}")
    whole = read_object(folder / MANIFEST, "MANIFEST")
    version, files = whole.get("version"), whole.get("files")
    if whole.get("format") != _FORMAT or version != _VERSION or type(version) is not int:
        raise _bad(f"format {whole.get('format')!r}, version {version!r}", f"{_FORMAT!r}, version {_VERSION}")
    if whole.keys() - {"format", "version", "files", "made"} or not isinstance(whole.get("made", {}), dict):
        raise _bad(f"keys {sorted(whole)}", "format, version, files and the object made")
    if not isinstance(files, dict) or not files:
        raise _bad("no files", "an object from names to bytes and sha256")
    return {name: _entry(name, said) for name, said in files.items()}


def _entry(name: str, said: Any) -> Entry:
    if not is_bare_name(name) or name == MANIFEST:
        raise _bad(f"the name {name[:80]!r}", "bare names of files beside it")
    hashes = {"sha256", "header_sha256"} if name.endswith(".safetensors") else {"sha256"}
    if not isinstance(said, dict) or said.keys() != hashes | {"bytes"}:
        raise _bad(f"another form of {name!r}", f"bytes, {', '.join(sorted(hashes))}")
    num_bytes = said["bytes"]
    if type(num_bytes) is not int or not 0 <= num_bytes < 1 << 63:
        raise _bad(f"{num_bytes!r} bytes of {name!r}", "an integer")
    for key in hashes:
        if not isinstance(said[key], str) or len(said[key]) != 64 or not _HEX.issuperset(said[key]):
            raise _bad(f"{key} {str(said[key])[:80]!r} of {name!r}", "64 hexadecimal digits")
    return Entry(num_bytes, said["sha256"], said.get("header_sha256"))


def _bad(found: str, expected: str) -> CheckpointError:
    return CheckpointError(
        "MANIFEST", f"{MANIFEST}: has {found}; expected {expected}; get it again, or remove it and {_WRITE}"
    )


def _names(folder: Path, shards: Collection[str]) -> list[str]:
    """Names of the files in `folder` that a manifest lists: what a copy from the Hub has too."""
    return [
        name
        for name in listed(folder)
        if name != MANIFEST and is_fetched(name, shards) and os.path.isfile(folder / name)
    ]


def _check(folder: Path, entries: Mapping[str, Entry]) -> dict[str, Entry]:
    """The entries whose file is there, sizes and headers compared."""
    shards = shard_names(folder)
    for name in _names(folder, shards):
        if name not in entries:
            raise CheckpointError(
                "MANIFEST_MISMATCH",
                f"{folder}: holds {name[:80]!r}, which {MANIFEST} does not list; remove it, or {_FIX}",
            )
    # what is not fetched, such as a README, is missing in a copy from the Hub
    there = {name: entry for name, entry in entries.items() if is_fetched(name, shards) or is_there(folder / name)}
    for name, entry in there.items():
        if not is_there(folder / name):
            raise CheckpointError(
                "MANIFEST_MISMATCH", f"{name} is missing; {MANIFEST} lists it with {entry.num_bytes} bytes; {_FIX}"
            )
        with _Open(folder, name) as file:
            _compare(name, "size", file.num_bytes, entry.num_bytes)
            if entry.header_sha256 is not None:
                _compare(name, "header sha256", file.header_sha256(), entry.header_sha256)
    return there


def _counter(total: int, progress: Progress | None) -> Callable[[int], None]:
    done = 0

    def count(num_bytes: int) -> None:
        nonlocal done
        done += num_bytes
        if progress is not None:
            progress(done, total)

    return count


def _compare(name: str, what: str, found: object, expected: object) -> None:
    if found != expected:
        raise CheckpointError("MANIFEST_MISMATCH", f"{name}: {what} is {found}; {MANIFEST} says {expected}; {_FIX}")


class _Open:
    """One file of the folder while it is read; errors of the system become RunError IO."""

    def __init__(self, folder: Path, name: str) -> None:
        self._name = name
        self._path = folder / name
        self._fd = open_weights(folder, name)
        self.num_bytes = os.fstat(self._fd).st_size

    def __enter__(self) -> _Open:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    def header_sha256(self) -> str:
        try:
            return self._hash(8 + header_bytes(self._fd, self._name))
        except OSError as error:
            raise io_error(f"cannot read {self._path}", error) from None

    def sha256(self, count: Callable[[int], None] = lambda num_bytes: None) -> str:
        return self._hash(self.num_bytes, count)

    def _hash(self, num_bytes: int, count: Callable[[int], None] = lambda num_bytes: None) -> str:
        found = hashlib.sha256()
        for chunk in self._chunks(num_bytes):
            found.update(chunk)
            count(len(chunk))
        return found.hexdigest()

    def _chunks(self, num_bytes: int) -> Iterator[bytes]:
        start = 0
        try:
            while start < num_bytes and (chunk := os.pread(self._fd, min(_CHUNK_BYTES, num_bytes - start), start)):
                start += len(chunk)
                yield chunk
        except OSError as error:
            raise io_error(f"cannot read {self._path}", error) from None
