"""Rotary embeddings against complex numbers in float64, and frequencies against the published formulas."""

from __future__ import annotations

import cmath
import math

import pytest
import torch

from pyruntime.ops.rope import inverse_frequencies, rotary, rotate
from pyruntime.spec import Rope, RopeKind


@pytest.mark.parametrize("head_dim, dim", [(8, 8), (8, 4), (12, 2), (6, 6)])
def test_rotation_is_multiplication_by_a_unit_complex_number(head_dim: int, dim: int) -> None:
    rope = Rope(kind=RopeKind.DEFAULT, dim=dim, theta=100.0)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 3, head_dim, dtype=torch.float64, generator=generator)
    positions = torch.tensor([0, 1, 7, 63, 100_000])
    found = rotate(x, rotary(rope, positions))
    for row, position in enumerate(positions.tolist()):
        for head in range(3):
            for pair in range(dim // 2):
                angle = position * 100.0 ** (-2 * pair / dim)
                before = complex(x[row, head, pair], x[row, head, pair + dim // 2])
                after = before * cmath.exp(1j * angle)
                got = complex(found[row, head, pair], found[row, head, pair + dim // 2])
                assert abs(got - after) < 1e-9
    assert torch.equal(found[..., dim:], x[..., dim:])


def test_yarn_scales_cos_and_sin_by_its_attention_factor() -> None:
    values = {"original_max_position": 16, "beta_fast": 32.0, "beta_slow": 1.0, "factor": 4.0}
    plain = rotary(Rope(kind=RopeKind.YARN, dim=8, theta=10000.0, attention_factor=1.0, **values), torch.tensor([3]))
    scaled = rotary(Rope(kind=RopeKind.YARN, dim=8, theta=10000.0, attention_factor=1.5, **values), torch.tensor([3]))
    assert torch.allclose(scaled.cos, 1.5 * plain.cos)
    assert torch.allclose(scaled.sin, 1.5 * plain.sin)


def test_llama3_keeps_short_wavelengths_and_divides_long_ones() -> None:
    rope = Rope(
        kind=RopeKind.LLAMA3,
        dim=128,
        theta=500000.0,
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position=8192,
    )
    plain = inverse_frequencies(Rope(kind=RopeKind.DEFAULT, dim=128, theta=500000.0))
    for before, after in zip(plain.tolist(), inverse_frequencies(rope).tolist(), strict=True):
        wavelength = 2 * math.pi / before
        if wavelength < 8192 / 4:
            assert after == pytest.approx(before, rel=1e-12)
        elif wavelength > 8192:
            assert after == pytest.approx(before / 8, rel=1e-12)
        else:
            assert before / 8 < after < before


def test_linear_divides_positions() -> None:
    rope = Rope(kind=RopeKind.LINEAR, dim=8, theta=10000.0, factor=4.0)
    plain = Rope(kind=RopeKind.DEFAULT, dim=8, theta=10000.0)
    stretched = rotary(rope, torch.tensor([40]))
    assert torch.allclose(stretched.cos, rotary(plain, torch.tensor([10])).cos, atol=1e-15)


def test_longrope_divides_each_frequency_by_its_own_number() -> None:
    divisors = (1.0, 2.0, 4.5)
    rope = Rope(
        kind=RopeKind.LONGROPE,
        dim=6,
        theta=100.0,
        original_max_position=16,
        attention_factor=1.25,
        divisors=divisors,
    )
    found = rotary(rope, torch.tensor([7]))
    angles = [7 * 100.0 ** (-2 * pair / 6) / divisor for pair, divisor in enumerate(divisors)]
    assert found.cos[0].tolist() == pytest.approx([1.25 * math.cos(angle) for angle in angles], rel=1e-12)
    assert found.sin[0].tolist() == pytest.approx([1.25 * math.sin(angle) for angle in angles], rel=1e-12)
