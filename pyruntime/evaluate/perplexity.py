"""Perplexity of a plan on texts: the price of a dropped sublayer, in one number."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch

from pyruntime.evaluate.statistics import Estimate, by_unit, ratio_of
from pyruntime.evaluate.texts import TokenizedText
from pyruntime.plan import Plan
from pyruntime.plan.likelihood import Progress, negative_log_likelihood, token_losses

# exp of more is no float
_MOST_NATS: Final = 709.0


@dataclass(frozen=True, slots=True)
class Perplexity:
    """Sum of the negative log-likelihoods (nats) over `num_tokens` predicted tokens."""

    nll: float
    num_tokens: int

    @property
    def value(self) -> float:
        """exp of the mean negative log-likelihood per token, at most the largest number there is."""
        return math.exp(min(self.nll / self.num_tokens, _MOST_NATS))

    def bits_per_byte(self, num_bytes: int) -> float:
        """The same sum in bits, over the bytes of the text."""
        return self.nll / math.log(2) / num_bytes


@dataclass(frozen=True, slots=True)
class TextQuality:
    """Losses of a text's predicted tokens in nats, window by window: what perplexity and its error are made of."""

    text: TokenizedText
    losses: tuple[torch.Tensor, ...]

    @property
    def perplexity(self) -> Perplexity:
        """Sum and count over the whole text."""
        return Perplexity(math.fsum(float(each.sum()) for each in self.losses), sum(map(len, self.losses)))

    @property
    def nats_per_token(self) -> Estimate:
        """Mean loss of a token; its error over documents, or over windows of one document."""
        return ratio_of(*by_unit(self.losses, self.text.units))

    def to_json(self) -> dict[str, Any]:
        """Figures with their standard errors; that of the perplexity is the perplexity times that of the mean loss."""
        found, mean = self.perplexity, self.nats_per_token
        return {
            "perplexity": found.value,
            "perplexity_stderr": None if mean.error is None else found.value * mean.error,
            "bits_per_byte": found.bits_per_byte(self.text.num_bytes) if self.text.num_bytes else None,
            "nats_per_token": mean.mean,
            "nats_per_token_stderr": mean.error,
            "stderr_over": self.text.unit,
            "nll": found.nll,
            "num_tokens": found.num_tokens,
        }


def perplexity(plan: Plan, sequences: Sequence[Sequence[int]], progress: Progress | None = None) -> Perplexity:
    """Perplexity of `sequences` of token ids; the first token of each is context only.

    Log-likelihoods are summed in float64. `progress` is called with the tokens of each sequence. Raises UsageError
    for sequences without anything to predict and for ids outside the vocabulary, RunError NUMERICS for logits that
    are not finite.
    """
    return Perplexity(*negative_log_likelihood(plan, sequences, progress))


def text_quality(plan: Plan, text: TokenizedText, progress: Progress | None = None) -> TextQuality:
    """Losses of `text` under `plan`; errors and `progress` as in `perplexity`."""
    return TextQuality(text, tuple(token_losses(plan, text.windows, progress)))


def change(before: TextQuality, after: TextQuality) -> Estimate:
    """Relative change of the perplexity on the same windows: 0.05 is 5 % more; errors are those of pairs.

    The two losses of a token go up and down together, so their difference is known far better than either.
    """
    differences = [b - a for a, b in zip(before.losses, after.losses, strict=True)]
    found = ratio_of(*by_unit(differences, before.text.units))
    factor = math.exp(min(found.mean, _MOST_NATS))
    return Estimate(factor - 1, None if found.error is None else factor * found.error)
