"""Means with their standard errors, over what may be taken as independent."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean and its standard error, None where one observation gives none."""

    mean: float
    error: float | None


def mean_of(values: Sequence[float]) -> Estimate:
    """Mean of independent values; the standard error is s / sqrt(n) with the sample's s (n - 1)."""
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return Estimate(mean, None)
    square = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return Estimate(mean, math.sqrt(square / len(values)))


def ratio_of(sums: Sequence[float], sizes: Sequence[float]) -> Estimate:
    """sum(sums) / sum(sizes) over independent units of unequal size.

    The standard error is that of the ratio estimator (Cochran, Sampling Techniques, 6.4):
    sqrt(k / (k - 1) sum((s_i - r n_i)^2)) / sum(n_i) for k units.
    """
    total = math.fsum(sizes)
    ratio = math.fsum(sums) / total
    if len(sums) < 2:
        return Estimate(ratio, None)
    square = math.fsum((s - ratio * n) ** 2 for s, n in zip(sums, sizes, strict=True))
    return Estimate(ratio, math.sqrt(len(sums) / (len(sums) - 1) * square) / total)


def by_unit(values: Sequence[torch.Tensor], units: Sequence[int]) -> tuple[list[float], list[float]]:
    """Sum and number of the values of each unit, units without a value left out; `values` come window by window."""
    sums: dict[int, float] = {}
    sizes: dict[int, float] = {}
    for own, unit in zip(values, units, strict=True):
        if len(own):
            sums[unit] = sums.get(unit, 0.0) + float(own.sum())
            sizes[unit] = sizes.get(unit, 0.0) + len(own)
    return list(sums.values()), list(sizes.values())
