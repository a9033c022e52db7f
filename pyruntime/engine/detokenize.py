"""Token ids to text while they are generated: whole characters only, nothing that may become a stop string.

The library's own DecodeStream is not used: it raises, or loses text, where bytes turn out not to be a character, it
waits for ever behind a row of them, and it knows neither stop strings nor the prompt.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Final

from pyruntime.engine.tokenizer import Tokenizer

# Tokens kept as context in front of undecided text. A character has at most four bytes, so four tokens are enough to be
# in step with the bytes before; the rest is margin for decoders that look at their left neighbour.
_CONTEXT: Final = 8
_WINDOW: Final = 4 * _CONTEXT
_INCOMPLETE: Final = "\ufffd"


class IncrementalDetokenizer:
    """The text of one sequence, token by token, at constant work per token.

    The rule: let T be the prompt's last tokens (eight that have text) and D the tokenizer's `decode`. The text is
    D(T + output) behind the longest common prefix with D(T), cut at the first stop string. So a leading space is
    right whatever the decoder does at the beginning of a text, and a character that the prompt began belongs to the
    output. What is released is always a prefix of that text. Held back are

    - a last U+FFFD, which may be a character whose bytes are not all there yet;
    - a run of byte tokens (<0xE2>), until another token ends it, since the decoder judges such a run as a whole;
    - an end of the text that may be the start of a stop string.

    Of several stop strings the one that is complete first wins, then the longest. A stop string counts only if it
    ends in text that came after the first `min_tokens` tokens.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_token_ids: Sequence[int],
        *,
        stop: tuple[str, ...] = (),
        include_stop: bool = False,
        skip_special_tokens: bool = True,
        min_tokens: int = 0,
    ) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._byte_ids = tokenizer.byte_fallback_ids
        self._min_tokens = min_tokens
        self._num_tokens = 0
        self._window = self._tail(prompt_token_ids)
        # text of the prompt's tail; None once the output's beginning is found
        self._prompt_text: str | None = self._decode(self._window)
        # characters of the decoded window that are behind us
        self._num_read = 0
        self._stops = _StopFinder(stop, include_stop)
        self._text = ""
        # text behind it that may be the start of a stop string
        self._held = ""
        self._num_taken = 0
        self._finished = False

    def copy(self) -> IncrementalDetokenizer:
        """Another one for the same sequence: tokens pushed into one of the two do not reach the other."""
        # enough because what an attribute holds is replaced, never changed
        return copy.copy(self)

    @property
    def text(self) -> str:
        """All text released so far."""
        return self._text

    def take(self) -> str:
        """The text released since the last call."""
        fresh = self._text[self._num_taken :]
        self._num_taken = len(self._text)
        return fresh

    def push(self, token_id: int) -> str | None:
        """Adds one output token; the stop string that is now complete, or None. Nothing may be pushed after that.

        Nor where the tokenizer raised: push into a copy whatever must be pushed again then.
        """
        assert not self._finished, "a token was pushed after the end"
        self._num_tokens += 1
        fresh = ""
        if self._has_text(token_id):
            self._window = [*self._window, token_id]
            if token_id not in self._byte_ids:
                fresh = self._read(self._decode(self._window), final=False)
                self._shorten()
        return self._release(fresh)

    def finish(self) -> str | None:
        """Releases what was held back; the stop string found in it, or None. A second call does nothing."""
        if self._finished:
            return None
        fresh = self._read(self._decode(self._window), final=True)
        stop = self._release(fresh)
        if stop is None:
            self._text, self._held = self._text + self._held, ""
        self._finished = True
        return stop

    def _release(self, fresh: str) -> str | None:
        counts = self._num_tokens > self._min_tokens
        released, self._held, stop = self._stops.find(self._held, fresh, counts)
        self._text += released
        self._finished = stop is not None
        return stop

    def _read(self, decoded: str, final: bool) -> str:
        """The part of the decoded window that is new and decided."""
        decided = decoded if final else decoded.removesuffix(_INCOMPLETE)
        if self._prompt_text is not None:
            if not final and len(decided) < len(self._prompt_text) and self._prompt_text.startswith(decided):
                return ""
            self._num_read = _common_length(self._prompt_text, decided)
            self._prompt_text = None
        fresh = decided[self._num_read :]
        self._num_read += len(fresh)
        return fresh

    def _shorten(self) -> None:
        """Drops old tokens from the window, leaving the same undecided end behind text that was read."""
        if self._prompt_text is not None or len(self._window) <= _WINDOW:
            return
        undecided = len(self._decode(self._window)) - self._num_read
        window = self._tail(self._window)
        num_read = len(self._decode(window)) - undecided
        # without a character of context the decoder would take the next token for the beginning of a text
        if num_read >= 1:
            self._window, self._num_read = window, num_read

    def _tail(self, ids: Sequence[int]) -> list[int]:
        """The last tokens of `ids` that have text; a run of byte tokens is not cut."""
        with_text: Iterator[int] = filter(self._has_text, reversed(ids))
        tail = list(islice(with_text, _CONTEXT))
        while tail and tail[-1] in self._byte_ids and (before := next(with_text, None)) is not None:
            tail.append(before)
        return tail[::-1]

    def _has_text(self, token_id: int) -> bool:
        return token_id not in self._skipped and self._tokenizer.token_piece(token_id) is not None

    def _decode(self, ids: Sequence[int]) -> str:
        # what is to be skipped never enters the window
        return self._tokenizer.decode(ids, skip_special_tokens=False)


def _common_length(left: str, right: str) -> int:
    for i, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return i
    return min(len(left), len(right))


class _StopFinder:
    """Says how far text may be released: up to the first stop string, or to an end that may be the start of one."""

    def __init__(self, stops: tuple[str, ...], include_stop: bool) -> None:
        # longest first: of two that end at the same place the longer is taken
        self._stops = sorted(stops, key=len, reverse=True)
        self._longest = max(map(len, stops), default=0)
        self._include_stop = include_stop

    def find(self, held: str, fresh: str, counts: bool) -> tuple[str, str, str | None]:
        """Of `held` and `fresh` what to release, what to hold, and the stop string that ends in `fresh`, if it may."""
        if not self._stops or not fresh:
            return fresh, held, None
        text = held + fresh
        found = self._first(text, len(held)) if counts else None
        if found is not None:
            end, stop = found
            return text[: end if self._include_stop else end - len(stop)], "", stop
        keep = self._start_of_stop(text)
        return text[:keep], text[keep:], None

    def _first(self, held: str, num_old: int) -> tuple[int, str] | None:
        best: tuple[int, str] | None = None
        for stop in self._stops:
            # the match must end behind the old text
            begin = held.find(stop, max(0, num_old - len(stop) + 1))
            if begin >= 0 and (best is None or begin + len(stop) < best[0]):
                best = (begin + len(stop), stop)
        return best

    def _start_of_stop(self, held: str) -> int:
        for begin in range(max(0, len(held) - self._longest + 1), len(held)):
            end = held[begin:]
            if any(stop.startswith(end) for stop in self._stops):
                return begin
        return len(held)
