"""The one place where buffers come from, so that a test can poison fresh memory."""

from __future__ import annotations

import contextlib
import math
import mmap
from collections.abc import Sequence
from typing import Final

import torch

# below this a page of the ordinary size is as good
_HUGE_BYTES: Final = 1 << 21


def alloc(shape: Sequence[int], dtype: torch.dtype, device: torch.device | str = "cpu") -> torch.Tensor:
    """A tensor with undefined values. Raises nothing of its own; the machine may be out of memory."""
    return torch.empty(tuple(shape), dtype=dtype, device=device)


def alloc_weights(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Memory on the CPU for weights that are read from end to end, in huge pages where the kernel gives them."""
    num_bytes = math.prod(shape) * dtype.itemsize
    if num_bytes < _HUGE_BYTES:
        return torch.empty(tuple(shape), dtype=dtype, device="cpu")
    region = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    # a kernel without huge pages refuses: ordinary ones hold the same
    with contextlib.suppress(OSError):
        region.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(region, dtype=dtype).view(tuple(shape))
