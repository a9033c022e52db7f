"""Texts in files, plain or JSON lines, as every command reads them; and the text that comes with the package."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from pyruntime.checkpoint.files import io_error
from pyruntime.checkpoint.strict_json import parse, read_bytes
from pyruntime.errors import CheckpointError, UsageError

# far more than any measurement needs; a tokenizer takes a hundred times a text's size while it encodes
MAX_FILE_BYTES: Final = 256 * 2**20
MAX_TEXT_BYTES: Final = 16 * 2**20
_DEFAULT: Final = "default_text.txt"


@dataclass(frozen=True, slots=True)
class TextFile:
    """The texts of one file, none of them of white space alone; `sha256` is of the file's bytes."""

    name: str
    sha256: str
    texts: tuple[str, ...]


def default_text() -> Path:
    """A text in the public domain that comes with the package: passages of English novels, 50 KB of UTF-8."""
    return Path(__file__).with_name(_DEFAULT)


def read_texts(path: Path, *, by_line: bool = False) -> TextFile:
    """The texts of `path`: "text" of each line's object for .jsonl, each line where `by_line`, else the whole file.

    Raises UsageError TEXT, naming the line, for a file that is missing, holds no text, is malformed or larger than
    256 MiB, and for a text of more than 16 MiB; RunError IO.
    """
    data = _read(path, "TEXT")
    if path.suffix == ".jsonl":
        texts = (_text_of(value, where) for where, value in _records(path.name, data, "TEXT"))
    else:
        pieces = _lines(path.name, data, "TEXT") if by_line else [(path.name, _limited(data, path.name, "TEXT"))]
        texts = (_decoded(piece, where) for where, piece in pieces)
    kept = tuple(text for text in texts if text.strip())
    if not kept:
        raise UsageError("TEXT", f"{path.name} holds no text; expected at least two tokens")
    return TextFile(path.name, hashlib.sha256(data).hexdigest(), kept)


def read_records(path: Path, code: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """("name, line n", object) of each line of JSON in the file; empty lines are passed over.

    Raises UsageError `code` naming the first line that is no JSON object, and for the limits of `read_texts`.
    """
    return _records(path.name, _read(path, code), code)


def _read(path: Path, code: str) -> bytes:
    try:
        if not path.is_file():
            raise UsageError(code, f"{path} is no file; expected a text file, or .jsonl with an object on each line")
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise UsageError(code, f"{path.name} has {size} bytes; at most {MAX_FILE_BYTES} are read: cut it")
        return read_bytes(path, code, MAX_FILE_BYTES)
    except CheckpointError as error:
        # the file is no checkpoint: what is wrong is what was asked for
        raise UsageError(code, str(error)) from None
    except OSError as error:
        raise io_error(f"cannot read {path}", error) from None


def _lines(name: str, data: bytes, code: str) -> Iterator[tuple[str, bytes]]:
    for number, line in enumerate(data.split(b"\n"), 1):
        where = f"{name}, line {number}"
        if line.strip():
            yield where, _limited(line, where, code)


def _records(name: str, data: bytes, code: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for where, line in _lines(name, data, code):
        try:
            value = parse(line, where, code)
        except CheckpointError as error:
            raise UsageError(code, str(error)) from None
        if not isinstance(value, dict):
            raise UsageError(code, f"{where}: is a {type(value).__name__}; expected a JSON object")
        yield where, value


def _limited(piece: bytes, where: str, code: str) -> bytes:
    if len(piece) > MAX_TEXT_BYTES:
        raise UsageError(
            code,
            f"{where}: has {len(piece)} bytes; texts of at most {MAX_TEXT_BYTES} are read: cut it, or save it as "
            '.jsonl with {"text": "..."} on each line',
        )
    return piece


def _text_of(value: dict[str, Any], where: str) -> str:
    text = value.get("text")
    if not isinstance(text, str):
        raise UsageError("TEXT", f'{where}: has no "text"; expected an object such as {{"text": "..."}}')
    return text


def _decoded(piece: bytes, where: str) -> str:
    try:
        return piece.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError("TEXT", f"{where}: is not UTF-8 at byte {error.start}; save the text as UTF-8") from None
