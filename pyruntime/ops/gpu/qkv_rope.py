"""K1 on a GPU: one fused launch for few rows, or norm, product, and what turns and stores its columns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
import triton
from torch import Tensor

from pyruntime.kernels import rope_append as bits
from pyruntime.kernels.qkv_rope import qkv_rope_kernel
from pyruntime.kernels.rope_append import rope_append_kernel
from pyruntime.ops.gpu import compiled
from pyruntime.ops.gpu.choose import Backend
from pyruntime.ops.gpu.device import refused_dtype
from pyruntime.ops.gpu.frame import Frame, GpuNode, Launch
from pyruntime.ops.gpu.norm import launch_norm
from pyruntime.ops.gpu.product import Blocks, Product, ProductLaunch, blocks_of, product_on_gpu
from pyruntime.ops.layout import Layout, norm_layouts, row_layouts
from pyruntime.ops.native_step import refused_cache
from pyruntime.ops.qkv_rope import QkvRopeAttrs
from pyruntime.spec import Linear, Norm, NormKind

ROLES: Final = ("q", "k", "v")
# values of a row that one program turns and stores, and per warp
_TILE: Final = 1024
_PER_WARP: Final = 256
_MAX_WARPS: Final = 16
# of the fused kernel: pairs of outputs that one program projects
_LANES: Final = 64
_NUM_STAGES: Final = 3


@dataclass(frozen=True, slots=True)
class Sources:
    """Where the values of each role come from: the column of its first, or the place of its number in `columns`."""

    begins: dict[str, int]
    columns: Tensor | None
    reads_input: bool


def layouts(attrs: QkvRopeAttrs) -> dict[str, Layout]:
    """Norms, and one matrix of all projections."""
    linears, rows = _matrix(attrs)
    found = norm_layouts("norm", attrs.norm) | row_layouts("matrix", linears, rows=rows)
    for role in attrs.roles():
        found |= norm_layouts(f"{role}_norm", attrs.norm_of(role))
    return found


def refuses(attrs: QkvRopeAttrs, dtype: torch.dtype) -> str | None:
    """Why the kernels cannot run it, or None."""
    return refused_dtype(attrs, dtype) or refused_cache(attrs.attention)


def on_gpu(attrs: QkvRopeAttrs, node: GpuNode) -> Launch:
    """One launch for few rows, or those of the norm, the product, and the append."""
    in_parts = _in_parts(attrs, node)
    is_fused = fuses(attrs, node.dtype)

    def launch(frame: Frame) -> None:
        backend = node.choices.at(frame.view.num_rows).backend
        if not is_fused or backend is Backend.VENDOR:
            in_parts(frame)
        elif backend is Backend.CUDA:
            _launch_compiled(frame, attrs, node)
        else:
            _launch_fused(frame, attrs, node)

    return launch


def _launch_compiled(frame: Frame, attrs: QkvRopeAttrs, node: GpuNode) -> None:
    """The same in CUDA C++, where nothing was merged away and heads have no norms."""
    weights, norm = node.weights, attrs.norm
    compiled.qkv(
        frame,
        node.compiled,
        frame.inputs[0],
        weights["matrix"],
        attrs.attention,
        attrs.slot,
        query=attrs.query,
        cache=attrs.cache,
        gain=weights.get("norm.gain"),
        eps=None if norm is None else norm.eps,
        bias=weights.get("matrix.bias"),
    )


def fuses(attrs: QkvRopeAttrs, dtype: torch.dtype) -> bool:
    """Whether qkv_rope_kernel can run it: columns are whole projections, norms are RMSNorm, of each head alone.

    The norm in front is deferred; without its scale, float16 could overflow.
    """
    attention = attrs.attention
    if attention.table or attention.columns is not None:
        return False
    if not _is_plain(attrs.norm) or (attrs.norm is not None and dtype is torch.float16):
        return False
    norms = [norm for role in attrs.roles() if (norm := attrs.norm_of(role)) is not None]
    fits = not norms or _pairs(attention.head_dim) <= _LANES
    return fits and all(_is_plain(norm) and norm.size == attention.head_dim for norm in norms)


def _is_plain(norm: Norm | None) -> bool:
    return norm is None or (norm.kind in (NormKind.RMS, NormKind.RMS_ONE_PLUS) and not norm.bias)


def _launch_fused(frame: Frame, attrs: QkvRopeAttrs, node: GpuNode) -> None:
    attention, (x,), weights = attrs.attention, frame.inputs, node.weights
    num_rows, inputs = x.shape
    projected, merged = _projected_heads(attrs), _merged_heads(attrs)
    pairs = _pairs(attention.head_dim)
    num_lanes = sum(projected.values()) * pairs
    # a lane is two outputs, as a gated one is
    blocks = blocks_of(max(num_lanes, 1), inputs, num_rows, True, node.dtype.itemsize, frame.info.num_sms)
    assert blocks.outputs == _LANES
    tiles, row_blocks = -(-num_lanes // _LANES), -(-num_rows // blocks.rows)
    merged_tile = _tile(max(merged.values()), _dims(attrs), False)
    merged_tiles = sum(-(-count // merged_tile) for count in merged.values())
    gain, bias = weights.get("norm.gain"), weights.get("matrix.bias")
    frame.launch(
        qkv_rope_kernel,
        (tiles * blocks.splits + merged_tiles * min(num_rows, blocks.rows), row_blocks),
        x,
        x if gain is None else gain,
        weights.get("matrix", x),
        x if bias is None else bias,
        *_places(frame, attrs),
        *(weights.get(f"{role}_norm.gain", x) for role in ROLES),
        *_destinations(frame, attrs),
        *(_partials(frame, blocks, tiles * row_blocks) if blocks.splits > 1 and tiles else (x, x, x)),
        num_rows,
        inputs,
        x.stride(0),
        *_strides(frame, attrs),
        _eps(attrs.norm),
        *(_eps(attrs.norm_of(role)) for role in ROLES),
        num_warps=blocks.num_warps,
        num_stages=_NUM_STAGES,
        HAS_PRE_NORM=attrs.norm is not None,
        HAS_PRE_GAIN=gain is not None,
        HAS_BIAS=bias is not None,
        **{f"{role.upper()}_PROJECTED": count for role, count in projected.items()},
        **{f"{role.upper()}_MERGED": count for role, count in merged.items()},
        **_constants(frame, attrs, node),
        PAIRS=pairs,
        BLOCK_LANES=_LANES,
        BLOCK_INPUTS=blocks.inputs,
        BLOCK_ROWS=blocks.rows,
        SPLITS=blocks.splits,
        MERGED_TILE=merged_tile,
    )


def _partials(frame: Frame, blocks: Blocks, tiles: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sums of the parts of each tile, sums of squares of their inputs, and how many parts are there."""
    parts = tiles * blocks.splits
    sums = frame.scratch((parts * 2 * _LANES * blocks.rows,), torch.float32)
    return sums, frame.scratch((parts * blocks.rows,), torch.float32), frame.counters(tiles)


