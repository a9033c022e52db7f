"""The engine: requests in, one plan step at a time, outputs out."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from pyruntime.engine.cache import PageAllocator
from pyruntime.engine.detokenize import IncrementalDetokenizer
from pyruntime.engine.params import SamplingParams
from pyruntime.engine.request import (
    FinishReason,
    Logprob,
    Logprobs,
    RequestMetrics,
    RequestOutput,
    RunningSequence,
)
from pyruntime.engine.schedule import Chunk, Scheduler, SchedulerConfig
from pyruntime.engine.tokenizer import Tokenizer
from pyruntime.errors import UsageError
from pyruntime.ops import sample, sample_native
from pyruntime.ops.step import SequenceSlice, make_step
from pyruntime.plan import Plan


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Sizes of one engine: the longest sequence in tokens, the cache in pages, and the limits of a step."""

    max_model_len: int
    num_pages: int
    page_size: int = 16
    seed: int = 0
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)


@dataclass(slots=True)
class _Request:
    request_id: str
    prompt: str | None
    sequences: tuple[RunningSequence, ...]
    arrival_time: float
    finished_time: float | None = None


class Engine:
    """Runs requests over one plan. Not thread-safe: one thread calls `add_request`, `abort` and `step`."""

    def __init__(
        self, plan: Plan, config: EngineConfig, tokenizer: Tokenizer | None = None, eos_token_ids: tuple[int, ...] = ()
    ) -> None:
        self.plan = plan
        self.config = config
        self._tokenizer = tokenizer
        self._eos = eos_token_ids
        self._allocator = PageAllocator(config.num_pages, config.page_size)
        self._scheduler: Scheduler[RunningSequence] = Scheduler(config.scheduler, self._allocator)
        self._cache = plan.new_cache(config.num_pages, config.page_size)
        # the reference elsewhere: it also samples float64, and where the logits are
        self._native = sample_native.NativeSampler(plan.vocab_size) if plan.program is not None else None
        self._requests: dict[str, _Request] = {}
        self._num_added = 0

    @property
    def has_unfinished(self) -> bool:
        """Whether `step` has anything to do."""
        return bool(self._requests)

    @property
    def num_free_pages(self) -> int:
        """Cache pages that no sequence owns."""
        return self._allocator.num_free

    @property
    def kv_cache_bytes(self) -> int:
        """Bytes of the cache."""
        return self._cache.num_bytes

    def add_request(
        self, request_id: str, prompt_token_ids: Sequence[int], params: SamplingParams, prompt: str | None = None
    ) -> None:
        """Queue a request. Raises UsageError PROMPT or PARAMS for what can never run, before anything is queued.

        That is a prompt that leaves no room for a token, or more pages than the whole cache has. `max_tokens` beyond
        the context is no error: the sequence ends there, its finish_reason being "length".
        """
        if not isinstance(params, SamplingParams):
            raise UsageError("PARAMS", f"sampling params are {type(params).__name__}; expected SamplingParams")
        if request_id in self._requests:
            raise UsageError("PROMPT", f"request id {request_id!r} is in use; choose another")
        ids = self._checked_prompt(prompt_token_ids)
        params.check_vocab(self.plan.vocab_size)
        max_tokens = self._max_tokens(len(ids), params)
        base = params.seed if params.seed is not None else sample.mix64(self.config.seed, self._num_added)
        sequences = tuple(
            RunningSequence(
                request_id=request_id,
                index=index,
                prompt_token_ids=ids,
                params=params,
                seed=base if index == 0 else sample.mix64(base, -index),
                max_tokens=max_tokens,
                detokenizer=self._detokenizer(ids, params),
                prompt_logprobs=[None],
            )
            for index in range(params.n)
        )
        # counted only now: a refused request must not change what later ones draw
        self._num_added += 1
        self._requests[request_id] = _Request(request_id, prompt, sequences, time.monotonic())
        for sequence in sequences:
            self._scheduler.add(sequence)

    def abort(self, request_id: str) -> RequestOutput | None:
        """End a request now; its output so far, or None if there is no such request (any more)."""
        request = self._requests.get(request_id)
        if request is None:
            return None
        for sequence in request.sequences:
            if sequence.finish_reason is None:
                self._finish(sequence, FinishReason.ABORT, None)
        return self._output(request)

    def unfinished(self) -> Iterator[str]:
        """Ids of the requests that are not finished, oldest first."""
        yield from self._requests

    def step(self) -> list[RequestOutput]:
        """Compute one step; the outputs of the requests that it advanced.

        Where the plan or the sampler raises, memory being short, no request has changed: the next step repeats it.
        """
        chunks = self._scheduler.schedule()
        if not chunks:
            return []
        slices = [_slice(chunk) for chunk in chunks]
        logits = self.plan.run(make_step(slices, self._cache, self.plan.device))
        ends = list(itertools.accumulate(len(piece.wanted) for piece in slices))
        scored = [
            self._score_prompt(chunk.sequence, logits[end - len(piece.wanted) : end])
            for chunk, piece, end in zip(chunks, slices, ends, strict=True)
        ]
        last = [(chunk.sequence, end - 1) for chunk, end in zip(chunks, ends, strict=True) if chunk.last]
        sampled = iter(self._sample(logits, [each for each, _ in last], [row for _, row in last]))
        for chunk, prompt_results in zip(chunks, scored, strict=True):
            chunk.sequence.num_computed += chunk.length
            self._add_prompt_logprobs(chunk.sequence, prompt_results)
            result = next(sampled) if chunk.last else None
            # the prompt's own logits may have ended the sequence
            if result is not None and chunk.sequence.finish_reason is None:
                self._advance(chunk.sequence, result)
        advanced = dict.fromkeys(
            chunk.sequence.request_id for chunk in chunks if chunk.last or chunk.sequence.finish_reason
        )
        return [self._output(self._requests[request_id]) for request_id in advanced]

    def _checked_prompt(self, prompt_token_ids: Sequence[int]) -> tuple[int, ...]:
        ids = tuple(prompt_token_ids)
        if not ids:
            raise UsageError("PROMPT", "the prompt is empty; expected at least one token")
        for each in ids:
            if isinstance(each, bool) or not isinstance(each, int) or not 0 <= each < self.plan.vocab_size:
                raise UsageError(
                    "PROMPT", f"the prompt holds {each!r}; expected token ids from 0 to {self.plan.vocab_size - 1}"
                )
        return ids

    def _max_tokens(self, prompt_length: int, params: SamplingParams) -> int:
        room = self.config.max_model_len - prompt_length
        if room < 1:
            raise UsageError(
                "PROMPT",
                f"the prompt has {prompt_length} tokens; the context holds {self.config.max_model_len}, so a prompt "
                f"may have at most {self.config.max_model_len - 1}: shorten it, or raise max_model_len",
            )
        wanted = room if params.max_tokens is None else min(params.max_tokens, room)
        # the last token is never fed back, so it needs no place
        needed = self._allocator.pages_for(prompt_length + wanted - 1)
        if needed > self.config.num_pages:
            raise UsageError(
                "PROMPT",
                f"the request needs {needed} cache pages of {self.config.page_size} tokens; the whole cache has "
                f"{self.config.num_pages}: lower max_tokens or enlarge the cache",
            )
        return wanted

    def _detokenizer(self, ids: tuple[int, ...], params: SamplingParams) -> IncrementalDetokenizer | None:
        if self._tokenizer is None or not params.detokenize:
            if params.stop_strings:
                raise UsageError("PARAMS", "stop strings need a tokenizer; use stop_token_ids, or load the tokenizer")
            return None
        return IncrementalDetokenizer(
            self._tokenizer,
            ids,
            stop=params.stop_strings,
            include_stop=params.include_stop_str_in_output,
            skip_special_tokens=params.skip_special_tokens,
            min_tokens=params.min_tokens,
        )

    def _sample(
        self, logits: torch.Tensor, sequences: Sequence[RunningSequence], rows: Sequence[int]
    ) -> list[sample.SampleResult]:
        if not sequences:
            return []
        wanted = (
            [self._sample_config(sequence) for sequence in sequences],
            [sequence.prompt_token_ids for sequence in sequences],
            [sequence.output_token_ids for sequence in sequences],
            [len(sequence.output_token_ids) for sequence in sequences],
        )
        if self._native is not None:
            return self._native.sample(logits, rows, *wanted)
        return sample.reference(logits[rows], *wanted)

    def _sample_config(self, sequence: RunningSequence) -> sample.SampleConfig:
        params = sequence.params
        too_early = len(sequence.output_token_ids) < params.min_tokens
        ends = params.stop_ids if params.ignore_eos else params.stop_ids + self._eos
        allowed = params.allowed_token_ids
        return sample.SampleConfig(
            temperature=params.temperature,
            top_k=params.top_k,
            top_p=params.top_p,
            min_p=params.min_p,
            repetition_penalty=params.repetition_penalty,
            presence_penalty=params.presence_penalty,
            frequency_penalty=params.frequency_penalty,
            logit_bias=tuple((params.logit_bias or {}).items()),
            allowed_token_ids=None if allowed is None else tuple(allowed),
            banned_token_ids=ends if too_early else (),
            seed=sequence.seed,
            num_logprobs=params.logprobs,
        )

    def _advance(self, sequence: RunningSequence, result: sample.SampleResult) -> None:
        token_id = result.token_id
        if token_id is None:
            self._finish(sequence, FinishReason.ERROR, result.error)
            return
        params = sequence.params
        sequence.output_token_ids.append(token_id)
        sequence.first_token_time = sequence.first_token_time or time.monotonic()
        if params.logprobs is not None:
            sequence.logprobs.append(self._logprobs(token_id, result))
            sequence.cumulative_logprob += result.logprob or 0.0
        ended = token_id in self._eos and not params.ignore_eos
        enough = len(sequence.output_token_ids) >= params.min_tokens
        if ended or (token_id in params.stop_ids and enough):
            # the end-of-sequence token is no text, even where special tokens are shown
            self._finish(sequence, FinishReason.STOP, None if ended else token_id)
            return
        stop = None if sequence.detokenizer is None else sequence.detokenizer.push(token_id)
        if stop is not None:
            self._finish(sequence, FinishReason.STOP, stop)
        elif len(sequence.output_token_ids) >= sequence.max_tokens:
            self._finish(sequence, FinishReason.LENGTH, None)

    def _finish(self, sequence: RunningSequence, reason: FinishReason, stop_reason: int | str | None) -> None:
        found = None if sequence.detokenizer is None else sequence.detokenizer.finish()
        if found is not None and reason in (FinishReason.STOP, FinishReason.LENGTH):
            # text that was held back until now has a stop string, and was cut there
            reason, stop_reason = FinishReason.STOP, found
        sequence.finish_reason, sequence.stop_reason = reason, stop_reason
        self._scheduler.remove(sequence)
        request = self._requests[sequence.request_id]
        if all(each.finish_reason is not None for each in request.sequences):
            request.finished_time = time.monotonic()

    def _score_prompt(self, sequence: RunningSequence, rows: torch.Tensor) -> list[sample.SampleResult]:
        """One result for each of the prompt's tokens whose logits `rows` begin with."""
        next_ids = _unscored(sequence, len(rows))
        if sequence.params.prompt_logprobs is None or sequence.index > 0 or not next_ids:
            return []
        score = sample.token_logprobs if self._native is None else self._native.token_logprobs
        return score(rows[: len(next_ids)], next_ids, sequence.params.prompt_logprobs)

    def _add_prompt_logprobs(self, sequence: RunningSequence, results: Sequence[sample.SampleResult]) -> None:
        for token_id, result in zip(_unscored(sequence, len(results)), results, strict=True):
            if result.error is not None:
                self._finish(sequence, FinishReason.ERROR, result.error)
                return
            sequence.prompt_logprobs.append(self._logprobs(token_id, result))

    def _logprobs(self, token_id: int, result: sample.SampleResult) -> Logprobs:
        assert result.logprob is not None
        found = {token_id: Logprob(result.logprob, result.rank, self._text(token_id))}
        for other, logprob, rank in result.top:
            found.setdefault(other, Logprob(logprob, rank, self._text(other)))
        return found

    def _text(self, token_id: int) -> str | None:
        return None if self._tokenizer is None else self._tokenizer.token_to_text(token_id)

    def _output(self, request: _Request) -> RequestOutput:
        first = request.sequences[0]
        finished = request.finished_time is not None
        if finished:
            self._requests.pop(request.request_id, None)
        times = [each.first_token_time for each in request.sequences if each.first_token_time is not None]
        wants_prompt = first.params.prompt_logprobs is not None
        return RequestOutput(
            request_id=request.request_id,
            prompt=request.prompt,
            prompt_token_ids=first.prompt_token_ids,
            prompt_logprobs=tuple(first.prompt_logprobs) if wants_prompt else None,
            outputs=tuple(each.completion() for each in request.sequences),
            finished=finished,
            metrics=RequestMetrics(
                arrival_time=request.arrival_time,
                first_token_time=min(times, default=None),
                finished_time=request.finished_time,
                num_preemptions=sum(each.num_preemptions for each in request.sequences),
            ),
        )


def _unscored(sequence: RunningSequence, count: int) -> tuple[int, ...]:
    """The first `count` of the prompt's tokens whose log-probabilities are not known, or what there is of them."""
    done = len(sequence.prompt_logprobs)
    return sequence.prompt_token_ids[done : done + count]


def _slice(chunk: Chunk[RunningSequence]) -> SequenceSlice:
    """The chunk's tokens; logits are wanted for the last one, and for prompt tokens whose successor is to be scored."""
    sequence = chunk.sequence
    end = chunk.start + chunk.length
    wanted = [chunk.length - 1] if chunk.last else []
    if sequence.params.prompt_logprobs is not None and sequence.index == 0:
        first = max(chunk.start, len(sequence.prompt_logprobs) - 1)
        stop = min(end, len(sequence.prompt_token_ids) - 1)
        wanted = [*range(first - chunk.start, stop - chunk.start), *wanted]
    return SequenceSlice(sequence.tokens(chunk.start, end), chunk.start, tuple(sequence.pages), wanted)
