"""From logits to tokens: masks, penalties, temperature, filters, and a draw that depends on (seed, step) only.

Order of the steps, as in vLLM: bias, allowed and banned ids; repetition penalty, then frequency and presence penalty;
greedy choice if the temperature is 0; else temperature, min-p, top-k, top-p, draw. Log-probabilities are those of the
raw logits, before all of it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch

from pyruntime.errors import UsageError

_NEG_INF: Final = float("-inf")
_MASK64: Final = 2**64 - 1


@dataclass(frozen=True, slots=True)
class SampleConfig:
    """How to choose the next token of one row.

    `temperature` 0 is greedy; `top_k` 0 or less is off. `logit_bias` is added; `allowed_token_ids` (None: all) and
    `banned_token_ids` mask. `seed` is used only for a temperature above 0. `num_logprobs` None asks for no
    log-probability at all, 0 for the one of the chosen token, k > 0 for the k best too.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    allowed_token_ids: tuple[int, ...] | None = None
    banned_token_ids: tuple[int, ...] = ()
    seed: int = 0
    num_logprobs: int | None = None

    @property
    def penalised(self) -> bool:
        """Whether the tokens seen so far change the logits."""
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0

    @property
    def plain_greedy(self) -> bool:
        """Whether the row's token is the first highest raw logit and nothing more is asked for."""
        masked = self.logit_bias or self.banned_token_ids or self.allowed_token_ids is not None
        return self.temperature == 0.0 and self.num_logprobs is None and not self.penalised and not masked


@dataclass(frozen=True, slots=True)
class SampleResult:
    """The token of one row, or why there is none: exactly one of `token_id` and `error` is None.

    `logprob` and `rank` (1 + number of strictly greater raw logits) are None where no log-probability was asked for.
    `top` holds (token id, logprob, rank) of the best raw logits, best first, lower id first among equals.
    """

    token_id: int | None
    logprob: float | None = None
    rank: int | None = None
    top: tuple[tuple[int, float, int], ...] = ()
    error: str | None = None


def mix64(seed: int, step: int) -> int:
    """64 well-mixed bits of (seed, step): two rounds of the splitmix64 finaliser (Steele, Lea, Flood 2014).

    Integer arithmetic modulo 2**64 only, so that every target can compute the same bits. Also serves to derive the
    seed of the i-th of n sequences.
    """
    return _finalise((_finalise(seed & _MASK64) + 0x9E3779B97F4A7C15 * (step + 1)) & _MASK64)


