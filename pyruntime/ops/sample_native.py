"""ops.sample on the CPU in C++: the tokens that `sample.reference` chooses, without sorting the vocabulary.

Probabilities are computed in double, by another exponential function than torch's and summed in another order, so they
differ in their last bits: about 1e-15 of the whole. A token differs only where a random number, `top_p` or `min_p` is
that close to a border. Neither the other rows nor the number of threads change anything. Log-probabilities are computed
in double; the reference rounds them to the dtype of the logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import torch

from pyruntime.errors import UsageError
from pyruntime.ops import _native, sample
from pyruntime.ops.sample import SampleConfig, SampleResult

# in the order of SampleStatus in csrc/include/pyruntime/sample.h
_ERRORS: Final = (
    None,
    "logits contain NaN",
    "logits contain +inf",
    "logits have no finite entry",
    "masks leave no token with a finite logit",
    "after bias and penalties, logits contain NaN",
    "after bias and penalties, logits contain +inf",
)
_ALIGNMENT: Final = 64
# logits below which waking a second thread costs more than it saves: a greedy row is only read, others are computed on
_GREEDY_LOGITS_FOR_THREADS: Final = 1 << 20
_LOGITS_FOR_THREADS: Final = 1 << 17
_NO_IDS: Final[tuple[int, ...]] = ()


class NativeSampler:
    """Samples rows of one vocabulary. Its memory is its own, so one thread at a time may call it."""

    def __init__(self, vocab: int, native: _native.Native | None = None) -> None:
        self._native = native or _native.load()
        self._vocab = vocab
        size = self._native.module.sample_scratch_size(vocab=vocab, num_threads=self._native.num_threads)
        # memory is given by the system when it is first written, so greedy rows cost next to nothing
        self._scratch = torch.empty(size + _ALIGNMENT, dtype=torch.uint8)
        address = self._scratch.data_ptr()
        self._scratch_address = address + -address % _ALIGNMENT
        self._scratch_size = size

    def sample(
        self,
        logits: torch.Tensor,  # [n, vocab], float32, contiguous, on the CPU
        rows: Sequence[int],
        configs: Sequence[SampleConfig],
        prompt_token_ids: Sequence[Sequence[int]],
        output_token_ids: Sequence[Sequence[int]],
        steps: Sequence[int],
    ) -> list[SampleResult]:
        """The next token of each of `rows`; everything after `rows` has an entry for each, as in `sample.reference`.

        Raises UsageError for logits of another kind, for lengths that disagree, and for an id outside [0, vocab), this
        also where the row's logits are an error in themselves.
        """
        self._check_logits(logits)
        for name, given in (
            ("configs", configs),
            ("prompt_token_ids", prompt_token_ids),
            ("output_token_ids", output_token_ids),
            ("steps", steps),
        ):
            sample.check_length(name, len(given), len(rows))
        if all(config.plain_greedy for config in configs):
            return self._greedy(logits, rows)
        per_row = zip(configs, prompt_token_ids, output_token_ids, steps, strict=True)
        return self._run(logits, rows, [self._request(*each) for each in per_row])

    def token_logprobs(
        self,
        logits: torch.Tensor,  # [rows, vocab], float32, contiguous, on the CPU
        token_ids: Sequence[int],  # [rows]
        num_top: int,
    ) -> list[SampleResult]:
        """What `sample.token_logprobs` gives: log-probability and rank of one given token per row, and the best."""
        self._check_logits(logits)
        sample.check_length("token_ids", len(token_ids), logits.shape[0])
        sample.check_ids("token_ids", token_ids, self._vocab)
        config = SampleConfig(num_logprobs=num_top)
        requests = [self._request(config, (), (), 0, given=token_id) for token_id in token_ids]
        return self._run(logits, range(len(requests)), requests)

    def _check_logits(self, logits: torch.Tensor) -> None:
        if logits.dim() != 2 or logits.shape[1] != self._vocab:
            raise UsageError("SHAPE", f"sample: logits are {list(logits.shape)}; expected [rows, {self._vocab}]")
        if logits.dtype is not torch.float32 or logits.device.type != "cpu" or not logits.is_contiguous():
            raise UsageError(
                "LAYOUT",
                f"sample: logits are {logits.dtype} on {logits.device} with strides {logits.stride()}; "
                "expected contiguous torch.float32 on cpu",
            )

    def _request(
        self, config: SampleConfig, prompt: Sequence[int], output: Sequence[int], step: int, *, given: int = -1
    ) -> Any:
        vocab = self._vocab
        if not config.penalised:
            prompt = output = _NO_IDS
        biased = [token_id for token_id, _ in config.logit_bias]
        for name, ids in (
            ("allowed_token_ids", config.allowed_token_ids or _NO_IDS),
            ("logit_bias", biased),
            ("banned_token_ids", config.banned_token_ids),
            ("prompt_token_ids", prompt),
            ("output_token_ids", output),
        ):
            sample.check_ids(name, ids, vocab)
        return self._native.module.SampleRequest(
            temperature=config.temperature,
            min_p=config.min_p,
            top_p=config.top_p,
            uniform=sample.uniform(config.seed, step) if config.temperature > 0.0 else 0.0,
            top_k=config.top_k,
            repetition=config.repetition_penalty,
            presence=config.presence_penalty,
            frequency=config.frequency_penalty,
            allowed=config.allowed_token_ids,
            biased=biased,
            bias=[value for _, value in config.logit_bias],
            banned=config.banned_token_ids,
            prompt=prompt,
            output=output,
            given=given,
            num_top=-1 if config.num_logprobs is None else config.num_logprobs,
        )

    def _greedy(self, logits: torch.Tensor, rows: Sequence[int]) -> list[SampleResult]:
        if not rows:
            return []
        found = self._native.module.sample_greedy(
            rows=rows, **self._memory(logits, len(rows), _GREEDY_LOGITS_FOR_THREADS)
        )
        return [SampleResult(each) if each >= 0 else SampleResult(None, error=_ERRORS[-each]) for each in found]

    def _run(self, logits: torch.Tensor, rows: Sequence[int], requests: Sequence[Any]) -> list[SampleResult]:
        if not rows:
            return []
        found = self._native.module.sample(
            rows=rows, requests=requests, **self._memory(logits, len(rows), _LOGITS_FOR_THREADS)
        )
        return [_result(*each) for each in found]

    def _memory(self, logits: torch.Tensor, num_rows: int, logits_for_threads: int) -> dict[str, Any]:
        many = num_rows * self._vocab >= logits_for_threads
        return {
            "isa": self._native.isa,
            "logits": logits.data_ptr(),
            "num_rows": logits.shape[0],
            "vocab": self._vocab,
            "scratch": self._scratch_address,
            "scratch_size": self._scratch_size,
            "num_threads": min(self._native.num_threads, num_rows) if many else 1,
        }


def _result(
    status: int, token: int, log_sum: float, value: float, rank: int, top_ids: list[int], top_values: list[float]
) -> SampleResult:
    if status:
        return SampleResult(None, error=_ERRORS[status])
    if rank == 0:
        return SampleResult(token)
    # ids come in rising order and sorting is stable: lower ids stay first among equals
    best = sorted(zip(top_values, top_ids, strict=True), key=lambda each: -each[0])
    top: list[tuple[int, float, int]] = []
    for i, (each, token_id) in enumerate(best):
        top.append((token_id, each - log_sum, top[-1][2] if i > 0 and best[i - 1][0] == each else i + 1))
    return SampleResult(token, value - log_sum, rank, tuple(top))


def on_cpu(
    logits: torch.Tensor,  # [rows, vocab] or [vocab], float32, contiguous, on the CPU
    configs: Sequence[SampleConfig],
    prompt_token_ids: Sequence[Sequence[int]],
    output_token_ids: Sequence[Sequence[int]],
    steps: Sequence[int],
    *,
    native: _native.Native | None = None,
) -> list[SampleResult]:
    """`sample.reference` in C++, for one call; who calls often keeps a `NativeSampler`."""
    rows = logits.unsqueeze(0) if logits.dim() == 1 else logits
    if rows.dim() != 2 or rows.shape[1] == 0:
        raise UsageError("SHAPE", f"sample: logits are {list(logits.shape)}; expected floats [rows, vocab], vocab > 0")
    sampler = NativeSampler(rows.shape[1], native)
    return sampler.sample(rows, range(rows.shape[0]), configs, prompt_token_ids, output_token_ids, steps)
