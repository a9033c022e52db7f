"""Scratch memory and counters that all nodes of a plan share, one after the other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import torch

from pyruntime.ops import memory

# what every kernel may assume of an address
_ALIGNMENT: Final = 256
_FIRST_BYTES: Final = 1 << 20
_FIRST_COUNTERS: Final = 4096


class Workspace:
    """An arena for one node at a time, on one stream. It grows while plans warm up; captured graphs keep what they use.

    Counters are zero between kernels: each kernel leaves them as it found them.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._arena = memory.alloc((_FIRST_BYTES,), torch.uint8, device)
        self._used = 0
        self._counters = torch.zeros(_FIRST_COUNTERS, dtype=torch.int32, device=device)
        # a captured graph still works in these
        self._outgrown: list[torch.Tensor] = []

    @property
    def num_bytes(self) -> int:
        """Bytes held, outgrown ones included."""
        return sum(each.numel() * each.element_size() for each in (self._arena, self._counters, *self._outgrown))

    def begin(self) -> None:
        """Start a node: what the one before it took is free."""
        self._used = 0

    def scratch(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Memory of `shape` with undefined values, apart from what this node took before."""
        num_bytes = math.prod(shape) * dtype.itemsize
        if self._used + num_bytes > self._arena.numel():
            self._outgrown.append(self._arena)
            self._arena = memory.alloc((2 * (self._used + num_bytes),), torch.uint8, self._device)
            self._used = 0
        begin, self._used = self._used, self._used + -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
        return self._arena[begin : begin + num_bytes].view(dtype).view(tuple(shape))

    def counters(self, count: int) -> torch.Tensor:
        """The first `count` counters, int32 zeros."""
        if count > self._counters.numel():
            self._outgrown.append(self._counters)
            self._counters = torch.zeros(2 * count, dtype=torch.int32, device=self._device)
        return self._counters[:count]
