"""Samplers held against the reference: the same token for the same logits, seed and step."""

from __future__ import annotations

import math
from typing import Final

import torch

from pyruntime.bench.selfcheck.judge import Found
from pyruntime.bench.selfcheck.walk import on_device, reason_of
from pyruntime.ops import sample
from pyruntime.ops.gpu.batch import BatchSizes, RowSampling, StaticBatch
from pyruntime.ops.gpu.frame import Frame
from pyruntime.ops.gpu.rotary import RotaryCache
from pyruntime.ops.gpu.workspace import Workspace
from pyruntime.ops.sample import SampleConfig, SampleResult
from pyruntime.ops.sample_native import NativeSampler
from pyruntime.ops.step import Rows, SequenceSlice
from pyruntime.plan import Plan
from pyruntime.plan.sampler import DeviceSampler

_VOCAB: Final = 5003
# the parameters are exact in float32
_CONFIGS: Final = (
    SampleConfig(),
    SampleConfig(temperature=0.75, seed=1),
    SampleConfig(temperature=1.0, top_k=5, seed=2),
    SampleConfig(temperature=1.5, top_p=0.875, seed=3),
    SampleConfig(temperature=1.25, min_p=0.03125, seed=-4),
    SampleConfig(temperature=2.0, top_k=50, top_p=0.75, min_p=0.0078125, seed=5),
    SampleConfig(),
)


def check_sampler(plan: Plan, found: Found) -> None:
    """The sampler that an engine takes for the plan's target."""
    try:
        if plan.gpu is None:
            _check_native(found)
        else:
            _check_gpu(plan, found)
    # whatever a compiler or a driver may raise is a result of the check
    except Exception as error:
        found.fail("sample", reason_of(error))


def _check_native(found: Found) -> None:
    logits, none = _logits(), [()] * len(_CONFIGS)
    steps = range(len(_CONFIGS))
    results = NativeSampler(_VOCAB).sample(logits, steps, _CONFIGS, none, none, steps)
    _compare(results, logits, found)


def _check_gpu(plan: Plan, found: Found) -> None:
    # on a frame and a batch as decode steps have them
    assert plan.gpu is not None
    count, device = len(_CONFIGS), plan.device
    batch = StaticBatch(device, BatchSizes(count, 0, count, 1), 0)
    sampling = [RowSampling.of(config, step) for step, config in enumerate(_CONFIGS)]
    batch.load_decode([SequenceSlice((0,), 0, (0,), (0,))] * count, count, sampling)
    view = batch.view(Rows.ALL, count, count, 1, decode=True)
    cache = plan.new_cache(1, 16)
    frame = Frame(view, (), (), cache, plan.gpu.info, Workspace(device), RotaryCache(device, 16))
    tokens = torch.zeros(count, dtype=torch.int32, device=device)
    logits = _logits()
    sampler = DeviceSampler()
    with on_device(device):
        sampler.launch(logits.to(device), batch, tokens, frame)
    results = [sampler.result(token) for token in tokens.tolist()]
    _compare(results, logits, found)


def _logits() -> torch.Tensor:
    values = torch.randn(len(_CONFIGS), _VOCAB, generator=torch.Generator().manual_seed(0)) * 3
    values[-1, 77] = math.nan
    return values


def _compare(results: list[SampleResult], logits: torch.Tensor, found: Found) -> None:
    none = [()] * len(_CONFIGS)
    expected = sample.reference(logits, _CONFIGS, none, none, range(len(_CONFIGS)))
    found.saw("sample", 0.0, 0.0, "")
    for config, mine, right in zip(_CONFIGS, results, expected, strict=True):
        if mine != right:
            found.fail("sample", f"{config}: {_shown(mine)}, not {_shown(right)}")


def _shown(result: SampleResult) -> str:
    return result.error or f"token {result.token_id}"
