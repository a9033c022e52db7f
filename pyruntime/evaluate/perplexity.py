"""Perplexity of a plan on texts: the price of a dropped sublayer, in one number."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import torch

from pyruntime.errors import RunError, UsageError
from pyruntime.ops.step import SequenceSlice, make_step
from pyruntime.plan import Plan

_PAGE_SIZE: Final = 64
# rows of logits in memory at a time: 256 rows of a vocabulary of 128k in float32 are 128 MB
_CHUNK: Final = 256


@dataclass(frozen=True, slots=True)
class Perplexity:
    """Sum of the negative log-likelihoods (nats) over `num_tokens` predicted tokens."""

    nll: float
    num_tokens: int

    @property
    def value(self) -> float:
        """exp of the mean negative log-likelihood per token."""
        return math.exp(self.nll / self.num_tokens)

    def bits_per_byte(self, num_bytes: int) -> float:
        """The same sum in bits, over the bytes of the text."""
        return self.nll / math.log(2) / num_bytes


def perplexity(
    plan: Plan, sequences: Sequence[Sequence[int]], progress: Callable[[int], None] | None = None
) -> Perplexity:
    """Perplexity of `sequences` of token ids; the first token of each is context only.

    Log-likelihoods are summed in float64. `progress` is called with the tokens of each sequence. Raises UsageError
    for sequences without anything to predict and for ids outside the vocabulary, RunError NUMERICS for logits that
    are not finite.
    """
    if not any(len(sequence) > 1 for sequence in sequences):
        raise UsageError("TEXT", "the text has no token to predict; expected at least two tokens")
    for token_id in {token_id for sequence in sequences for token_id in sequence}:
        # a negative id would silently index from the end
        if not 0 <= token_id < plan.vocab_size:
            raise UsageError(
                "TEXT", f"the text holds token {token_id}; the model has tokens 0 to {plan.vocab_size - 1}"
            )
    longest = max(len(sequence) for sequence in sequences)
    if longest > plan.max_position:
        raise UsageError(
            "TEXT", f"a sequence has {longest} tokens; the model holds {plan.max_position}: cut it with windows()"
        )
    num_pages = -(-longest // _PAGE_SIZE)
    cache = plan.new_cache(num_pages, _PAGE_SIZE)
    nll, count = 0.0, 0
    for sequence in sequences:
        for start in range(0, len(sequence) - 1, _CHUNK):
            ids = sequence[start : min(start + _CHUNK, len(sequence) - 1)]
            piece = SequenceSlice(ids, start, range(num_pages), range(len(ids)))
            logits = plan.run(make_step([piece], cache, plan.device))
            targets = torch.tensor(sequence[start + 1 : start + 1 + len(ids)], device=plan.device)
            nll += float(torch.nn.functional.cross_entropy(logits.double(), targets, reduction="sum"))
        count += max(0, len(sequence) - 1)
        if progress is not None:
            progress(len(sequence))
    if not math.isfinite(nll):
        raise RunError("NUMERICS", "the logits are not finite; check the weights, or use dtype float32")
    return Perplexity(nll, count)


def windows(token_ids: Sequence[int], length: int, bos: int | None = None) -> list[list[int]]:
    """`token_ids` cut into pieces of at most `length` tokens, each opened by `bos` if there is one."""
    head = [] if bos is None else [bos]
    size = length - len(head)
    if size < 1:
        raise UsageError("TEXT", f"windows of {length} tokens hold nothing; expected at least {len(head) + 1}")
    return [[*head, *token_ids[start : start + size]] for start in range(0, len(token_ids), size)]
