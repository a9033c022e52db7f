"""Rotary position embedding: the frequencies of every kind, and the rotation of halves."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch

from pyruntime.spec import Rope, RopeKind


@dataclass(frozen=True, slots=True)
class Rotary:
    """cos and sin of the angles of some rows, float64 [rows, rope.dim / 2], times the rope's attention factor."""

    cos: torch.Tensor
    sin: torch.Tensor


@functools.cache
def inverse_frequencies(rope: Rope) -> torch.Tensor:
    """Radians per position of each pair of values, float64 [rope.dim / 2].

    Sources: Su et al. 2021 (default), Chen et al. 2023 (linear: positions divided by `factor`), Llama 3.1 (llama3:
    long wavelengths divided, short ones kept, a linear blend between), Peng et al. 2023 section 3.2 (yarn), Ding et
    al. 2024 (longrope: each divided by its own number). Beyond their trained context `dynamic`, which equals default
    within it, and `longrope` would have to change cached keys, so longer contexts are refused before a step is made.
    """
    exponents = torch.arange(0, rope.dim, 2, dtype=torch.float64, device="cpu") / rope.dim
    frequencies = rope.theta**-exponents
    match rope.kind:
        case RopeKind.LINEAR:
            return frequencies / rope.factor
        case RopeKind.LLAMA3:
            return _llama3(rope, frequencies)
        case RopeKind.YARN:
            return _yarn(rope, frequencies)
        case RopeKind.LONGROPE:
            assert rope.divisors
            return frequencies / torch.tensor(rope.divisors, dtype=torch.float64, device="cpu")
    return frequencies


def rotary(rope: Rope, positions: torch.Tensor) -> Rotary:
    """The angles of `positions` [rows]."""
    angles = positions[:, None].double() * inverse_frequencies(rope).to(positions.device)
    factor = 1.0 if rope.attention_factor is None else rope.attention_factor
    return Rotary(angles.cos() * factor, angles.sin() * factor)


def rotate(x: torch.Tensor, rotary: Rotary) -> torch.Tensor:
    """`x` [rows, heads, head_dim] with its first 2 * angles values rotated: value i pairs with value i + angles."""
    half = rotary.cos.shape[1]
    cos, sin = rotary.cos[:, None].to(x.dtype), rotary.sin[:, None].to(x.dtype)
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)


def _llama3(rope: Rope, frequencies: torch.Tensor) -> torch.Tensor:
    assert rope.original_max_position and rope.low_freq_factor and rope.high_freq_factor
    turns = rope.original_max_position * frequencies / (2 * math.pi)
    blend = ((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)).clamp(0, 1)
    return frequencies * ((1 - blend) / rope.factor + blend)


def _yarn(rope: Rope, frequencies: torch.Tensor) -> torch.Tensor:
    assert rope.original_max_position and rope.beta_fast and rope.beta_slow

    def pair_with(turns: float) -> float:
        """The pair that makes `turns` turns over the trained context, as a real number."""
        assert rope.original_max_position
        return rope.dim * math.log(rope.original_max_position / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = pair_with(rope.beta_fast), pair_with(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    # a ramp of no width would divide by zero; transformers widens it by the same thousandth
    ramp = (torch.arange(rope.dim // 2, dtype=torch.float64, device="cpu") - low) / ((high - low) or 0.001)
    stretched = ramp.clamp(0, 1)
    return frequencies * (stretched / rope.factor + (1 - stretched))
