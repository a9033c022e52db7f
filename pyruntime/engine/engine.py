"""The engine: requests in, one plan step at a time, outputs out."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from pyruntime.engine.cache import PageAllocator
from pyruntime.engine.decode import decode, one_row_each
from pyruntime.engine.detokenize import IncrementalDetokenizer
from pyruntime.engine.params import SamplingParams
from pyruntime.engine.request import (
    Advance,
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
from pyruntime.ops.gpu.batch import BatchSizes
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


def largest_step(config: EngineConfig) -> BatchSizes:
    """The largest step that the scheduler makes; where a prompt is scored, every row of it is wanted."""
    limits, rows = config.scheduler, config.scheduler.max_num_batched_tokens
    return BatchSizes(rows, rows, limits.max_num_seqs, -(-config.max_model_len // config.page_size))


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
        if plan.gpu is not None:
            plan.gpu.prepare(self._cache, largest_step(config))
        # the reference elsewhere: it also samples float64, and where the logits are
        self._native = sample_native.NativeSampler(plan.vocab_size) if plan.program is not None else None
        self._requests: dict[str, _Request] = {}
        # those that advanced since their last output, in that order
        self._untold: dict[str, None] = {}
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
        """End a request now; its output so far, or None if there is no such request (any more).

        Where the output cannot be made, memory being short, the request is ended nevertheless.
        """
        request = self._requests.get(request_id)
        if request is None:
            return None
        running = [sequence for sequence in request.sequences if sequence.finish_reason is None]
        for sequence in running:
            self._end(sequence, FinishReason.ABORT, None)
        self._forget(request_id)
        for sequence in running:
            if sequence.detokenizer is not None:
                sequence.detokenizer.finish()
        return self._output(request)

    def unfinished(self) -> Iterator[str]:
        """Ids of the requests that are not finished, oldest first."""
        yield from self._requests

    def step(self) -> list[RequestOutput]:
        """Compute one step; the outputs of the requests that it advanced.

        Where the plan, the sampler or the tokenizer raises, memory being short, no request has advanced: the next step
        computes the same. Where an output cannot be made, the next step's outputs are those of both.
        """
        chunks = self._scheduler.schedule()
        # all of them before one sequence changes
        advances = self._compute(chunks) if chunks else []
        for chunk, advance in zip(chunks, advances, strict=True):
            self._commit(chunk, advance)
        outputs = [self._output(self._requests[request_id]) for request_id in self._untold]
        self._untold.clear()
        for output in outputs:
            if output.finished:
                self._forget(output.request_id)
        return outputs

    def _compute(self, chunks: Sequence[Chunk[RunningSequence]]) -> list[Advance]:
        slices = [_slice(chunk) for chunk in chunks]
        if self.plan.gpu is not None and one_row_each(slices) and all(chunk.last for chunk in chunks):
            decoded = decode(self.plan.gpu, self._cache, slices, *self._wanted([chunk.sequence for chunk in chunks]))
            return [self._advance(chunk, (), result) for chunk, result in zip(chunks, decoded, strict=True)]
        logits = self.plan.run(make_step(slices, self._cache, self.plan.device))
        ends = list(itertools.accumulate(len(piece.wanted) for piece in slices))
        scored = [
            self._score_prompt(chunk.sequence, logits[end - len(piece.wanted) : end])
            for chunk, piece, end in zip(chunks, slices, ends, strict=True)
        ]
        last = [(chunk.sequence, end - 1) for chunk, end in zip(chunks, ends, strict=True) if chunk.last]
        sampled = iter(self._sample(logits, [each for each, _ in last], [row for _, row in last]))
        return [
            self._advance(chunk, results, next(sampled) if chunk.last else None)
            for chunk, results in zip(chunks, scored, strict=True)
        ]

    def _commit(self, chunk: Chunk[RunningSequence], advance: Advance) -> None:
        sequence = chunk.sequence
        sequence.advance(advance)
        if advance.finish_reason is not None:
            self._end(sequence, advance.finish_reason, advance.stop_reason)
        if advance.finish_reason is not None or advance.token_id is not None:
            self._untold[sequence.request_id] = None

    def _forget(self, request_id: str) -> None:
        del self._requests[request_id]
        self._untold.pop(request_id, None)

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
        wanted = self._wanted(sequences)
        steps = [len(sequence.output_token_ids) for sequence in sequences]
        if self._native is not None:
            return self._native.sample(logits, rows, *wanted, steps)
        return sample.reference(logits[rows], *wanted, steps)

    def _wanted(
        self, sequences: Sequence[RunningSequence]
    ) -> tuple[list[sample.SampleConfig], list[tuple[int, ...]], list[list[int]]]:
        """How each sequence samples, its prompt, and what it has put out."""
        return (
            [self._sample_config(sequence) for sequence in sequences],
            [sequence.prompt_token_ids for sequence in sequences],
            [sequence.output_token_ids for sequence in sequences],
        )

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

    def _advance(
        self,
        chunk: Chunk[RunningSequence],
        scored: Sequence[sample.SampleResult],
        sampled: sample.SampleResult | None,
    ) -> Advance:
        sequence = chunk.sequence
        detokenizer = None if sequence.detokenizer is None else sequence.detokenizer.copy()
        good = [*itertools.takewhile(lambda result: result.error is None, scored)]
        prompt_logprobs = tuple(map(self._logprobs, _unscored(sequence, len(good)), good))
        # the prompt's own logits may end the sequence, before its first token
        results = scored if sampled is None else [*scored, sampled]
        error = next((result.error for result in results if result.error is not None), None)
        if error is not None:
            if detokenizer is not None:
                detokenizer.finish()
            return Advance(
                chunk.length, detokenizer, prompt_logprobs, finish_reason=FinishReason.ERROR, stop_reason=error
            )
        if sampled is None or sampled.token_id is None:
            return Advance(chunk.length, detokenizer, prompt_logprobs)
        token_id, params = sampled.token_id, sequence.params
        logprobs = None if params.logprobs is None else self._logprobs(token_id, sampled)
        ending = self._ending(sequence, token_id, detokenizer)
        return Advance(chunk.length, detokenizer, prompt_logprobs, token_id, sampled.logprob, logprobs, *ending)

    def _ending(
        self, sequence: RunningSequence, token_id: int, detokenizer: IncrementalDetokenizer | None
    ) -> tuple[FinishReason | None, int | str | None]:
        """Whether and why the token ends the sequence; it goes into `detokenizer`, unless it is no text."""
        params = sequence.params
        num_tokens = len(sequence.output_token_ids) + 1
        stop: int | str | None = None
        if token_id in self._eos and not params.ignore_eos:
            # the end-of-sequence token is no text, even where special tokens are shown
            reason = FinishReason.STOP
        elif token_id in params.stop_ids and num_tokens >= params.min_tokens:
            reason, stop = FinishReason.STOP, token_id
        else:
            stop = None if detokenizer is None else detokenizer.push(token_id)
            if stop is not None:
                return FinishReason.STOP, stop
            if num_tokens < sequence.max_tokens:
                return None, None
            reason = FinishReason.LENGTH
        # text that was held back until now may have a stop string, and is cut there
        found = None if detokenizer is None else detokenizer.finish()
        return (reason, stop) if found is None else (FinishReason.STOP, found)

    def _end(self, sequence: RunningSequence, reason: FinishReason, stop_reason: int | str | None) -> None:
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
        times = [each.first_token_time for each in request.sequences if each.first_token_time is not None]
        wants_prompt = first.params.prompt_logprobs is not None
        return RequestOutput(
            request_id=request.request_id,
            prompt=request.prompt,
            prompt_token_ids=first.prompt_token_ids,
            prompt_logprobs=tuple(first.prompt_logprobs) if wants_prompt else None,
            outputs=tuple(each.completion() for each in request.sequences),
            finished=request.finished_time is not None,
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
