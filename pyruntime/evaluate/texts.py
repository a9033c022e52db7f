"""Texts to measure on: plain files and JSON lines, cut in windows of token ids, with the bytes that they predict."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from pyruntime.engine.texts import read_texts
from pyruntime.engine.tokenizer import Tokenizer
from pyruntime.errors import UsageError
from pyruntime.plan.likelihood import Window, strided_windows

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

    At most the first `max_chars` characters are kept. Raises as `read_texts`.
    """
    kept, left = [], max_chars
    for document in read_texts(path).texts:
        cut = document if left is None else document[:left]
        left = None if left is None else left - len(cut)
        if cut:
            kept.append(cut)
    return Corpus(path.name, tuple(kept), path.suffix == ".jsonl")


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
