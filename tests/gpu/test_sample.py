"""Sampling on the device: the reference's token for the same logits, seed and step, and what a step leaves behind."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from pyruntime.ops import sample
from pyruntime.ops.gpu.batch import RowSampling
from pyruntime.ops.gpu.frame import Frame
from pyruntime.ops.gpu.sample import ERRORS, Feedback, SamplerParams, launch_sample, on_device, result
from pyruntime.ops.sample import SampleConfig
from tests.gpu.helpers import DEVICE, frame_of, guarded, view_of

GREEDY = SampleConfig()
POISON = -(10**6)


def frame() -> Frame:
    return frame_of(view_of([1], [1], [[0]]), (), ())


def params_of(configs: Sequence[SampleConfig], steps: Sequence[int], floats: torch.dtype) -> SamplerParams:
    rows = [RowSampling.of(config, step) for config, step in zip(configs, steps, strict=True)]
    types = {"top_k": torch.int32, "seed": torch.int64, "step": torch.int32}
    names = ("temperature", "top_k", "top_p", "min_p", "seed", "step")
    return SamplerParams(
        *(torch.tensor([getattr(row, n) for row in rows], dtype=types.get(n, floats), device=DEVICE) for n in names)
    )


def run(
    logits: Tensor, configs: Sequence[SampleConfig], steps: Sequence[int], floats: torch.dtype = torch.float64
) -> list[int]:
    """Codes of each row, from logits whose rows lie between NaN."""
    rows, vocab = logits.shape
    inside = guarded(torch.nn.functional.pad(logits, (0, 5), value=math.nan))[:, :vocab]
    params = params_of(configs, steps, floats)
    # one entry too many on each side
    whole = torch.full((rows + 2,), POISON, dtype=torch.int32, device=DEVICE)
    launch_sample(frame(), inside, params, whole[1:-1])
    assert int(whole[0]) == int(whole[-1]) == POISON
    assert params.step.tolist() == [step + 1 for step in steps]
    return whole[1:-1].tolist()


def expected(logits: Tensor, configs: Sequence[SampleConfig], steps: Sequence[int]) -> list[sample.SampleResult]:
    nothing: list[tuple[int, ...]] = [()] * len(configs)
    return sample.reference(logits, configs, nothing, nothing, steps)


def normal(rows: int, vocab: int, seed: int, scale: float = 3.0) -> Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale


FILTERS = (
    {},
    {"top_k": 1},
    {"top_k": 4},
    {"top_k": 40},
    {"top_k": 10**6},
    {"top_p": 0.9},
    {"top_p": 0.31},
    {"top_p": 1e-9},
    {"top_p": 0.999999},
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"top_k": 20, "top_p": 0.83},
    {"min_p": 0.02, "top_p": 0.77},
    {"top_k": 7, "min_p": 0.4, "top_p": 0.95},
    {"top_k": 3, "min_p": 0.001},
)
TEMPERATURES = (0.0, 1e-4, 0.7, 1.0, 1.9, 1e4)


def configs_of(seed: int) -> list[SampleConfig]:
    pairs = itertools.product(FILTERS, TEMPERATURES)
    return [SampleConfig(temperature=t, seed=seed - 31 * i, **kept) for i, (kept, t) in enumerate(pairs)]  # type: ignore[arg-type]


VOCABS = (1, 37, 1000, 5003)
KINDS = ("normal", "tied", "peaked")


@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_token_is_the_references(vocab: int, kind: str) -> None:
    # each size and kind meets every seventh request, together they meet all: the interpreter is slow
    begin = VOCABS.index(vocab) + 4 * KINDS.index(kind)
    configs = configs_of(seed=vocab)[begin % 7 :: 7]
    logits = normal(len(configs), vocab, seed=vocab)
    if kind == "tied":
        # many equal logits, both zeros among them
        logits = logits.round() * torch.where(normal(1, vocab, seed=1) > 0, 1.0, -1.0)
    if kind == "peaked":
        logits = logits.where(normal(*logits.shape, seed=2) > 2.0, -math.inf)
        logits[:, vocab // 2] = 9.0
    steps = [3 * i for i in range(len(configs))]
    found = [result(token) for token in run(logits, configs, steps)]
    assert found == expected(logits, configs, steps)


def test_more_candidates_than_there_is_room_for_change_nothing() -> None:
    # beyond 16384 candidates the whole row is searched
    configs = [
        SampleConfig(temperature=50.0, top_p=0.9, seed=1),
        SampleConfig(temperature=20.0, top_k=9000, top_p=0.6, seed=2),
        SampleConfig(temperature=2.0, min_p=1e-9, seed=3),
        SampleConfig(temperature=1.0, top_k=17000, seed=4),
        SampleConfig(temperature=1.0, top_p=0.8, seed=5),
        SampleConfig(temperature=3.0, seed=6),
        SampleConfig(temperature=1.0, top_p=0.7, seed=7),
    ]
    logits, steps = normal(len(configs), 20011, seed=8, scale=1.0), [7] * len(configs)
    # so many equal ones that no narrow range around the border holds few
    logits[-1] = (logits[-1] > 1.3).float()
    assert [result(token) for token in run(logits, configs, steps)] == expected(logits, configs, steps)


def test_many_seeds_and_steps_draw_the_references_tokens() -> None:
    config = SampleConfig(temperature=1.2, top_p=0.9, top_k=300)
    seeds = [0, 1, -1, 2**63 - 1, -(2**63), 2**64 - 1, *range(100, 108)]
    configs = [replace(config, seed=seed) for seed in seeds]
    logits = normal(1, 700, seed=5).expand(len(seeds), -1).contiguous()
    steps = [0, 2**31 - 2, 5, *range(len(seeds) - 3)]
    found = run(logits, configs, steps)
    assert [result(token) for token in found] == expected(logits, configs, steps)
    assert len(set(found)) > 7


def test_parameters_in_float32_are_as_good_where_they_are_exact() -> None:
    configs = [SampleConfig(temperature=0.75, top_p=0.875, min_p=0.03125, seed=seed) for seed in range(8)]
    logits, steps = normal(8, 900, seed=6), list(range(8))
    found = run(logits, configs, steps, floats=torch.float32)
    assert [result(token) for token in found] == expected(logits, configs, steps)


@pytest.mark.parametrize("config", [GREEDY, SampleConfig(temperature=1.0, top_p=0.9, top_k=5, min_p=0.1)])
def test_logits_that_are_no_distribution_give_the_references_errors(config: SampleConfig) -> None:
    logits = normal(6, 2500, seed=9)
    logits[0, 1500] = math.nan
    logits[1, 2499] = math.inf
    logits[2] = -math.inf
    logits[3, 0], logits[3, 1] = math.nan, math.inf
    logits[4] = -math.inf
    logits[4, 2100] = -5.0
    found = run(logits, [config] * 6, [0] * 6)
    assert [result(token) for token in found] == expected(logits, [config] * 6, [0] * 6)
    assert found[:4] == [-1, -2, -3, -1] and found[4] == 2100
    assert len(set(ERRORS.values())) == 3


def test_a_greedy_tie_goes_to_the_lowest_id_across_tiles() -> None:
    logits = torch.zeros(2, 3000)
    logits[0, 2999] = logits[0, 1024] = 4.0
    logits[1, 1023] = logits[1, 1024] = 4.0
    assert run(logits, [GREEDY] * 2, [0] * 2) == [1024, 1023]


def test_other_rows_change_nothing() -> None:
    configs = configs_of(seed=4)[6:40:3]
    logits, steps = normal(len(configs), 1300, seed=3), list(range(len(configs)))
    alone = [run(logits[i : i + 1], [configs[i]], [steps[i]])[0] for i in range(len(configs))]
    poisoned = logits.clone()
    poisoned[0] = math.nan
    assert run(logits, configs, steps) == alone
    assert run(poisoned, configs, steps)[1:] == alone[1:]


def test_the_next_step_is_fed_and_errors_feed_no_token() -> None:
    logits = normal(3, 600, seed=2)
    logits[1, 4] = math.nan
    configs, steps = [GREEDY, GREEDY, SampleConfig(temperature=1.0, seed=3)], [0, 1, 2]

    def ints(*values: int) -> Tensor:
        return torch.tensor([*values, POISON], dtype=torch.int32, device=DEVICE)

    feedback = Feedback(ints(11, 12, 13), ints(5, 6, 7), ints(6, 7, 8))
    out = ints(POISON, POISON, POISON)
    params = params_of(configs, steps, torch.float64)
    launch_sample(frame(), guarded(logits), params, out[:3], feedback)
    first, _, third = (each.token_id for each in expected(logits, configs, steps))
    assert out.tolist() == [first, -1, third, POISON]
    assert feedback.token_ids.tolist() == [first, 12, third, POISON]
    assert feedback.positions.tolist() == [6, 7, 8, POISON]
    assert feedback.contexts.tolist() == [7, 8, 9, POISON]
    # the same call again is the next step
    launch_sample(frame(), guarded(logits), params, out[:3], feedback)
    assert int(out[2]) == expected(logits, configs, [1, 2, 3])[2].token_id
    assert feedback.positions.tolist() == [7, 8, 9, POISON]


@pytest.mark.parametrize(
    ("config", "served"),
    [
        (SampleConfig(), True),
        (SampleConfig(temperature=0.8, top_k=5, top_p=0.9, min_p=0.1, seed=7), True),
        (SampleConfig(num_logprobs=0), False),
        (SampleConfig(temperature=1.0, num_logprobs=2), False),
        (SampleConfig(temperature=1.0, presence_penalty=0.5), False),
        (SampleConfig(logit_bias=((1, 2.0),)), False),
        (SampleConfig(temperature=1.0, banned_token_ids=(1,)), False),
        (SampleConfig(temperature=1.0, allowed_token_ids=()), False),
    ],
)
def test_masks_penalties_and_logprobs_are_left_to_the_reference(config: SampleConfig, served: bool) -> None:
    assert on_device(config) is served
