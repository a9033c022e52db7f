"""The paged KV cache: one pool of pages per kept attention, one block table per sequence shared by all of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pyruntime.ops.memory import alloc


@dataclass(frozen=True, slots=True)
class KvShape:
    """Sizes of what one token leaves in one attention's cache: keys, and as many `values` or none."""

    num_kv_heads: int
    head_dim: int
    values: bool = True

    @property
    def num_values(self) -> int:
        """Numbers that one token leaves."""
        return (2 if self.values else 1) * self.num_kv_heads * self.head_dim


class KvCache:
    """Keys and values of every kept attention, in pages of `page_size` tokens.

    Keys are [num_pages, num_kv_heads, head_dim, page_size], so that a score reads neighbouring tokens side by side;
    values are [num_pages, num_kv_heads, page_size, head_dim]. A dropped attention has no slot here, so it owns no byte.
    Slim attention has no values, and its keys are not rotated or are the attention's inputs, as of one head.
    """

    def __init__(
        self,
        shapes: tuple[KvShape, ...],
        num_pages: int,
        page_size: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        self.shapes = shapes
        self.dtype = dtype
        self.device = torch.device(device)
        self.num_pages = num_pages
        self.page_size = page_size
        self._keys = tuple(alloc((num_pages, s.num_kv_heads, s.head_dim, page_size), dtype, device) for s in shapes)
        self._values = tuple(
            alloc((num_pages if s.values else 0, s.num_kv_heads, page_size, s.head_dim), dtype, device) for s in shapes
        )

    @property
    def num_slots(self) -> int:
        """Number of attentions that own a pool."""
        return len(self._keys)

    @property
    def num_bytes(self) -> int:
        """Bytes of all pools."""
        return sum(pool.numel() * pool.element_size() for pool in (*self._keys, *self._values))

    @property
    def addresses(self) -> list[tuple[int, int]]:
        """Where the keys and the values of each slot lie."""
        return [(k.data_ptr(), v.data_ptr()) for k, v in zip(self._keys, self._values, strict=True)]

    def clear(self) -> None:
        """Fill everything with zeros, for measurements over a context that nobody computed."""
        for pool in (*self._keys, *self._values):
            pool.zero_()

    def write(self, slot: int, places: torch.Tensor, keys: torch.Tensor, values: torch.Tensor | None) -> None:
        """Store `keys` and `values` [rows, num_kv_heads, head_dim] at `places` [rows] (page * page_size + offset)."""
        assert (values is not None) == self.shapes[slot].values
        page, offset = places // self.page_size, places % self.page_size
        self._keys[slot][page, :, :, offset] = keys.to(self._keys[slot].dtype)
        if values is not None:
            self._values[slot][page, :, offset] = values.to(self._values[slot].dtype)

    def read(self, slot: int, pages: torch.Tensor, length: int) -> tuple[torch.Tensor, ...]:
        """The first `length` keys of the sequence on `pages` [length, num_kv_heads, head_dim], then values if any."""
        kept = pages[: -(-length // self.page_size)]
        keys = self._keys[slot][kept].permute(0, 3, 1, 2).flatten(0, 1)[:length]
        if not self.shapes[slot].values:
            return (keys,)
        return keys, self._values[slot][kept].permute(0, 2, 1, 3).flatten(0, 1)[:length]
