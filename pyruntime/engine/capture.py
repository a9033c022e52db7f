"""Getting target cuda ready: how much memory each part takes, and a graph for every batch size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

import torch

from pyruntime.errors import RunError
from pyruntime.ops.cache import KvCache
from pyruntime.ops.gpu.batch import GREEDY, BatchSizes
from pyruntime.ops.step import SequenceSlice, make_step
from pyruntime.plan import Plan

# kernels that are loaded later, what graphs hold themselves, and logits of prompts that are scored
_MARGIN_BYTES: Final = 1 << 30
# beyond this, graphs for every eighth size are enough
_SMALL_BATCHES: Final = (1, 2, 4)
_STRIDE: Final = 8
# longer sequences of a step launch what these do
_LENGTHS: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
# wanted rows that are too many for one tile of a product
_SCORED: Final = 17


@dataclass(frozen=True, slots=True)
class MemoryBudget:
    """Bytes of one GPU: all of it, the share that may be used, and what takes it."""

    total: int
    allowed: int
    weights: int
    buffers: int
    kv_cache: int
    reserved: int

    def with_cache(self, num_bytes: int) -> MemoryBudget:
        """The same with a cache of `num_bytes`; a small model does not need all that is left."""
        return replace(self, kv_cache=num_bytes)

    def __str__(self) -> str:
        """One line in GiB."""
        parts = {"weights": self.weights, "KV cache": self.kv_cache, "buffers": self.buffers, "reserve": self.reserved}
        said = ", ".join(f"{name} {num_bytes / 2**30:.2f}" for name, num_bytes in parts.items())
        return f"GPU memory in GiB: {self.allowed / 2**30:.2f} of {self.total / 2**30:.2f} may be used: {said}"


def batch_sizes(max_num_seqs: int) -> tuple[int, ...]:
    """Batch sizes that graphs are captured for: 1, 2, 4, then every multiple of 8, and the largest itself."""
    sizes = {*_SMALL_BATCHES, *range(_STRIDE, max_num_seqs, _STRIDE), max_num_seqs}
    return tuple(sorted(size for size in sizes if size <= max_num_seqs))


def memory_budget(plan: Plan, sizes: BatchSizes, page_size: int, utilization: float) -> MemoryBudget:
    """What each part takes of a plan whose largest step is `sizes`, found by running it; the cache gets what is left.

    Raises RunError MEMORY where the steps alone do not fit the share of the memory that may be used.
    """
    gpu, device = plan.gpu, plan.device
    assert gpu is not None
    total = torch.cuda.mem_get_info(device)[1]
    allowed = int(total * utilization)
    cache = _largest_steps(plan, sizes, page_size)
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    used = total - torch.cuda.mem_get_info(device)[0] - cache.num_bytes + gpu.table_bytes
    left = allowed - used - _MARGIN_BYTES
    if left <= 0:
        raise RunError(
            "MEMORY",
            f"weights and one step of {sizes.max_rows} tokens take {(allowed - left) / 2**30:.2f} GiB; "
            f"{allowed / 2**30:.2f} of {total / 2**30:.2f} GiB may be used: lower max_num_batched_tokens or "
            "max_num_seqs, raise gpu_memory_utilization, or drop more",
        )
    weights = plan.weight_bytes
    return MemoryBudget(total, allowed, weights, used - weights, left, _MARGIN_BYTES)


def _largest_steps(plan: Plan, sizes: BatchSizes, page_size: int) -> KvCache:
    """Run a prefill and a decode step of all rows, so that kernels are loaded and memory has its size; their cache."""
    assert plan.gpu is not None
    length = min(sizes.max_rows, sizes.max_pages * page_size)
    lengths = [length] * (sizes.max_rows // length)
    num_pages = -(-length // page_size)
    # sequences may share pages: what they hold is not asked for
    cache = plan.new_cache(num_pages, page_size)
    plan.gpu.prepare(cache, sizes)
    slices = [SequenceSlice([0] * each, 0, range(num_pages), [each - 1]) for each in lengths[: sizes.max_sequences]]
    plan.run(make_step(slices, cache, plan.device))
    decoding = [SequenceSlice([0], 0, [0], [0])] * sizes.max_sequences
    plan.gpu.decode(decoding, [GREEDY] * sizes.max_sequences, cache)
    return cache


def warm_up(plan: Plan, max_num_seqs: int, progress: Callable[[int, int], None] | None = None) -> None:
    """Capture a graph for every batch size; `progress` is called with (graphs done, graphs in all)."""
    if plan.gpu is None or plan.gpu.why_not_captured is not None:
        return
    sizes, done = batch_sizes(max_num_seqs), 0

    def count(_: int) -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, len(sizes))

    plan.gpu.capture(sizes, count)


def warm_up_prefill(plan: Plan, sizes: BatchSizes, page_size: int) -> None:
    """Run steps of every kind that an engine of `sizes` may make, so that no kernel is compiled while it serves.

    Their cache is gone afterwards; whoever runs the plan next prepares its own.
    """
    if plan.gpu is None or plan.gpu.info.interpreted:
        return
    longest = min(sizes.max_rows, sizes.max_pages * page_size)
    # sequences may share pages: what they hold is not asked for
    pages = range(-(-longest // page_size))
    cache = plan.new_cache(len(pages), page_size)
    # tables are as wide as they will be: how tokens are split depends on it
    plan.gpu.prepare(cache, sizes)
    for lengths in prefill_steps(sizes, longest):
        # a few rows of which all are wanted are what a short scored prompt is
        wanted = range(min(lengths[0], _SCORED)) if len(lengths) == 1 else None
        slices = [SequenceSlice([0] * each, 0, pages, wanted or [each - 1]) for each in lengths]
        plan.run(make_step(slices, cache, plan.device))


def prefill_steps(sizes: BatchSizes, longest: int) -> list[tuple[int, ...]]:
    """Lengths of the sequences of each step, of up to `longest` rows: alone, and with as many others as fit.

    Kernels change where a length, times the heads that share a key, passes a power of two, and where a step has enough
    rows for all processors.
    """
    steps: list[tuple[int, ...]] = []
    for length in (*(each for each in _LENGTHS if each < longest), longest):
        count = min(sizes.max_sequences, sizes.max_rows // length)
        singles = min(sizes.max_sequences - count, sizes.max_rows - length * count)
        steps += [(length,), (length,) * count + (1,) * singles]
    return list(dict.fromkeys(steps))
