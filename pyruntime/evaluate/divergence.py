"""How far a plan's next-token distributions are from a reference's: Kullback-Leibler divergence and agreement."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch

from pyruntime.errors import RunError, UsageError
from pyruntime.evaluate.statistics import by_unit, ratio_of
from pyruntime.plan import Plan
from pyruntime.plan.likelihood import LogitRows, Progress, Window, logit_rows

# rows compared at a time: several float64 copies of each are in memory
_ROWS: Final = 32


@dataclass(frozen=True, slots=True)
class Divergence:
    """Per predicted token and window: KL(reference || plan) in nats, whether both have the same likeliest token."""

    units: tuple[int, ...]
    kl: tuple[torch.Tensor, ...]
    same_top: tuple[torch.Tensor, ...]
    # losses of the text's tokens in nats: a pass over the logits gives them too
    losses: tuple[torch.Tensor, ...]
    reference_losses: tuple[torch.Tensor, ...]

    def to_json(self) -> dict[str, Any]:
        """Mean, median, 99th percentile and largest KL, top-1 agreement, with standard errors over the units."""
        every = torch.cat(self.kl)
        mean = ratio_of(*by_unit(self.kl, self.units))
        agree = ratio_of(*by_unit(self.same_top, self.units))
        return {
            "kl_mean": mean.mean,
            "kl_mean_stderr": mean.error,
            "kl_median": float(every.median()),
            "kl_p99": _p99(every),
            "kl_max": float(every.max()),
            "top1_agreement": agree.mean,
            "top1_agreement_stderr": agree.error,
            "num_tokens": len(every),
        }


def divergence(
    reference: Iterable[LogitRows],
    plan: Plan,
    windows: Sequence[Window],
    units: Sequence[int],
    progress: Progress | None = None,
) -> Divergence:
    """Compare `plan` with `reference`, which holds the rows of another plan for the same windows (`logit_rows`).

    Everything is computed in float64. Raises as `logit_rows`, UsageError DIVERGENCE for rows of other windows or of
    another vocabulary, RunError NUMERICS for logits that are not finite.
    """
    found: list[list[tuple[torch.Tensor, ...]]] = [[] for _ in windows]
    rows = logit_rows(plan, windows, progress)
    for expected, own in zip(reference, rows, strict=True):
        if (expected.window, expected.begin, expected.logits.shape) != (own.window, own.begin, own.logits.shape):
            raise UsageError(
                "DIVERGENCE",
                f"the reference has {tuple(expected.logits.shape)} logits of window {expected.window}, the plan "
                f"{tuple(own.logits.shape)} of window {own.window}; expected the same text and vocabulary",
            )
        ids = windows[own.window].token_ids[own.begin : own.begin + len(own.logits)]
        parts = zip(expected.logits.split(_ROWS), own.logits.split(_ROWS), torch.tensor(ids).split(_ROWS), strict=True)
        found[own.window] += [_compare(p.cpu(), q.cpu(), targets) for p, q, targets in parts]
    columns = [_joined(parts) for parts in found]
    kl, same_top, losses, reference_losses = (tuple(column) for column in zip(*columns, strict=True))
    return Divergence(tuple(units), kl, same_top, losses, reference_losses)


def _compare(reference: torch.Tensor, found: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """KL, agreement and both losses of each row."""
    if not (bool(reference.isfinite().all()) and bool(found.isfinite().all())):
        raise RunError("NUMERICS", "the logits are not finite; check the weights, or use dtype float32")
    p, q = reference.double().log_softmax(-1), found.double().log_softmax(-1)
    # rounding can leave -1e-17 of a divergence that is never negative
    kl = (p.exp() * (p - q)).sum(-1).clamp(min=0.0)
    same = (reference.argmax(-1) == found.argmax(-1)).double()
    index = targets[:, None]
    return kl, same, -q.gather(1, index)[:, 0], -p.gather(1, index)[:, 0]


def _joined(parts: Sequence[tuple[torch.Tensor, ...]]) -> list[torch.Tensor]:
    nothing = torch.empty(0, dtype=torch.float64)
    return [torch.cat([part[i] for part in parts]) if parts else nothing for i in range(4)]


def _p99(values: torch.Tensor) -> float:
    """The smallest value that 99 % do not exceed."""
    return float(values.kthvalue(math.ceil(0.99 * len(values))).values)