def _finalise(bits: int) -> int:
    bits = ((bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    bits = ((bits ^ (bits >> 27)) * 0x94D049BB133111EB) & _MASK64
    return bits ^ (bits >> 31)


def uniform(seed: int, step: int) -> float:
    """The random number in [0, 1) of output position `step`: the upper 53 bits of `mix64(seed, step)`.

    Nothing else enters: preemption, batch composition and the order of rows cannot change the number. They can change
    the last bits of the logits that it meets, and so, rarely, the choice.
    """
    return (mix64(seed, step) >> 11) * 2.0**-53


def reference(
    logits: torch.Tensor,  # [rows, vocab] or [vocab], any float type
    configs: Sequence[SampleConfig],
    prompt_token_ids: Sequence[Sequence[int]],
    output_token_ids: Sequence[Sequence[int]],
    steps: Sequence[int],
) -> list[SampleResult]:
    """The next token of every row; `steps` are the output positions that the random numbers belong to.

    A row whose logits hold NaN, +inf or nothing finite, or whose masks leave nothing, gets an `error` and no token;
    the other rows are as they would be alone. Ties of a greedy row go to the lowest id.
    Raises UsageError when the lengths disagree or an id is not in [0, vocab).
    """
    rows = _as_rows(logits)
    for name, given in (
        ("configs", configs),
        ("prompt_token_ids", prompt_token_ids),
        ("output_token_ids", output_token_ids),
        ("steps", steps),
    ):
        check_length(name, len(given), rows.shape[0])
    best_values, best_ids = _row_maxima(rows)
    results = []
    for i, config in enumerate(configs):
        if (error := _row_error(best_values[i])) is not None:
            results.append(SampleResult(None, error=error))
        elif config.plain_greedy:
            results.append(SampleResult(best_ids[i]))
        else:
            results.append(_sample_row(rows[i], config, prompt_token_ids[i], output_token_ids[i], steps[i]))
    return results


def token_logprobs(
    logits: torch.Tensor,  # [rows, vocab] or [vocab]
    token_ids: Sequence[int],  # [rows]
    num_top: int,
) -> list[SampleResult]:
    """Log-probability and rank of one given token per row, with the `num_top` best, as `reference` reports them.

    For prompt log-probabilities: `token_ids[i]` is the prompt's token after the position of row i. A row whose logits
    are not finite gets an `error`. Raises UsageError for an id outside [0, vocab).
    """
    rows = _as_rows(logits)
    check_length("token_ids", len(token_ids), rows.shape[0])
    check_ids("token_ids", token_ids, rows.shape[1])
    best_values, _ = _row_maxima(rows)
    results = []
    for i, token_id in enumerate(token_ids):
        error = _row_error(best_values[i])
        results.append(SampleResult(None, error=error) if error else _with_logprobs(rows[i], token_id, num_top))
    return results


def _as_rows(logits: torch.Tensor) -> torch.Tensor:
    rows = logits.unsqueeze(0) if logits.dim() == 1 else logits
    if rows.dim() != 2 or rows.shape[1] == 0 or not rows.is_floating_point():
        raise UsageError(
            "SHAPE", f"sample: logits are {logits.dtype} {list(logits.shape)}; expected floats [rows, vocab], vocab > 0"
        )
    # half precision is widened; the float64 of an oracle stays what it is
    return rows if rows.dtype is torch.float64 else rows.to(torch.float32)


def check_length(name: str, found: int, rows: int) -> None:
    if found != rows:
        raise UsageError("SHAPE", f"sample: {name} has {found} entries; expected {rows}, one per row of logits")


def check_ids(name: str, ids: Sequence[int], vocab: int) -> None:
    # a negative id would silently index from the end
    if ids and (min(ids) < 0 or max(ids) >= vocab):
        raise UsageError(
            "TOKEN", f"sample: {name} has ids from {min(ids)} to {max(ids)}; expected ids from 0 to {vocab - 1}"
        )


def _row_maxima(rows: torch.Tensor) -> tuple[list[float], list[int]]:
    # one pass answers both questions: torch.max returns the first of equal maxima, and hands on a NaN
    if rows.shape[0] == 0:
        return [], []
    best = rows.max(dim=-1)
    return best.values.tolist(), best.indices.tolist()


def _row_error(best: float) -> str | None:
    if math.isnan(best):
        return "logits contain NaN"
    if best == float("inf"):
        return "logits contain +inf"
    if best == _NEG_INF:
        return "logits have no finite entry"
    return None


def _sample_row(
    raw: torch.Tensor,  # [vocab]
    config: SampleConfig,
    prompt: Sequence[int],
    output: Sequence[int],
    step: int,
) -> SampleResult:
    row = _penalised(_masked(raw, config), config, prompt, output)
    best = row.max(dim=-1)
    value = float(best.values)
    if value == _NEG_INF:
        return SampleResult(None, error="masks leave no token with a finite logit")
    if (error := _row_error(value)) is not None:
        return SampleResult(None, error=f"after bias and penalties, {error}")
    token_id = int(best.indices) if config.temperature == 0.0 else _draw(row, value, config, step)
    if config.num_logprobs is None:
        return SampleResult(token_id)
    return _with_logprobs(raw, token_id, config.num_logprobs)


def _masked(raw: torch.Tensor, config: SampleConfig) -> torch.Tensor:
    vocab = raw.shape[0]
    row = raw.clone()
    if config.allowed_token_ids is not None:
        check_ids("allowed_token_ids", config.allowed_token_ids, vocab)
        allowed = _index(config.allowed_token_ids, row)
        row.fill_(_NEG_INF)
        row[allowed] = raw[allowed]
    if config.logit_bias:
        ids = [token_id for token_id, _ in config.logit_bias]
        check_ids("logit_bias", ids, vocab)
        bias = torch.tensor([value for _, value in config.logit_bias], dtype=row.dtype, device=row.device)
        row.index_add_(0, _index(ids, row), bias)
    if config.banned_token_ids:
        check_ids("banned_token_ids", config.banned_token_ids, vocab)
        row[_index(config.banned_token_ids, row)] = _NEG_INF
    return row


def _penalised(
    row: torch.Tensor, config: SampleConfig, prompt: Sequence[int], output: Sequence[int]
) -> torch.Tensor:  # [vocab]
    """Repetition (CTRL, Keskar et al. 2019, eq. 1) over prompt and output; frequency and presence over output only."""
    if not config.penalised:
        return row
    check_ids("prompt_token_ids", prompt, row.shape[0])
    check_ids("output_token_ids", output, row.shape[0])
    if config.repetition_penalty != 1.0:
        seen = _index(sorted({*prompt, *output}), row)
        values = row[seen]
        penalty = config.repetition_penalty
        row[seen] = torch.where(values > 0, values / penalty, values * penalty)
    if output:
        counts = Counter(output)
        ids = _index(list(counts), row)
        row[ids] -= config.frequency_penalty * torch.tensor(list(counts.values()), dtype=row.dtype, device=row.device)
        row[ids] -= config.presence_penalty
    return row


def _draw(row: torch.Tensor, best: float, config: SampleConfig, step: int) -> int:
    """Inverse of the cumulative distribution, in the order of the ids, at the row's one random number."""
    # subtracting the maximum first keeps a tiny temperature from overflowing
    scaled = (row.to("cpu", torch.float64) - best) / config.temperature
    probs = kept_probabilities(scaled, config.top_k, config.top_p, config.min_p)
    cumulative = probs.cumsum(0)
    target = uniform(config.seed, step) * float(cumulative[-1])
    # right=True: the first id whose cumulative sum exceeds the target, which therefore has a probability above 0
    return int(torch.searchsorted(cumulative, torch.tensor(target, dtype=torch.float64), right=True))


def kept_probabilities(scaled: torch.Tensor, top_k: int, top_p: float, min_p: float) -> torch.Tensor:
    """Probabilities, in the order of the ids, of temperature-scaled logits [vocab] after min-p, top-k and top-p.

    min-p drops what is less probable than `min_p` times the best; top-k keeps the k best and their equals; top-p keeps
    the fewest best (lower id first among equals) whose probabilities, after the other two, reach `top_p`.
    """
    probs = scaled.softmax(0)
    keep = probs > 0
    if min_p > 0.0:
        keep &= probs >= min_p * probs.max()
    if 0 < top_k < probs.shape[0]:
        # ties are judged on the logits: two different logits can round to one probability
        kept_logits = scaled.masked_fill(~keep, _NEG_INF)
        keep &= scaled >= kept_logits.topk(top_k).values[-1]
    probs = _renormalised(probs, keep)
    if top_p < 1.0:
        alive = keep.nonzero().squeeze(1)
        ordered, order = probs[alive].sort(descending=True, stable=True)
        before = torch.nn.functional.pad(ordered.cumsum(0)[:-1], (1, 0))
        # the first is kept whatever top_p is: nothing comes before it
        keep = torch.zeros_like(keep).index_fill_(0, alive[order[before < top_p]], True)
        probs = _renormalised(probs, keep)
    return probs


def _renormalised(probs: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    kept = torch.where(keep, probs, 0.0)
    return kept / kept.sum()


def _with_logprobs(raw: torch.Tensor, token_id: int, num_top: int) -> SampleResult:
    logprobs = raw.log_softmax(0)
    top: tuple[tuple[int, float, int], ...] = ()
    if num_top > 0:
        best = _best_ids(raw, num_top)
        values = raw[best].tolist()
        # everything greater than one of the best is among the best, so its rank is where its value first stands
        ranks = [values.index(value) + 1 for value in values]
        top = tuple(zip(best.tolist(), logprobs[best].tolist(), ranks, strict=True))
    rank = 1 + int((raw > raw[token_id]).sum())
    return SampleResult(token_id, float(logprobs[token_id]), rank, top)


def _best_ids(raw: torch.Tensor, count: int) -> torch.Tensor:  # [min(count, vocab)]
    # topk finds the threshold without a full sort but leaves open which of the equals it takes and in what order
    threshold = raw.topk(min(count, raw.shape[0])).values[-1]
    candidates = (raw >= threshold).nonzero().squeeze(1)
    order = raw[candidates].sort(descending=True, stable=True).indices[:count]
    return candidates[order]


def _index(ids: Sequence[int], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(ids, dtype=torch.int64, device=like.device)
