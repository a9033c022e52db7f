"""The one place where buffers come from, so that a test can poison fresh memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def alloc(shape: Sequence[int], dtype: torch.dtype, device: torch.device | str = "cpu") -> torch.Tensor:
    """A tensor with undefined values. Raises nothing of its own; the machine may be out of memory."""
    return torch.empty(tuple(shape), dtype=dtype, device=device)
