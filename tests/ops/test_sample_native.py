"""The native sampler against sample.reference on random rows, and against exact probabilities."""

from __future__ import annotations

import functools
import math
import random
from collections import Counter
from dataclasses import dataclass, replace

import pytest
import torch

from pyruntime.ops import _native, sample
from pyruntime.ops.sample import SampleConfig, SampleResult
from pyruntime.ops.sample_native import NativeSampler, on_cpu
from tests.sampling import expected_probs, make_row

ISAS = _native.load().module.isa_available()
Ids = tuple[int, ...]
VOCABS = (1, 2, 63, 100, 255, 257, 1000, 32000)
INF = float("inf")
# about a thousand times what the two sums can differ by
CLOSE = 1e-11


def native(isa: str, num_threads: int = 2) -> _native.Native:
    return _native.Native(_native.load().module, isa, num_threads)


def random_rows(rng: random.Random, vocab: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    rows = torch.randn(3, vocab, generator=generator) * rng.choice((0.1, 1.0, 5.0, 20.0))
    if rng.random() < 0.3:
        rows = rows.round()
    if rng.random() < 0.3:
        rows[torch.rand(rows.shape, generator=generator) < 0.5] = -INF
    if rng.random() < 0.1:
        rows[1, rng.randrange(vocab)] = rng.choice((math.nan, INF))
    return rows


def random_config(rng: random.Random, vocab: int) -> SampleConfig:
    some = ids(rng, vocab, 1, 5)
    return SampleConfig(
        temperature=rng.choice((0.0, 1e-3, 0.7, 1.0, 10.0)),
        top_k=rng.choice((-1, 0, 1, 2, 50, 300, max(vocab - 1, 1), vocab, vocab + 1)),
        top_p=rng.choice((1.0, 1.0, 1e-6, 0.5, 0.9, 0.999)),
        min_p=rng.choice((0.0, 0.0, 0.01, 0.3, 1.0)),
        repetition_penalty=rng.choice((1.0, 1.0, 1.3, 0.7)),
        presence_penalty=rng.choice((0.0, 0.0, 0.5, -0.1)),
        frequency_penalty=rng.choice((0.0, 0.0, 0.37)),
        logit_bias=tuple((i, rng.uniform(-5, 5)) for i in some) if rng.random() < 0.3 else (),
        allowed_token_ids=ids(rng, vocab, 0, 20) if rng.random() < 0.15 else None,
        banned_token_ids=ids(rng, vocab, 0, 4) if rng.random() < 0.2 else (),
        seed=rng.randrange(2**63),
        num_logprobs=rng.choice((None, None, 0, 1, 5, min(vocab + 1, 300))),
    )


def ids(rng: random.Random, vocab: int, low: int, high: int) -> Ids:
    return tuple(rng.randrange(vocab) for _ in range(rng.randint(low, high)))


def margin(row: torch.Tensor, config: SampleConfig, prompt: Ids, output: Ids, step: int) -> float:
    """How far the reference is from another choice, as a part of the whole probability; 1 where nothing is drawn."""
    logits = sample._penalised(sample._masked(row, config), config, prompt, output)
    best = float(logits.max())
    if config.temperature == 0.0 or not math.isfinite(best):
        return 1.0
    scaled = (logits.double() - best) / config.temperature
    # an equal of the best has the weight 1 by any way of computing it
    weights = scaled[scaled < 0.0].exp()
    found = [1.0]
    if config.min_p > 0.0:
        found += (weights / config.min_p - 1.0).abs().tolist()
    if config.top_p < 1.0:
        sums = sample.kept_probabilities(scaled, config.top_k, 1.0, config.min_p).sort(descending=True).values.cumsum(0)
        found += (sums - config.top_p).abs().tolist()
    sums = sample.kept_probabilities(scaled, config.top_k, config.top_p, config.min_p).cumsum(0)
    found += (sums - sample.uniform(config.seed, step) * sums[-1]).abs().tolist()
    return min(found)


@dataclass
class Case:
    """Rows, what is asked of them, and what the reference chooses; `clear` where that is no matter of rounding."""

    logits: torch.Tensor
    asked: tuple[list[SampleConfig], list[Ids], list[Ids], list[int]]
    expected: list[SampleResult]
    clear: list[bool]


@functools.cache
def cases(vocab: int) -> list[Case]:
    rng, found = random.Random(vocab), []
    for _ in range(12 if vocab > 1000 else 60):
        logits = random_rows(rng, vocab)
        configs = [random_config(rng, vocab) for _ in logits]
        prompts, outputs = ([ids(rng, vocab, 0, 30) for _ in logits] for _ in range(2))
        steps = [rng.randrange(1000) for _ in logits]
        expected = sample.reference(logits, configs, prompts, outputs, steps)
        per_row = zip(logits, configs, prompts, outputs, steps, strict=True)
        clear = [margin(*each) > CLOSE for each in per_row]
        found.append(Case(logits, (configs, prompts, outputs, steps), expected, clear))
    return found


def assert_same(found: SampleResult, expected: SampleResult) -> None:
    assert (found.token_id, found.error, found.rank) == (expected.token_id, expected.error, expected.rank)
    assert [(i, rank) for i, _, rank in found.top] == [(i, rank) for i, _, rank in expected.top]
    values = [value for _, value, _ in found.top] + ([] if found.logprob is None else [found.logprob])
    wanted = [value for _, value, _ in expected.top] + ([] if expected.logprob is None else [expected.logprob])
    # the reference's log-probabilities are float32
    assert values == pytest.approx(wanted, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("isa", ISAS)
def test_equals_the_reference(isa: str, vocab: int) -> None:
    compared = 0
    for case in cases(vocab):
        found = on_cpu(case.logits, *case.asked, native=native(isa))
        for result, expected, clear in zip(found, case.expected, case.clear, strict=True):
            if clear:
                assert_same(result, expected)
                compared += 1
    assert compared > 0.9 * sum(len(case.clear) for case in cases(vocab))


def test_the_cases_reach_everything() -> None:
    results = [result for vocab in VOCABS for case in cases(vocab) for result in case.expected]
    assert {result.error for result in results} > {None, "logits contain NaN", "logits contain +inf"}
    assert any(result.error is not None and "masks" in result.error for result in results)
    assert any(-INF in [value for _, value, _ in result.top] for result in results)
    assert len({result.token_id for result in results}) > 100


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_neither_the_batch_nor_the_threads_change_a_row(isa: str, num_threads: int) -> None:
    for case in cases(32000)[:4]:
        together = on_cpu(case.logits, *case.asked, native=native(isa, num_threads))
        sampler = NativeSampler(32000, native(isa, 1))
        for row in (2, 0, 1):
            (alone,) = sampler.sample(case.logits, [row], *([values[row]] for values in case.asked))
            assert alone == together[row]


def test_a_row_may_be_asked_for_in_any_order_and_twice() -> None:
    logits = torch.zeros(5, 300)
    best = [7, 299, 0, 256, 255]
    logits[range(5), best] = 1.0
    rows = [4, 0, 4, 1, 3]
    sampler = NativeSampler(300)
    for config in (SampleConfig(), SampleConfig(num_logprobs=0), SampleConfig(temperature=0.01)):
        results = sampler.sample(logits, rows, [config] * 5, [()] * 5, [()] * 5, [0] * 5)
        assert [result.token_id for result in results] == [best[row] for row in rows]
    assert sampler.sample(logits, [], [], [], [], []) == []


# borders and draws


def draws(isa: str, row: torch.Tensor, config: SampleConfig, count: int, *, step: int = 0) -> Counter[int]:
    sampler = NativeSampler(row.shape[0], native(isa))
    asked = [config] * count, [()] * count, [()] * count, range(step, step + count)
    return Counter(result.token_id for result in sampler.sample(row[None], [0] * count, *asked) if result.token_id)


@pytest.mark.parametrize("isa", ISAS)
def test_equals_at_the_border(isa: str) -> None:
    row = torch.log(torch.tensor([0.0, 0.1, 0.2, 0.2, 0.2, 0.3]))
    hot = SampleConfig(temperature=1.0, seed=3)
    assert set(draws(isa, row, replace(hot, top_k=2), 300)) == {2, 3, 4, 5}  # the k-th and its equals
    assert set(draws(isa, row, replace(hot, top_p=0.6), 300)) == {2, 3, 5}  # 0.3 + 0.2 < 0.6: two of three, lower ids
    assert set(draws(isa, row, replace(hot, top_p=1e-300), 300)) == {5}
    flat = torch.tensor([-INF, 0.0, -0.0, 0.0, 0.0])
    assert set(draws(isa, flat, replace(hot, top_p=0.5), 300)) == {1, 2}  # 0.25 + 0.25 reach 0.5
    assert set(draws(isa, flat, replace(hot, top_k=1), 300)) == {1, 2, 3, 4}
    assert set(draws(isa, flat, replace(hot, min_p=1.0), 300)) == {1, 2, 3, 4}
    assert on_cpu(flat, [SampleConfig()], [()], [()], [0], native=native(isa))[0].token_id == 1


CONFIGS = [
    SampleConfig(temperature=1.0),
    SampleConfig(temperature=0.7, top_k=5),
    SampleConfig(temperature=1.3, top_p=0.8),
    SampleConfig(temperature=1.0, min_p=0.2),
    SampleConfig(temperature=2.0, top_k=9, top_p=0.9, min_p=0.05),
]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("config", CONFIGS)
def test_draws_follow_the_distribution(isa: str, config: SampleConfig) -> None:
    # spread over three blocks, with nothing between
    row, count = torch.full((700,), -INF), 20_000
    row[[1, 2, 254, 255, 256, 257, 511, 512, 513, 600, 698, 699]] = make_row(4, vocab=12, scale=1.0)
    expected = expected_probs(row, config) * count
    found = draws(isa, row, replace(config, seed=99), count)
    likely = [i for i in range(700) if expected[i] > 0]
    assert set(found) <= set(likely)
    statistic = sum((found[i] - expected[i]) ** 2 / expected[i] for i in likely)
    freedom = len(likely) - 1
    # mean k, standard deviation sqrt(2k): five deviations; the seed is fixed, so this never flickers
    assert statistic < freedom + 5 * math.sqrt(2 * freedom) + 1
    wrong = expected_probs(row, replace(config, temperature=config.temperature * 1.25)) * count
    assert sum((found[i] - wrong[i]) ** 2 / wrong[i] for i in likely) > freedom + 5 * math.sqrt(2 * freedom) + 1


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("config", [*CONFIGS, SampleConfig(temperature=1.0, top_k=299)])
@pytest.mark.parametrize(("number", "wanted"), [(0.0, 3), (1.0 - 2.0**-53, 297)])
def test_the_ends_of_the_random_numbers(
    isa: str, config: SampleConfig, number: float, wanted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sample, "uniform", lambda seed, step: number)
    row = torch.full((300,), -INF)
    row[3:298:49] = 1.0
    row[[3, 297]] = 5.0  # no filter drops the ends
    assert on_cpu(row, [config], [()], [()], [0], native=native(isa))[0].token_id == wanted


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("config", [CONFIGS[0], CONFIGS[1], CONFIGS[3]])
def test_a_random_number_on_a_border_draws_the_next_token(
    isa: str, config: SampleConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    # all equal, so every filter keeps all of them, and each sum is exact
    row = torch.full((512,), 3.0)
    for token_id in (1, 2, 255, 256, 257, 511):
        number = token_id / 512
        monkeypatch.setattr(sample, "uniform", lambda seed, step, number=number: number)
        assert on_cpu(row, [config], [()], [()], [0], native=native(isa))[0].token_id == token_id


@pytest.mark.parametrize("isa", ISAS)
def test_log_probabilities_are_those_of_double_arithmetic(isa: str) -> None:
    below = torch.arange(0.0, 36.0, 0.015625)
    logits = torch.stack([torch.zeros_like(below), -below], 1)
    results = NativeSampler(2, native(isa)).token_logprobs(logits, [0] * len(below), 0)
    for result, x in zip(results, below.tolist(), strict=True):
        assert result.logprob == pytest.approx(-math.log1p(math.exp(-x)), rel=0, abs=5e-16)


@pytest.mark.parametrize("isa", ISAS)
def test_overflow_and_empty_masks_are_errors(isa: str) -> None:
    row = torch.tensor([1.0, 3e38])
    configs = [
        SampleConfig(repetition_penalty=0.01),
        SampleConfig(allowed_token_ids=()),
        SampleConfig(banned_token_ids=(0, 1), temperature=1.0),
        SampleConfig(allowed_token_ids=(1,), logit_bias=((0, INF),)),
        SampleConfig(temperature=1e-300),
    ]
    asked = configs, [(1,)] * 5, [()] * 5, [0] * 5
    expected = sample.reference(row.expand(5, 2), *asked)
    assert [result.error is None for result in expected] == [False, False, False, False, True]
    assert on_cpu(row.repeat(5, 1), *asked, native=native(isa)) == expected


@pytest.mark.parametrize("isa", ISAS)
def test_token_logprobs(isa: str) -> None:
    logits = torch.stack([make_row(i, vocab=1000) for i in range(4)])
    logits[2, 0] = math.nan
    logits[3, 5:] = -INF
    given = [3, 999, 1, 700]
    found = NativeSampler(1000, native(isa)).token_logprobs(logits, given, 7)
    for result, expected in zip(found, sample.token_logprobs(logits, given, 7), strict=True):
        assert_same(result, expected)
