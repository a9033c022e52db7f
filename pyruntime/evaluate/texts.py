"""Texts to measure on: plain files and JSON lines, cut in windows of token ids, with the bytes that they predict."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from pyruntime.checkpoint.strict_json import parse, read_bytes
from pyruntime.engine.tokenizer import Tokenizer
from pyruntime.errors import CheckpointError, UsageError
from pyruntime.plan.likelihood import Window, strided_windows

_MAX_BYTES: Final = 1 << 30
# windows beyond this add little context and much time; the papers use 2048 too
_DEFAULT_LENGTH: Final = 2048
# what bytes that are no whole character decode to
_PARTIAL: Final = "\ufffd"


@dataclass(frozen=True, slots=True)
class Corpus:
    """Documents of one file: its lines' "text" for .jsonl, else the whole file. `sha256` is of the documents."""

    name: str
    documents: tuple[str, ...]
    by_line: bool

    @property
    def sha256(self) -> str:
        """Hash of the documents and of where each ends."""
        return hashlib.sha256(json.dumps(self.documents).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class TokenizedText:
    """A corpus as windows.

    `units` gives for each window the document that it belongs to, or its own number where there is one document only:
    what the standard error takes as independent. `num_bytes` are the bytes of the text that the predicted tokens stand
    for. `round_trip` says whether the tokens give back the text.
    """

    corpus: Corpus
    windows: tuple[Window, ...]
    units: tuple[int, ...]
    num_bytes: int
    length: int
    stride: int
    bos: int | None
    round_trip: bool

    @property
    def unit(self) -> str:
        """What the standard error counts: document or window."""
        return "document" if len(self.corpus.documents) > 1 else "window"

    @property
    def num_tokens(self) -> int:
        """Number of predicted tokens."""
        return sum(window.num_predicted for window in self.windows)

    def is_made_by(self, tokenizer: Tokenizer) -> bool:
        """Whether the tokenizer cuts the text into the same tokens."""
        ids = [tokenizer.encode(document, add_special_tokens=False) for document in self.corpus.documents]
        own = (strided_windows(each, self.length, self.stride, self.bos) for each in ids)
        return tuple(window for windows in own for window in windows) == self.windows

    def about(self) -> dict[str, Any]:
        """The settings that a figure belongs to, JSON-ready."""
        return {
            "text": self.corpus.name,
            "text_sha256": self.corpus.sha256,
            "num_documents": len(self.corpus.documents),
            "num_windows": len(self.windows),
            "num_tokens": self.num_tokens,
            "num_bytes": self.num_bytes,
            "window": self.length,
            "stride": self.stride,
            "bos_token_id": self.bos,
            "round_trip": self.round_trip,
        }


def read_corpus(path: Path, max_chars: int | None = None) -> Corpus:
    """The documents of `path`: one JSON object with "text" per line for .jsonl, else the whole file as one.

    At most the first `max_chars` characters are kept. Raises UsageError TEXT for a file that is missing, empty or
    malformed, naming the line.
    """
    by_line = path.suffix == ".jsonl"
    if by_line:
        documents = [_text_of(value, where) for where, value in read_lines(path, "TEXT")]
    else:
        documents = [_decode(_read(path, "TEXT"), path)]
    kept, left = [], max_chars
    for document in documents:
        cut = document if left is None else document[:left]
        left = None if left is None else left - len(cut)
        if cut:
            kept.append(cut)
    if not kept:
        raise UsageError("TEXT", f"{path} holds no text; expected at least two tokens")
    return Corpus(path.name, tuple(kept), by_line)


def read_lines(path: Path, code: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """("name, line n", object) of each line of JSON in the file; empty lines are passed over.

    Raises UsageError `code` naming the first line that is no JSON object.
    """
    for number, line in enumerate(_read(path, code).split(b"\n"), 1):
        where = f"{path.name}, line {number}"
        if not line.strip():
            continue
        try:
            value = parse(line, where, code)
        except CheckpointError as error:
            # the file is no checkpoint: what is wrong is what was asked for
            raise UsageError(code, str(error)) from None
        if not isinstance(value, dict):
            raise UsageError(code, f"{where}: is a {type(value).__name__}; expected a JSON object")
        yield where, value


def opening_token(tokenizer: Tokenizer) -> int | None:
    """The token that the model's tokenizer puts in front of every text, or None."""
    return tokenizer.bos_id if tokenizer.bos_id in tokenizer.encode("")[:1] else None


def tokenize(
    corpus: Corpus,
    tokenizer: Tokenizer,
    max_position: int,
    *,
    length: int | None = None,
    stride: int | None = None,
    bos: int | None = None,
) -> TokenizedText:
    """`corpus` as windows of `length` tokens (the context, at most 2048), each `stride` tokens behind the last.

    Without a `stride` windows overlap by what the first prediction needs, one token, as in most papers. `bos` opens
    every window; without it the first token of a document is context only, and its bytes do not count.
    Raises UsageError TEXT for a window longer than `max_position` and for a text without a token to predict.
    """
    length = min(max_position, _DEFAULT_LENGTH) if length is None else length
    if not 2 <= length <= max_position:
        raise UsageError("TEXT", f"the window is {length} tokens; expected 2 to {max_position}, the model's context")
    stride = length - 1 if stride is None else stride
    windows: list[Window] = []
    units: list[int] = []
    num_bytes, round_trip = 0, True
    for number, document in enumerate(corpus.documents):
        ids = tokenizer.encode(document, add_special_tokens=False)
        own = strided_windows(ids, length, stride, bos)
        units += [number] * len(own) if len(corpus.documents) > 1 else range(len(own))
        windows += own
        unseen = _first_token(tokenizer, ids) if bos is None else ""
        num_bytes += len(document.encode()) - len(unseen.encode())
        round_trip = round_trip and tokenizer.decode(ids, skip_special_tokens=False) == document
    return TokenizedText(corpus, tuple(windows), tuple(units), num_bytes, length, stride, bos, round_trip)


def _first_token(tokenizer: Tokenizer, ids: list[int]) -> str:
    """The text of the first token; of a token that is a part of a character, the character."""
    text = tokenizer.decode(ids[:1], skip_special_tokens=False)
    if text != _PARTIAL:
        return text
    # a character has four bytes at most
    for end in range(2, 5):
        text = tokenizer.decode(ids[:end], skip_special_tokens=False)
        if not text.startswith(_PARTIAL):
            return text[:1]
    return ""


def _read(path: Path, code: str) -> bytes:
    try:
        return read_bytes(path, code, _MAX_BYTES)
    except CheckpointError as error:
        raise UsageError(code, str(error)) from None


def _decode(content: bytes, path: Path) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError("TEXT", f"{path.name}: is not UTF-8 at byte {error.start}; save the text as UTF-8") from None


def _text_of(value: dict[str, Any], where: str) -> str:
    text = value.get("text")
    if not isinstance(text, str):
        raise UsageError("TEXT", f'{where}: has no "text"; expected an object such as {{"text": "..."}}')
    return text
