"""Calibration text: a file to token sequences, with the hashes that say which text it was."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pyruntime.checkpoint.strict_json import read_bytes
from pyruntime.engine.texts import read_texts
from pyruntime.engine.tokenizer import MAX_FILE_BYTES as MAX_TOKENIZER_BYTES
from pyruntime.engine.tokenizer import Tokenizer
from pyruntime.errors import UsageError
from pyruntime.plan.likelihood import windows

_LONGEST_DEFAULT: Final = 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationOptions:
    """How a text is cut: at most `num_seqs` sequences of at most `seq_len` tokens (None: 2048, or the model's context).

    `separate`: each line of a text file, each record of a .jsonl file, is a sequence of its own, and what is longer is
    cut off; else all is one stream that is cut in windows. `seed` None takes the first sequences, a number draws them.
    """

    num_seqs: int = 32
    seq_len: int | None = None
    separate: bool = False
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, value, least in (("num_seqs", self.num_seqs, 1), ("seq_len", self.seq_len, 2)):
            bad = isinstance(value, bool) or not isinstance(value, int) or value < least
            if bad and not (name == "seq_len" and value is None):
                raise UsageError("CONFIG", f"{name} is {value!r}; expected an integer from {least}")
        if self.seed is not None and (isinstance(self.seed, bool) or not isinstance(self.seed, int)):
            raise UsageError("CONFIG", f"seed is {self.seed!r}; expected an integer, or None for the first sequences")


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """Token sequences that scores are measured on, and where they come from. Raises UsageError TEXT for too few."""

    sequences: tuple[tuple[int, ...], ...]
    source: str = ""
    text_sha256: str = ""
    tokenizer_sha256: str = ""
    seed: int | None = None

    def __post_init__(self) -> None:
        if not any(len(sequence) > 1 for sequence in self.sequences):
            raise UsageError("TEXT", f"{self.source or 'the text'} gives no sequence of two tokens or more; get more")

    @property
    def num_tokens(self) -> int:
        """Tokens of all sequences together."""
        return sum(map(len, self.sequences))

    @property
    def tokens_sha256(self) -> str:
        """Hash of the sequences as they are run: it changes with the text, its cutting, the seed and the tokenizer."""
        return hashlib.sha256(json.dumps(self.sequences, separators=(",", ":")).encode()).hexdigest()

    def check(self, vocab_size: int, max_position: int) -> None:
        """Raise UsageError TEXT for an id or a length that the model does not have."""
        for token_id in {token_id for sequence in self.sequences for token_id in sequence}:
            if not 0 <= token_id < vocab_size:
                raise UsageError("TEXT", f"the text holds token {token_id}; the model has tokens 0 to {vocab_size - 1}")
        longest = max(map(len, self.sequences))
        if longest > max_position:
            raise UsageError("TEXT", f"a sequence has {longest} tokens; the model holds {max_position}: lower seq_len")


def read_calibration(
    path: Path, folder: Path, max_position: int, options: CalibrationOptions = CalibrationOptions()
) -> Calibration:
    """The text file `path` (.jsonl: records with a "text") as sequences for the model in `folder`.

    Raises UsageError TEXT for a file that is empty, holds a single token, is larger than 256 MiB or has a text of more
    than 16 MiB in it, RunError IO, CheckpointError TOKENIZER.
    """
    file = read_texts(path, by_line=options.separate)
    tokenizer = Tokenizer(folder)
    length = min(_LONGEST_DEFAULT, max_position) if options.seq_len is None else options.seq_len
    if length > max_position:
        raise UsageError("TEXT", f"seq_len is {length}; the model holds {max_position} tokens")
    cut = _separate if options.separate else _windows
    sequences = cut(file.texts, tokenizer, length, options)
    heads = _num_special(tokenizer)
    if sum(max(0, len(sequence) - heads) for sequence in sequences) < 2:
        raise UsageError("TEXT", f"{path.name} holds fewer than two tokens of text; scores need some thousands")
    table = read_bytes(folder / "tokenizer.json", "TOKENIZER", MAX_TOKENIZER_BYTES)
    return Calibration(
        sequences=tuple(map(tuple, sequences)),
        source=file.name,
        text_sha256=file.sha256,
        tokenizer_sha256=hashlib.sha256(table).hexdigest(),
        seed=options.seed,
    )


def _num_special(tokenizer: Tokenizer) -> int:
    return len(tokenizer.encode(""))


def _separate(
    texts: Sequence[str], tokenizer: Tokenizer, length: int, options: CalibrationOptions
) -> list[Sequence[int]]:
    order = list(texts)
    if options.seed is not None:
        random.Random(options.seed).shuffle(order)
    found: list[Sequence[int]] = []
    for text in order:
        sequence = tokenizer.encode(text)[:length]
        if len(sequence) > 1:
            found.append(sequence)
        if len(found) == options.num_seqs:
            break
    return found


def _windows(
    texts: Sequence[str], tokenizer: Tokenizer, length: int, options: CalibrationOptions
) -> list[Sequence[int]]:
    head = tokenizer.encode("")[:1]
    # what the tokenizer's own file puts in front of a text is put in front of each window
    bos = tokenizer.bos_id if head and head[0] == tokenizer.bos_id else None
    stream: list[int] = []
    for text in texts:
        stream += tokenizer.encode(text, add_special_tokens=False)
        if options.seed is None and len(stream) >= options.num_seqs * length:
            break
    pieces = [piece for piece in windows(stream, length, bos) if len(piece) > 1]
    if options.seed is None or len(pieces) <= options.num_seqs:
        return list(pieces[: options.num_seqs])
    chosen = random.Random(options.seed).sample(range(len(pieces)), options.num_seqs)
    return [pieces[i] for i in sorted(chosen)]
