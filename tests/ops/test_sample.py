"""ops.sample against float64 arithmetic written here, against transformers' processors, and against exact counts."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pyruntime.errors import UsageError
from pyruntime.ops import sample
from pyruntime.ops.sample import SampleConfig, SampleResult
from tests.sampling import VOCAB, draws, expected_probs, make_row, one

FILTERS = [
    SampleConfig(temperature=1.0),
    SampleConfig(temperature=0.7, top_k=5),
    SampleConfig(temperature=1.3, top_p=0.8),
    SampleConfig(temperature=1.0, min_p=0.1),
    SampleConfig(temperature=2.0, top_k=9, top_p=0.9, min_p=0.05),
    SampleConfig(temperature=1.0, top_p=1e-6),
    SampleConfig(temperature=1.0, top_k=1),
    SampleConfig(temperature=1.0, min_p=1.0),
    SampleConfig(temperature=1.0, top_k=10_000, top_p=1.0),
    SampleConfig(temperature=1.0, top_k=-1),
]


@pytest.mark.parametrize("config", FILTERS)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_kept_probabilities_equal_plain_float64(config: SampleConfig, seed: int) -> None:
    row = make_row(seed)
    scaled = row.double() / config.temperature
    found = sample.kept_probabilities(scaled, config.top_k, config.top_p, config.min_p).numpy()
    np.testing.assert_allclose(found, expected_probs(row, config), rtol=1e-12, atol=1e-15)


def test_equals_at_the_border() -> None:
    logits = torch.log(torch.tensor([0.1, 0.2, 0.2, 0.2, 0.3], dtype=torch.float64))
    top_k = sample.kept_probabilities(logits, 2, 1.0, 0.0)
    assert (top_k > 0).tolist() == [False, True, True, True, True]  # the k-th and its equals, as in transformers
    top_p = sample.kept_probabilities(logits, 0, 0.6, 0.0)
    assert (top_p > 0).tolist() == [False, True, True, False, True]  # 0.3 + 0.2 < 0.6: two of the three, lower ids
    exact = sample.kept_probabilities(torch.zeros(4, dtype=torch.float64), 0, 0.5, 0.0)
    assert exact.tolist() == [0.5, 0.5, 0.0, 0.0]  # 0.25 + 0.25 reach 0.5: the third is not needed


# penalties


def test_repetition_penalty_covers_prompt_and_output() -> None:
    row = torch.tensor([4.0, 3.9, -1.0, -1.1, 1.0])
    greedy = SampleConfig(repetition_penalty=1.5)
    assert one(row, greedy).token_id == 0
    assert one(row, greedy, prompt=(0,)).token_id == 1  # 4 / 1.5 < 3.9
    assert one(row, greedy, output=(0, 0, 0)).token_id == 1
    assert one(row, greedy, prompt=(0,), output=(1,)).token_id == 0  # both divided
    negative = torch.tensor([-1.0, -1.2, -9.0])
    assert one(negative, greedy, prompt=(0,)).token_id == 1  # -1 * 1.5 < -1.2


def test_presence_and_frequency_cover_the_output_only() -> None:
    row = torch.tensor([3.0, 2.4, 1.0])
    assert one(row, SampleConfig(presence_penalty=1.0), prompt=(0, 0)).token_id == 0
    assert one(row, SampleConfig(presence_penalty=1.0), output=(0,)).token_id == 1
    assert one(row, SampleConfig(presence_penalty=0.5), output=(0, 0, 0)).token_id == 0  # 2.5 however often
    assert one(row, SampleConfig(frequency_penalty=0.25), output=(0, 0)).token_id == 0  # 3 - 0.5
    assert one(row, SampleConfig(frequency_penalty=0.25), output=(0, 0, 0)).token_id == 1  # 3 - 0.75
    assert one(row, SampleConfig(frequency_penalty=-2.0), output=(2, 2)).token_id == 2  # 1 + 4


@pytest.mark.parametrize("seed", range(4))
def test_agrees_with_the_processors_of_transformers(seed: int) -> None:
    from transformers.generation import logits_process as hf

    row = make_row(seed, vocab=101, scale=1.0)
    prompt, output = (5, 7, 9), (7, 11, 11)
    scores = row[None].clone()
    ids = torch.tensor([prompt + output])
    for processor in (
        hf.RepetitionPenaltyLogitsProcessor(1.3),
        hf.TemperatureLogitsWarper(0.8),
        hf.MinPLogitsWarper(0.02),
        hf.TopKLogitsWarper(20),
        hf.TopPLogitsWarper(0.85),
    ):
        scores = processor(ids, scores)
    wanted = scores.double().softmax(-1)[0]

    config = SampleConfig(repetition_penalty=1.3)
    penalised = sample._penalised(row.clone(), config, prompt, output)
    found = sample.kept_probabilities(penalised.double() / 0.8, top_k=20, top_p=0.85, min_p=0.02)
    assert torch.equal(found > 0, wanted > 0)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-7)  # transformers works in float32
    assert 1 < int((found > 0).sum()) <= 20


# masks


def test_bias_allowed_and_banned() -> None:
    row = torch.tensor([5.0, 4.0, 3.0, 2.0])
    assert one(row, SampleConfig(logit_bias=((3, 10.0),))).token_id == 3
    assert one(row, SampleConfig(allowed_token_ids=(2, 3))).token_id == 2
    assert one(row, SampleConfig(banned_token_ids=(0, 1))).token_id == 2
    assert one(row, SampleConfig(banned_token_ids=(2,), allowed_token_ids=(2, 3))).token_id == 3
    # a bias cannot bring back what is masked
    assert one(row, SampleConfig(allowed_token_ids=(1,), logit_bias=((0, 100.0),))).token_id == 1
    assert one(row, SampleConfig(banned_token_ids=(0,), logit_bias=((0, 100.0),))).token_id == 1
    assert set(draws(row, SampleConfig(temperature=3.0, banned_token_ids=(0,)), 200)) == {1, 2, 3}


def test_nothing_left_is_an_error_and_not_a_token() -> None:
    result = one(torch.tensor([1.0, 2.0]), SampleConfig(allowed_token_ids=(1,), banned_token_ids=(1,)))
    assert result.token_id is None
    assert result.error is not None
    assert "masks" in result.error


@pytest.mark.parametrize(
    "config",
    [
        SampleConfig(banned_token_ids=(4,)),
        SampleConfig(allowed_token_ids=(-1,)),
        SampleConfig(logit_bias=((9, 1.0),)),
    ],
)
def test_ids_outside_the_vocabulary_are_refused(config: SampleConfig) -> None:
    with pytest.raises(UsageError, match="expected ids from 0 to 3"):
        one(torch.zeros(4), config)


def test_history_outside_the_vocabulary_is_refused() -> None:
    with pytest.raises(UsageError, match="expected ids from 0 to 3"):
        one(torch.zeros(4), SampleConfig(repetition_penalty=1.1), prompt=(-1,))


# greedy, ranks, log-probabilities


def test_greedy_ties_go_to_the_lowest_id() -> None:
    row = torch.tensor([1.0, 7.0, 7.0, 0.0, 7.0])
    assert one(row, SampleConfig()).token_id == 1
    assert one(row, SampleConfig(num_logprobs=0)).token_id == 1
    assert one(row, SampleConfig(banned_token_ids=(1,))).token_id == 2
    many = torch.zeros(3, 50_000)
    many[:, 777:] = 1.0
    assert [r.token_id for r in sample.reference(many, [SampleConfig()] * 3, [()] * 3, [()] * 3, [0] * 3)] == [777] * 3


def test_logprobs_are_those_of_the_raw_logits() -> None:
    row = make_row(3)
    config = SampleConfig(
        temperature=0.3, top_k=2, repetition_penalty=3.0, logit_bias=((1, 50.0),), num_logprobs=5, seed=1
    )
    result = one(row, config, prompt=(0, 2))
    assert result.token_id == 1
    exact = row.double().numpy()
    exact = exact - np.log(np.exp(exact).sum())
    assert result.logprob == pytest.approx(exact[1], abs=1e-5)
    assert result.rank == 1 + int((exact > exact[1]).sum())
    order = sorted(range(VOCAB), key=lambda i: (-exact[i], i))[:5]
    assert [idx for idx, _, _ in result.top] == order
    assert [rank for _, _, rank in result.top] == [1, 2, 3, 4, 5]
    assert [value for _, value, _ in result.top] == pytest.approx([exact[i] for i in order], abs=1e-5)


def test_equal_logits_share_a_rank_and_come_in_the_order_of_ids() -> None:
    row = torch.tensor([2.0, 5.0, 2.0, 5.0, 2.0])
    result = one(row, SampleConfig(num_logprobs=4))
    assert [(idx, rank) for idx, _, rank in result.top] == [(1, 1), (3, 1), (0, 3), (2, 3)]


def test_no_logprobs_unless_asked_for() -> None:
    row = make_row()
    assert one(row, SampleConfig(temperature=1.0)) == SampleResult(one(row, SampleConfig(temperature=1.0)).token_id)
    with_own = one(row, SampleConfig(num_logprobs=0))
    assert with_own.top == ()
    assert with_own.logprob is not None
    assert with_own.rank == 1


def test_more_logprobs_than_tokens() -> None:
    assert len(one(torch.tensor([1.0, 2.0]), SampleConfig(num_logprobs=20)).top) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_token_logprobs(dtype: torch.dtype) -> None:
    logits = torch.stack([make_row(i) for i in range(4)]).to(dtype)
    logits[2, 0] = float("nan")
    token_ids = [3, 0, 1, 22]
    results = sample.token_logprobs(logits, token_ids, 3)
    for i in (0, 1, 3):
        exact = logits[i].double().numpy()
        exact = exact - np.log(np.exp(exact).sum())
        assert results[i].token_id == token_ids[i]
        assert results[i].logprob == pytest.approx(exact[token_ids[i]], abs=1e-5)
        assert results[i].rank == 1 + int((exact > exact[token_ids[i]]).sum())
        assert [idx for idx, _, _ in results[i].top] == sorted(range(VOCAB), key=lambda j: (-exact[j], j))[:3]
    assert results[2].token_id is None
    assert results[2].error == "logits contain NaN"
    with pytest.raises(UsageError):
        sample.token_logprobs(logits, [0, 0, 0, VOCAB], 0)


# bad rows and independence


BAD = {
    "NaN": torch.tensor([0.0, float("nan"), 1.0, 2.0]),
    "+inf": torch.tensor([0.0, float("inf"), 1.0, 2.0]),
    "no finite": torch.full((4,), float("-inf")),
}


@pytest.mark.parametrize("what", sorted(BAD))
@pytest.mark.parametrize(
    "config",
    [
        SampleConfig(),
        SampleConfig(temperature=1.0, seed=4),
        SampleConfig(num_logprobs=2),
        SampleConfig(allowed_token_ids=(2,)),
    ],
)
def test_a_bad_row_gets_an_error_and_leaves_the_others_alone(what: str, config: SampleConfig) -> None:
    good = make_row(1, vocab=4)
    rows = torch.stack([good, BAD[what], good])
    results = sample.reference(rows, [config] * 3, [()] * 3, [()] * 3, [5, 5, 6])
    assert results[1].token_id is None
    assert results[1].error is not None
    assert what in results[1].error
    assert results[0] == one(good, config, step=5)
    assert results[2] == one(good, config, step=6)


def test_minus_infinity_is_an_ordinary_mask() -> None:
    row = torch.tensor([float("-inf"), 1.0, 1.0])
    assert one(row, SampleConfig()).token_id == 1
    assert set(draws(row, SampleConfig(temperature=1.0), 100)) == {1, 2}
    assert set(draws(row, SampleConfig(temperature=1.0, top_k=3, top_p=0.99, min_p=0.1), 100)) == {1, 2}


def test_a_tiny_temperature_does_not_overflow() -> None:
    row = torch.tensor([1.0, 3e38, -3e38])
    assert one(row, SampleConfig(temperature=1e-300)).token_id == 1


def test_penalties_that_overflow_are_an_error() -> None:
    result = one(torch.tensor([1.0, 3e38]), SampleConfig(repetition_penalty=0.01), prompt=(1,))
    assert result.token_id is None
    assert result.error is not None
    assert "inf" in result.error


def test_a_row_does_not_depend_on_its_batch() -> None:
    configs = [
        SampleConfig(),
        SampleConfig(temperature=0.9, top_p=0.9, seed=1),
        SampleConfig(temperature=1.0, seed=2, num_logprobs=2),
        SampleConfig(repetition_penalty=1.2, frequency_penalty=0.5),
        SampleConfig(temperature=1.0, seed=1),
    ]
    rows = torch.stack([make_row(i) for i in range(5)])
    prompts, outputs, steps = [(i,) for i in range(5)], [(i, 2) for i in range(5)], [0, 1, 2, 3, 4]
    together = sample.reference(rows, configs, prompts, outputs, steps)
    alone = [one(rows[i], configs[i], prompts[i], outputs[i], steps[i]) for i in range(5)]
    assert together == alone
    order = [3, 1, 4, 0, 2]
    shuffled = sample.reference(
        rows[order],
        [configs[i] for i in order],
        [prompts[i] for i in order],
        [outputs[i] for i in order],
        [steps[i] for i in order],
    )
    assert shuffled == [together[i] for i in order]


def test_the_logits_are_not_changed() -> None:
    row = make_row()
    before = row.clone()
    one(row, SampleConfig(temperature=1.0, banned_token_ids=(1,), repetition_penalty=2.0, logit_bias=((0, 1.0),)), (2,))
    assert torch.equal(row, before)


def test_seed_and_step_both_matter() -> None:
    row = torch.zeros(1000)
    by_step = [one(row, SampleConfig(temperature=1.0, seed=1), step=s).token_id for s in range(20)]
    assert by_step == [one(row, SampleConfig(temperature=1.0, seed=1), step=s).token_id for s in range(20)]
    assert len(set(by_step)) > 15
    assert by_step != [one(row, SampleConfig(temperature=1.0, seed=2), step=s).token_id for s in range(20)]


@pytest.mark.parametrize("shape", [(2, 0), (2, 3, 4), ()])
def test_wrong_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match="expected floats"):
        sample.reference(torch.zeros(shape), [], [], [], [])


def test_lengths_must_agree() -> None:
    with pytest.raises(UsageError, match="steps has 1 entries; expected 2"):
        sample.reference(torch.zeros(2, 3), [SampleConfig()] * 2, [()] * 2, [()] * 2, [0])


def test_no_rows() -> None:
    assert sample.reference(torch.zeros(0, 3), [], [], [], []) == []


def test_a_float64_row_is_sampled_in_float64() -> None:
    row = torch.ones(VOCAB, dtype=torch.float64)
    row[5] += 1e-12
    assert one(row, SampleConfig(num_logprobs=1)).token_id == 5
    assert one(row, SampleConfig()).token_id == 5
