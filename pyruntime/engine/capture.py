"""Getting target cuda ready: how much memory each part takes, and a graph for every batch size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch

from pyruntime.errors import RunError
from pyruntime.ops.gpu.batch import BatchSizes
from pyruntime.ops.step import SequenceSlice, make_step
from pyruntime.plan import Plan

# kernels that are loaded later, and what graphs hold themselves
_MARGIN_BYTES: Final = 512 << 20
# beyond this, graphs for every eighth size are enough
_SMALL_BATCHES: Final = (1, 2, 4)
_STRIDE: Final = 8


@dataclass(frozen=True, slots=True)
class MemoryBudget:
    """Bytes of one GPU: all of it, the share that may be used, and what takes it."""

    total: int
    allowed: int
    weights: int
    buffers: int
    kv_cache: int
    reserved: int

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
    """What each part takes of a plan whose largest step is `sizes`, found by running one; the cache gets what is left.

    Raises RunError MEMORY where the step alone does not fit the share of the memory that may be used.
    """
    device = plan.device
    total = torch.cuda.mem_get_info(device)[1]
    allowed = int(total * utilization)
    _largest_prefill(plan, sizes, page_size)
    torch.cuda.empty_cache()
    used = total - torch.cuda.mem_get_info(device)[0]
    assert plan.gpu is not None
    left = allowed - used - plan.gpu.buffer_bytes(sizes) - _MARGIN_BYTES
    if left <= 0:
        raise RunError(
            "MEMORY",
            f"weights and one step of {sizes.max_rows} tokens take {(allowed - left) / 2**30:.2f} GiB; "
            f"{allowed / 2**30:.2f} of {total / 2**30:.2f} GiB may be used: lower max_num_batched_tokens or "
            "max_num_seqs, raise gpu_memory_utilization, or drop more",
        )
    weights = plan.weight_bytes
    return MemoryBudget(total, allowed, weights, used - weights + plan.gpu.buffer_bytes(sizes), left, _MARGIN_BYTES)


def _largest_prefill(plan: Plan, sizes: BatchSizes, page_size: int) -> None:
    """One step of as many tokens as fit, so that kernels are loaded and scratch memory has its size."""
    pages = range(min(sizes.max_pages, -(-sizes.max_rows // page_size)))
    length = min(sizes.max_rows, len(pages) * page_size)
    cache = plan.new_cache(len(pages), page_size)
    assert plan.gpu is not None
    plan.run(make_step([SequenceSlice([0] * length, 0, pages, [length - 1])], cache, plan.device))
    plan.gpu.release()


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
