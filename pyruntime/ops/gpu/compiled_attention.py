"""K2 in CUDA C++: decode attention, its tiles dealt evenly to all processors."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor

from pyruntime.ops.attention import AttentionAttrs
from pyruntime.ops.gpu.frame import Frame
from pyruntime.spec import Attention, Cached

_HEAD_DIMS: Final = (64, 96, 128, 256)
_PAGE_MULTIPLE: Final = 16
# tiles that a block has at least, where there are so few: to add a part up takes about as long as to stream one
LEAST_TILES: Final = 2
# shared memory of a processor, which holds what is on its way to its blocks; each block takes 1 KiB beside its own
_SHARED_BYTES: Final = {80: 164 << 10, 87: 164 << 10, 90: 228 << 10, 100: 228 << 10, 103: 228 << 10}
_LEAST_SHARED_BYTES: Final = 100 << 10
_BLOCK_EXTRA: Final = 1 << 10


def refused(attention: Attention, dtype: torch.dtype, page_size: int) -> str | None:
    """Why the CUDA kernel cannot run it, or None."""
    if dtype not in (torch.bfloat16, torch.float16):
        return f"{str(dtype).removeprefix('torch.')}, not bfloat16 or float16"
    if attention.cached is not Cached.KEYS_VALUES or attention.alibi or attention.shaped:
        return "slim, ALiBi or shaped attention"
    if attention.head_dim not in _HEAD_DIMS:
        return f"head_dim {attention.head_dim}, not one of {', '.join(map(str, _HEAD_DIMS))}"
    if page_size % _PAGE_MULTIPLE:
        return f"pages of {page_size} positions, not a multiple of {_PAGE_MULTIPLE}"
    return None


def num_blocks(compiled: Any, attention: Attention, capability: int, num_sms: int, most_tiles: int) -> int:
    """As many blocks as run at once, or as there can be tiles."""
    shared: int = compiled.attention_shared_bytes(
        num_heads=attention.num_heads, num_kv_heads=attention.num_kv_heads, head_dim=attention.head_dim
    )
    per_sm = _SHARED_BYTES.get(capability, _LEAST_SHARED_BYTES) // (shared + _BLOCK_EXTRA)
    return min(num_sms * max(per_sm, 1), most_tiles)


def attend(compiled: Any, attrs: AttentionAttrs, frame: Frame, following: Tensor | None = None) -> None:
    """Launch decode attention of `frame`, whose rows are one for each sequence, with the module `compiled`.

    `following` are weights that a later kernel reads first, brought into L2 on the way.
    """
    attention, view, (q,), (out,) = attrs.attention, frame.view, frame.inputs, frame.outputs
    keys, values = frame.cache.pools(attrs.slot)
    assert view.decode and q.stride(1) == out.stride(1) == 1 and keys.dtype is q.dtype is out.dtype, (
        q.dtype,
        keys.dtype,
    )
    heads = {"num_heads": attention.num_heads, "num_kv_heads": attention.num_kv_heads}
    items = view.num_rows * compiled.attention_items(**heads)
    tiles = -(-view.page_table.shape[1] * keys.shape[1] // compiled.attention_tile(attention.head_dim))
    blocks = num_blocks(compiled, attention, frame.info.capability, frame.info.num_sms, items * tiles)
    floats = compiled.attention_partials(blocks=blocks, head_dim=attention.head_dim, **heads)
    compiled.attention(
        q=q.data_ptr(),
        out=out.data_ptr(),
        keys=keys.data_ptr(),
        values=values.data_ptr(),
        contexts=view.contexts.data_ptr(),
        page_table=view.page_table.data_ptr(),
        partials=frame.scratch((floats,), torch.float32).data_ptr(),
        counters=frame.counters(items).data_ptr(),
        prefetch=0 if following is None else following.data_ptr(),
        prefetch_bytes=0 if following is None else following.numel() * following.element_size(),
        q_stride=q.stride(0),
        out_stride=out.stride(0),
        table_stride=view.page_table.stride(0),
        num_sequences=view.num_rows,
        head_dim=attention.head_dim,
        page_size=keys.shape[1],
        window=attention.window or 0,
        blocks=blocks,
        least_tiles=LEAST_TILES,
        scale=attention.scale,
        softcap=attention.softcap or 0.0,
        dtype=str(q.dtype).removeprefix("torch."),
        early=frame.info.has_dependent_launch,
        stream=torch.cuda.current_stream(q.device).cuda_stream if q.is_cuda else 0,
        **heads,
    )
