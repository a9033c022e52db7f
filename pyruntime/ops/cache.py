"""The paged KV cache: one pool of pages per kept attention, one block table per sequence shared by all of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pyruntime.ops.memory import alloc


@dataclass(frozen=True, slots=True)
class KvShape:
    """Sizes of one attention's keys, and of its values, for one token."""

    num_kv_heads: int
    head_dim: int


class KvCache:
    """Keys and values of every kept attention, [num_pages, page_size, num_kv_heads, head_dim] each.

    A dropped attention has no slot here, so it owns no byte.
    """

    def __init__(
        self,
        shapes: tuple[KvShape, ...],
        num_pages: int,
        page_size: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        self.num_pages = num_pages
        self.page_size = page_size
        self._pools = tuple(
            alloc((2, num_pages * page_size, shape.num_kv_heads, shape.head_dim), dtype, device) for shape in shapes
        )

    @property
    def num_slots(self) -> int:
        """Number of attentions that own a pool."""
        return len(self._pools)

    @property
    def num_bytes(self) -> int:
        """Bytes of all pools."""
        return sum(pool.numel() * pool.element_size() for pool in self._pools)

    def clear(self) -> None:
        """Fill everything with zeros, for measurements over a context that nobody computed."""
        for pool in self._pools:
            pool.zero_()

    def write(self, slot: int, places: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Store `keys` and `values` [rows, num_kv_heads, head_dim] at `places` [rows] (page * page_size + offset)."""
        pool = self._pools[slot]
        pool[0].index_copy_(0, places, keys.to(pool.dtype))
        pool[1].index_copy_(0, places, values.to(pool.dtype))

    def read(self, slot: int, pages: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The first `length` keys and values of the sequence on `pages`, [length, num_kv_heads, head_dim] each."""
        pool = self._pools[slot].unflatten(1, (self.num_pages, self.page_size))
        kept = pages[: -(-length // self.page_size)]
        found = pool[:, kept].flatten(1, 2)[:, :length]
        return found[0], found[1]
