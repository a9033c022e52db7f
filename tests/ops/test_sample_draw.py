"""The random side of ops.sample: exact probabilities, chi-square on many draws with fixed seeds."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from pyruntime.ops import sample
from pyruntime.ops.sample import SampleConfig
from tests.sampling import VOCAB, draws, expected_probs, make_row, one


def chi_square(found: Counter[int], expected: np.ndarray, count: int) -> tuple[float, int]:
    wanted = expected * count
    cells = wanted > 0
    statistic = sum((found[i] - wanted[i]) ** 2 / wanted[i] for i in np.nonzero(cells)[0])
    return float(statistic), int(cells.sum()) - 1


CONFIGS = [
    SampleConfig(temperature=1.0),
    SampleConfig(temperature=0.7, top_k=5),
    SampleConfig(temperature=1.3, top_p=0.8),
    SampleConfig(temperature=2.0, top_k=9, top_p=0.9, min_p=0.05),
]


@pytest.mark.parametrize("config", CONFIGS)
def test_draws_follow_the_distribution(config: SampleConfig) -> None:
    row, count = make_row(4, vocab=12, scale=1.0), 4000
    statistic, freedom = chi_square(draws(row, replace(config, seed=99), count), expected_probs(row, config), count)
    # mean k, standard deviation sqrt(2k): five deviations; the seed is fixed, so this never flickers
    assert statistic < freedom + 5 * math.sqrt(2 * freedom) + 1


def test_nothing_outside_the_kept_set_is_drawn() -> None:
    row, config = make_row(6), SampleConfig(temperature=1.5, top_k=6, top_p=0.9, seed=3)
    kept = set(np.nonzero(expected_probs(row, config))[0])
    assert set(draws(row, config, 500)) <= kept
    assert len(kept) < VOCAB


def test_chi_square_detects_a_wrong_distribution() -> None:
    row, count = make_row(4, vocab=12, scale=1.0), 4000
    found = draws(row, SampleConfig(temperature=1.0, seed=99), count)
    statistic, freedom = chi_square(found, expected_probs(row, SampleConfig(temperature=1.25)), count)
    assert statistic > freedom + 5 * math.sqrt(2 * freedom) + 1


def test_uniforms_are_uniform_over_steps_and_over_seeds() -> None:
    count, cells = 20_000, 50
    for numbers in (
        [sample.uniform(7, step) for step in range(count)],
        [sample.uniform(seed, 0) for seed in range(count)],
        [sample.uniform(-seed, 3) for seed in range(count)],
    ):
        assert min(numbers) >= 0.0
        assert max(numbers) < 1.0
        histogram = np.histogram(numbers, bins=cells, range=(0, 1))[0]
        statistic = float(((histogram - count / cells) ** 2 / (count / cells)).sum())
        assert statistic < cells - 1 + 5 * math.sqrt(2 * (cells - 1))
    lag_one = np.corrcoef(
        [sample.uniform(7, s) for s in range(count)], [sample.uniform(7, s + 1) for s in range(count)]
    )
    assert abs(lag_one[0, 1]) < 5 / math.sqrt(count)
    neighbours = np.corrcoef(
        [sample.uniform(s, 5) for s in range(count)], [sample.uniform(s + 1, 5) for s in range(count)]
    )
    assert abs(neighbours[0, 1]) < 5 / math.sqrt(count)


def test_mix64_equals_splitmix64_written_with_numpy() -> None:
    def finalise(bits: np.uint64) -> np.uint64:
        bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return bits ^ (bits >> np.uint64(31))

    for seed in (0, 1, -1, 2**63 - 1, -(2**63), 123456789):
        for step in (0, 1, 1000, 2**31):
            with np.errstate(over="ignore"):
                inner = finalise(np.uint64(seed % 2**64)) + np.uint64(0x9E3779B97F4A7C15) * np.uint64(step + 1)
                assert sample.mix64(seed, step) == int(finalise(inner))


def test_the_draw_is_the_inverse_of_the_cumulative_sum() -> None:
    row = torch.log(torch.tensor([0.1, 0.2, 0.0, 0.3, 0.4]))
    for step in range(200):
        u = sample.uniform(5, step)
        wanted = next(i for i, edge in zip((0, 1, 3, 4), (0.1, 0.3, 0.6, 1.1), strict=True) if u < edge)
        assert one(row, SampleConfig(temperature=1.0, seed=5), step=step).token_id == wanted


def test_a_random_number_of_zero_draws_no_impossible_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample, "uniform", lambda seed, step: 0.0)
    assert one(torch.tensor([float("-inf"), 0.0, 0.0]), SampleConfig(temperature=1.0)).token_id == 1


def test_penalties_follow_the_formula_in_the_distribution() -> None:
    row, count = make_row(8, vocab=8, scale=1.0), 3000
    config = SampleConfig(
        temperature=0.9,
        repetition_penalty=1.4,
        presence_penalty=0.6,
        frequency_penalty=0.3,
        seed=11,
        logit_bias=((2, 1.5),),
    )
    prompt, output = (1, 2), (3, 3, 2)
    logits = row.double().numpy().copy()
    logits[2] += 1.5
    for i in {*prompt, *output}:
        logits[i] = logits[i] / 1.4 if logits[i] > 0 else logits[i] * 1.4
    for i in set(output):
        logits[i] -= 0.3 * output.count(i) + 0.6
    probs = np.exp(logits / 0.9)
    probs /= probs.sum()
    statistic, freedom = chi_square(draws(row, config, count, prompt=prompt, output=output), probs, count)
    assert statistic < freedom + 5 * math.sqrt(2 * freedom)