def _projected_heads(attrs: QkvRopeAttrs) -> dict[str, int]:
    """Heads of each role that have weights."""
    linears = attrs.linears()
    return {role: _num_heads(attrs, role) if linears.get(role) is not None else 0 for role in ROLES}


def _merged_heads(attrs: QkvRopeAttrs) -> dict[str, int]:
    """Heads of each role that are computed without weights."""
    return {role: _num_heads(attrs, role) - count for role, count in _projected_heads(attrs).items()}


def _pairs(head_dim: int) -> int:
    """Lanes of a head in the fused kernel, of two values each."""
    return int(triton.next_power_of_2(-(-head_dim // 2)))


def _in_parts(attrs: QkvRopeAttrs, node: GpuNode) -> Launch:
    """For any rows: the normed input, the product, and one kernel that turns and stores columns of both."""
    sources = _sources(attrs, node)
    norm, weight = attrs.norm, node.weights.get("matrix")
    # a norm that only the product reads may go into it
    alone = norm is not None and (sources.reads_input or weight is None)
    product: ProductLaunch | None = None
    if weight is not None:
        outputs, inputs = weight.shape
        product = product_on_gpu(Product("matrix", inputs, outputs, None if alone else norm), node)

    def launch(frame: Frame) -> None:
        x, (rows, _) = frame.inputs[0], frame.inputs[0].shape
        wide = node.choices.at(rows).backend is Backend.VENDOR
        if norm is not None and (alone or wide):
            out = frame.scratch(x.shape, torch.float32 if weight is None else node.dtype)
            launch_norm(frame, norm, node.weights, "norm", x, out)
            x = out
        made = None
        if weight is not None and wide:
            narrow = x if x.dtype is node.dtype else frame.scratch(x.shape, node.dtype).copy_(x)
            made = torch.mm(narrow, weight.t(), out=frame.scratch((rows, weight.shape[0]), node.dtype))
        elif product is not None and weight is not None:
            made = frame.scratch((rows, weight.shape[0]), torch.float32)
            product(frame, x, made, None)
        # products of few rows have added it
        bias = node.weights.get("matrix.bias") if wide else None
        _append(frame, attrs, node, sources, x, made, bias)

    return launch


def _append(
    frame: Frame,
    attrs: QkvRopeAttrs,
    node: GpuNode,
    sources: Sources,
    x: Tensor,
    product: Tensor | None,
    bias: Tensor | None,
) -> None:
    """Turn and store columns of the normed `x` and of the `product`."""
    dims = _dims(attrs)
    q_heads, kv_heads = _num_heads(attrs, "q"), _num_heads(attrs, "k")
    over_heads = {role: _is_over_heads(attrs, role) for role in ROLES}
    q_tile = _tile(q_heads, dims, over_heads["q"])
    kv_tile = _tile(kv_heads, dims, over_heads["k"] or over_heads["v"])
    frame.launch(
        rope_append_kernel,
        (x.shape[0], -(-q_heads // q_tile) + 2 * -(-kv_heads // kv_tile)),
        x,
        x if product is None else product,
        x if bias is None else bias,
        x if sources.columns is None else sources.columns,
        *_places(frame, attrs),
        *(node.weights.get(f"{role}_norm.{part}", x) for role in ROLES for part in ("gain", "bias")),
        *_destinations(frame, attrs),
        attrs.in_size,
        *(sources.begins.get(role, 0) for role in ROLES),
        x.stride(0),
        0 if product is None else product.stride(0),
        *_strides(frame, attrs),
        *(_eps(attrs.norm_of(role)) for role in ROLES),
        num_warps=min(max(max(q_tile, kv_tile) * dims // _PER_WARP, 1), _MAX_WARPS),
        num_stages=1,
        **_constants(frame, attrs, node),
        Q_HEADS=q_heads,
        HAS_INPUT=sources.reads_input,
        HAS_PRODUCT=product is not None,
        HAS_BIAS=bias is not None,
        HAS_COLUMNS=sources.columns is not None,
        Q_TILE=q_tile,
        KV_TILE=kv_tile,
    )


def _places(frame: Frame, attrs: QkvRopeAttrs) -> tuple[Tensor, ...]:
    """Where each row stands, and its angles; what stands in for absent ones is not read."""
    view, rope = frame.view, attrs.attention.rope
    cos, sin = (view.positions, view.positions) if rope is None else frame.rotary(rope)
    return view.positions, view.sequences, view.page_table, cos, sin


def _destinations(frame: Frame, attrs: QkvRopeAttrs) -> tuple[Tensor, ...]:
    """Queries, keys and values; what stands in for queries that are not computed is not written as such."""
    keys, values = frame.cache.pools(attrs.slot)
    assert keys.is_contiguous() and values.is_contiguous() and keys.shape[1] == frame.cache.page_size
    return frame.outputs[0] if attrs.query else keys, keys, values


def _strides(frame: Frame, attrs: QkvRopeAttrs) -> tuple[int, int]:
    """Of the page table and of the queries."""
    return frame.view.page_table.stride(0), frame.outputs[0].stride(0) if attrs.query else 0


def _constants(frame: Frame, attrs: QkvRopeAttrs, node: GpuNode) -> dict[str, int]:
    """What both kernels know of an attention."""
    attention = attrs.attention
    return {
        **{f"{role.upper()}_NORM": _norm_bits(attrs, role, node) for role in ROLES},
        "KV_HEADS": _num_heads(attrs, "k"),
        "HEAD_DIM": attention.head_dim,
        "HALF": 0 if attention.rope is None else attention.rope.dim // 2,
        "PAGE_SIZE": frame.cache.page_size,
        "DIMS": _dims(attrs),
    }


def _norm_bits(attrs: QkvRopeAttrs, role: str, node: GpuNode) -> int:
    """What the kernels do with a role's heads."""
    norm = attrs.norm_of(role)
    if norm is None or role not in attrs.roles():
        return 0
    is_set = {
        bits.NORMED: True,
        bits.OVER_HEADS: _is_over_heads(attrs, role),
        bits.CENTERED: norm.kind in (NormKind.LAYER, NormKind.LAYER_ONE_PLUS),
        bits.HAS_GAIN: f"{role}_norm.gain" in node.weights,
        bits.HAS_SHIFT: f"{role}_norm.bias" in node.weights,
    }
    return sum(int(bit.value) for bit, present in is_set.items() if present)


def _is_over_heads(attrs: QkvRopeAttrs, role: str) -> bool:
    norm = attrs.norm_of(role)
    return norm is not None and norm.size != attrs.attention.head_dim


def _num_heads(attrs: QkvRopeAttrs, role: str) -> int:
    """Heads of a role that are computed."""
    if role not in attrs.roles():
        return 0
    return attrs.attention.num_heads if role == "q" else attrs.attention.num_kv_heads


def _dims(attrs: QkvRopeAttrs) -> int:
    return int(triton.next_power_of_2(attrs.attention.head_dim))


def _tile(heads: int, dims: int, over_heads: bool) -> int:
    whole = int(triton.next_power_of_2(max(heads, 1)))
    return whole if over_heads else min(max(_TILE // dims, 1), whole)


def _eps(norm: Norm | None) -> float:
    return 0.0 if norm is None else norm.eps


def _matrix(attrs: QkvRopeAttrs) -> tuple[dict[str, Linear | None], tuple[int, ...] | None]:
    """The linear maps of the one matrix, and which of its rows are kept."""
    rest, rows = attrs.attention.rest, attrs.rest_rows()
    if rest is None or not rows:
        return attrs.linears(), None
    return {"rest": rest}, None if len(rows) == rest.out_features else rows


def _sources(attrs: QkvRopeAttrs, node: GpuNode) -> Sources:
    columns = {role: list(numbers) for role, numbers in attrs.columns().items()}
    size = attrs.in_size
    reads_input = any(number < size for numbers in columns.values() for number in numbers)
    firsts = {role: numbers[0] for role, numbers in columns.items()}
    if all(numbers == list(range(firsts[role], firsts[role] + len(numbers))) for role, numbers in columns.items()):
        return Sources(firsts, None, reads_input)
    begins: dict[str, int] = {}
    joined: list[int] = []
    for role, numbers in columns.items():
        begins[role] = len(joined)
        joined += numbers
    return Sources(begins, torch.tensor(joined, dtype=torch.int32, device=node.device), reads_input)
