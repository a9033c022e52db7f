"""Requests and what comes back: names and fields as in vLLM's offline API."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from pyruntime.engine.detokenize import IncrementalDetokenizer
from pyruntime.engine.params import SamplingParams


class FinishReason(StrEnum):
    """Why a sequence ended."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class Logprob:
    """Log-probability (natural, of the raw logits) of a token, its rank from 1, and its text."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


Logprobs = Mapping[int, Logprob]


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    """One of a request's n sequences, as far as it is.

    `stop_reason` is the stop string or token id that ended it (None for the end-of-sequence token), or the error text.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    cumulative_logprob: float | None
    logprobs: tuple[Logprobs, ...] | None
    finish_reason: str | None
    stop_reason: int | str | None


@dataclass(frozen=True, slots=True)
class RequestMetrics:
    """Seconds on the monotonic clock; None for what has not happened."""

    arrival_time: float
    first_token_time: float | None = None
    finished_time: float | None = None
    num_preemptions: int = 0


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """A request and its sequences so far; `finished` says that nothing more will come."""

    request_id: str
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    prompt_logprobs: tuple[Logprobs | None, ...] | None
    outputs: tuple[CompletionOutput, ...]
    finished: bool
    metrics: RequestMetrics
    num_cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Advance:
    """What a step makes of one sequence; computed for every sequence of the step before any of them changes.

    `detokenizer` is the sequence's as it is afterwards; `finish_reason` is None where the sequence goes on.
    """

    num_computed: int
    detokenizer: IncrementalDetokenizer | None
    prompt_logprobs: tuple[Logprobs, ...] = ()
    token_id: int | None = None
    logprob: float | None = None
    logprobs: Logprobs | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None


@dataclass(slots=True, eq=False)
class RunningSequence:
    """One sequence in the engine: tokens, cache pages, and how far the cache is filled."""

    request_id: str
    index: int
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    seed: int
    max_tokens: int
    detokenizer: IncrementalDetokenizer | None
    output_token_ids: list[int] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)
    num_computed: int = 0
    num_preemptions: int = 0
    logprobs: list[Logprobs] = field(default_factory=list)
    cumulative_logprob: float = 0.0
    prompt_logprobs: list[Logprobs | None] = field(default_factory=list)
    first_token_time: float | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None

    @property
    def num_tokens(self) -> int:
        """Prompt and output so far."""
        return len(self.prompt_token_ids) + len(self.output_token_ids)

    def tokens(self, begin: int, end: int) -> Sequence[int]:
        """Tokens of positions [begin, end)."""
        split = len(self.prompt_token_ids)
        if begin >= split:
            return self.output_token_ids[begin - split : end - split]
        return [*self.prompt_token_ids[begin:end], *self.output_token_ids[: max(0, end - split)]]

    def advance(self, step: Advance) -> None:
        """Take in what a step computed, but for its end, which is the engine's."""
        self.num_computed += step.num_computed
        self.detokenizer = step.detokenizer
        self.prompt_logprobs.extend(step.prompt_logprobs)
        if step.token_id is not None:
            self.output_token_ids.append(step.token_id)
            self.first_token_time = self.first_token_time or time.monotonic()
        if step.logprobs is not None:
            self.logprobs.append(step.logprobs)
            self.cumulative_logprob += step.logprob or 0.0

    def completion(self) -> CompletionOutput:
        """The sequence as its user sees it."""
        wants_logprobs = self.params.logprobs is not None
        return CompletionOutput(
            index=self.index,
            text="" if self.detokenizer is None else self.detokenizer.text,
            token_ids=tuple(self.output_token_ids),
            cumulative_logprob=self.cumulative_logprob if wants_logprobs else None,
            logprobs=tuple(self.logprobs) if wants_logprobs else None,
            finish_reason=None if self.finish_reason is None else self.finish_reason.value,
            stop_reason=self.stop_reason,
        )
