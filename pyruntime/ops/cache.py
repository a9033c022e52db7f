"""The paged KV cache: one pool of pages per kept attention, one block table per sequence shared by all of them."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

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


class KvLayout(StrEnum):
    """What is contiguous in a page: dimensions of keys come first for the CPU, whole tokens for the GPU."""

    # keys [num_pages, num_kv_heads, head_dim, page_size], so that a score reads neighbouring tokens side by side;
    # values [num_pages, num_kv_heads, page_size, head_dim]
    HEADS = "heads"
    # keys and values [num_pages, page_size, num_kv_heads, head_dim]
    TOKENS = "tokens"


class KvCache:
    """Keys and values of every kept attention, in pages of `page_size` tokens, as `layout` says.

    A dropped attention has no slot here, so it owns no byte. Slim attention has no values, and its keys are not rotated
    or are the attention's inputs, as of one head.
    """

    def __init__(
        self,
        shapes: tuple[KvShape, ...],
        num_pages: int,
        page_size: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        layout: KvLayout = KvLayout.HEADS,
    ) -> None:
        self.shapes = shapes
        self.dtype = dtype
        self.device = torch.device(device)
        self.num_pages = num_pages
        self.page_size = page_size
        self.layout = layout
        self._keys = tuple(alloc(self._pool_shape(s, keys=True), dtype, device) for s in shapes)
        self._values = tuple(alloc(self._pool_shape(s, keys=False), dtype, device) for s in shapes)

    def _pool_shape(self, shape: KvShape, *, keys: bool) -> tuple[int, ...]:
        num_pages = self.num_pages if keys or shape.values else 0
        if self.layout is KvLayout.TOKENS:
            return (num_pages, self.page_size, shape.num_kv_heads, shape.head_dim)
        inner = (shape.head_dim, self.page_size) if keys else (self.page_size, shape.head_dim)
        return (num_pages, shape.num_kv_heads, *inner)

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

    def pools(self, slot: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a slot, every page; without values the second has no page."""
        return self._keys[slot], self._values[slot]

    def clear(self) -> None:
        """Fill everything with zeros, for measurements over a context that nobody computed."""
        for pool in (*self._keys, *self._values):
            pool.zero_()

    def write(self, slot: int, places: torch.Tensor, keys: torch.Tensor, values: torch.Tensor | None) -> None:
        """Store `keys` and `values` [rows, num_kv_heads, head_dim] at `places` [rows] (page * page_size + offset)."""
        assert (values is not None) == self.shapes[slot].values
        page, offset = places // self.page_size, places % self.page_size
        keys = keys.to(self._keys[slot].dtype)
        if self.layout is KvLayout.TOKENS:
            self._keys[slot][page, offset] = keys
        else:
            self._keys[slot][page, :, :, offset] = keys
        if values is not None:
            values = values.to(self._values[slot].dtype)
            if self.layout is KvLayout.TOKENS:
                self._values[slot][page, offset] = values
            else:
                self._values[slot][page, :, offset] = values

    def read(self, slot: int, pages: torch.Tensor, length: int) -> tuple[torch.Tensor, ...]:
        """The first `length` keys of the sequence on `pages` [length, num_kv_heads, head_dim], then values if any."""
        kept = pages[: -(-length // self.page_size)]
        tokens = self.layout is KvLayout.TOKENS
        keys = self._keys[slot][kept]
        keys = (keys if tokens else keys.permute(0, 3, 1, 2)).flatten(0, 1)[:length]
        if not self.shapes[slot].values:
            return (keys,)
        values = self._values[slot][kept]
        return keys, (values if tokens else values.permute(0, 2, 1, 3)).flatten(0, 1)[:length]
