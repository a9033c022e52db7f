"""Decode steps of target cuda: the next tokens are sampled where the logits are, and fed back there."""

from __future__ import annotations

from collections.abc import Sequence

from pyruntime.ops import sample
from pyruntime.ops.cache import KvCache
from pyruntime.ops.gpu.batch import GREEDY, RowSampling
from pyruntime.ops.sample import SampleConfig, SampleResult
from pyruntime.ops.step import SequenceSlice
from pyruntime.plan.gpu import GpuRunner


def one_row_each(slices: Sequence[SequenceSlice]) -> bool:
    """Whether the step computes one row of every sequence, and its logits are wanted: what a captured graph can run."""
    return bool(slices) and all(len(each.token_ids) == len(each.wanted) == 1 for each in slices)


def decode(
    gpu: GpuRunner,
    cache: KvCache,
    slices: Sequence[SequenceSlice],
    configs: Sequence[SampleConfig],
    prompt_token_ids: Sequence[Sequence[int]],
    output_token_ids: Sequence[Sequence[int]],
) -> list[SampleResult]:
    """The next token of every sequence. PyTorch samples where a row asks for what the device's sampler does not do."""
    steps = [len(each) for each in output_token_ids]
    sampler = gpu.sampler
    if sampler is None or not all(sampler.serves(config) for config in configs):
        gpu.decode(slices, [GREEDY] * len(slices), cache)
        logits = gpu.decoded_logits(len(slices))
        return sample.reference(logits, configs, prompt_token_ids, output_token_ids, steps)
    sampling = [RowSampling.of(config, step) for config, step in zip(configs, steps, strict=True)]
    tokens = gpu.decode(slices, sampling, cache).tolist()
    results = [sampler.result(token) for token in tokens]
    # an erroneous row fed nothing back
    if all(result.error is None for result in results):
        gpu.fed_back(tokens)
    return results
