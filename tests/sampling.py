"""What the tests of sampling share: rows of logits, one draw, many draws, and the distribution they must follow."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import torch

from pyruntime.ops import sample
from pyruntime.ops.sample import SampleConfig, SampleResult

VOCAB = 23


def make_row(seed: int = 0, vocab: int = VOCAB, scale: float = 2.0) -> torch.Tensor:
    return torch.randn(vocab, generator=torch.Generator().manual_seed(seed)) * scale


def one(
    row: torch.Tensor, config: SampleConfig, prompt: tuple[int, ...] = (), output: tuple[int, ...] = (), step: int = 0
) -> SampleResult:
    (result,) = sample.reference(row, [config], [prompt], [output], [step])
    return result


def draws(row: torch.Tensor, config: SampleConfig, count: int, **history: Any) -> Counter[int]:
    tokens = (one(row, config, step=step, **history).token_id for step in range(count))
    return Counter(token for token in tokens if token is not None)


def expected_probs(row: torch.Tensor, config: SampleConfig) -> np.ndarray:
    """The distribution, computed the plain way: loops and float64."""
    logits = row.double().numpy() / config.temperature
    probs = np.exp(logits - logits.max())
    probs /= probs.sum()
    alive = [i for i in range(len(probs)) if probs[i] >= config.min_p * probs.max()]
    alive.sort(key=lambda i: (-probs[i], i))
    if config.top_k > 0:
        alive = alive[: config.top_k]
    total, taken, kept = sum(probs[i] for i in alive), 0.0, []
    for i in alive:
        if taken / total >= config.top_p and kept:
            break
        kept.append(i)
        taken += probs[i]
    out = np.zeros_like(probs)
    out[kept] = probs[kept] / probs[kept].sum()
    return out
