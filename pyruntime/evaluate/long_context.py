"""What a plan makes of a long context: loss by position, and how well it copies from far back; no data set needed."""

from __future__ import annotations

import itertools
import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch

from pyruntime.errors import UsageError
from pyruntime.evaluate.statistics import Estimate, mean_of
from pyruntime.plan import Plan
from pyruntime.plan.likelihood import Progress, Window, token_losses

# tokens of the passage that is repeated
_PASSAGE: Final = 16


@dataclass(frozen=True, slots=True)
class PositionLoss:
    """Mean loss in nats of the tokens with `begin` to `end` - 1 tokens before them."""

    begin: int
    end: int
    num_tokens: int
    loss: Estimate


@dataclass(frozen=True, slots=True)
class CopyLoss:
    """Mean losses in nats of a passage of random tokens, and of the same passage `distance` tokens further.

    `gain` is their difference, passage by passage: what the model makes of having seen it.
    """

    distance: int
    first: Estimate
    second: Estimate
    gain: Estimate


@dataclass(frozen=True, slots=True)
class CopyProbe:
    """The sequences of the copying probe: for each distance `repeats` pairs of a passage and of the whole sequence."""

    distances: tuple[int, ...]
    repeats: int
    seed: int
    windows: tuple[Window, ...]


def losses_by_position(windows: Sequence[Window], losses: Sequence[torch.Tensor]) -> tuple[PositionLoss, ...]:
    """Mean loss by the number of tokens before a token, in buckets [1, 2), [2, 4), [4, 8) and so on.

    Falling figures say that the model uses what is far away; where a pruned model falls less than the dense one, it
    has lost that. The error takes tokens as independent, which makes it a little too small.
    """
    positions = torch.cat([torch.arange(window.first, len(window.token_ids)) for window in windows])
    every = torch.cat(list(losses))
    longest = int(positions.max()) + 1
    found = []
    for k in range((longest - 1).bit_length()):
        begin, end = 1 << k, min(1 << k + 1, longest)
        own = every[(positions >= begin) & (positions < end)]
        if len(own):
            found.append(PositionLoss(begin, end, len(own), mean_of(own.tolist())))
    return tuple(found)


def copy_probe(
    vocab_size: int, max_length: int, *, bos: int | None, avoid: Collection[int] = (), repeats: int = 8, seed: int = 0
) -> CopyProbe:
    """Random sequences in which a passage of 16 tokens comes twice, 16, 64, 256, ... tokens apart, up to the context.

    Tokens are drawn evenly from the vocabulary without `avoid` (special tokens); `bos` opens each sequence. This is the
    repeated random sequence that Olsson et al. (2022), In-context Learning and Induction Heads, measure copying with.
    Raises UsageError PROBE for a context too short for the least distance, and where every token is special.
    """
    head = [] if bos is None else [bos]
    longest = max_length - len(head) - _PASSAGE
    distances = [each for k in range(31) if (each := _PASSAGE << 2 * k) < longest]
    if longest < _PASSAGE:
        raise UsageError("PROBE", f"a context of {max_length} tokens is too short; expected {2 * _PASSAGE + 1} or more")
    # the furthest that the context allows is what dropping is said to hurt most
    distances.append(longest)
    special = set(avoid)
    draw, ordinary = random.Random(seed), [i for i in range(vocab_size) if i not in special]
    if not ordinary:
        raise UsageError("PROBE", f"each of the {vocab_size} tokens is special; leave out the copying probe")
    windows = []
    for distance, _ in itertools.product(distances, range(repeats)):
        body = draw.choices(ordinary, k=distance)
        for ids in ([*head, *body[:_PASSAGE]], [*head, *body, *body[:_PASSAGE]]):
            # nothing tells a model that the copy begins: its first token is context only
            windows.append(Window(ids, len(ids) - _PASSAGE + 1))
    return CopyProbe(tuple(distances), repeats, seed, tuple(windows))


def copy_losses(plan: Plan, probe: CopyProbe, progress: Progress | None = None) -> tuple[CopyLoss, ...]:
    """Run the probe: a line for each distance. `progress` is called with the tokens of each sequence."""
    losses = iter(token_losses(plan, probe.windows, progress))
    found = []
    for distance in probe.distances:
        pairs = [(float(next(losses).mean()), float(next(losses).mean())) for _ in range(probe.repeats)]
        first, second = ([pair[i] for pair in pairs] for i in (0, 1))
        gain = mean_of([a - b for a, b in pairs])
        found.append(CopyLoss(distance, mean_of(first), mean_of(second), gain))
    return tuple(found)


def positions_json(found: Sequence[PositionLoss]) -> list[dict[str, Any]]:
    """JSON-ready lines."""
    return [
        {
            "begin": each.begin,
            "end": each.end,
            "num_tokens": each.num_tokens,
            "nats_per_token": each.loss.mean,
            "nats_per_token_stderr": each.loss.error,
        }
        for each in found
    ]


def copies_json(found: Sequence[CopyLoss]) -> list[dict[str, Any]]:
    """JSON-ready lines."""
    return [
        {
            "distance": each.distance,
            "first_nats": each.first.mean,
            "second_nats": each.second.mean,
            "gain_nats": each.gain.mean,
            "gain_nats_stderr": each.gain.error,
        }
        for each in found
    ]
