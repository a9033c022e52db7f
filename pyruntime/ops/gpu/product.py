"""Matrix products on a GPU, with the norm in front and what stands behind: linear, MLP and head are made of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from pyruntime.kernels.product import finish_kernel, product_kernel
from pyruntime.ops.gpu import compiled
from pyruntime.ops.gpu.choose import Backend
from pyruntime.ops.gpu.frame import Frame, GpuNode
from pyruntime.ops.gpu.norm import launch_norm
from pyruntime.spec import Activation, Norm, NormKind

# x, out, residual: [rows, width]
ProductLaunch = Callable[[Frame, Tensor, Tensor, Tensor | None], None]

# weights that a program reads in a step; three of them, and x, leave room for three programs on a processor
_STEP_BYTES: Final = 16384
_NUM_STAGES: Final = 3
# programs that share a processor; the place that is left is for the kernel behind
_PER_PROCESSOR: Final = 2
# what it costs a program to begin, in steps
_STEPS_TO_BEGIN: Final = 3
_MIN_STEPS: Final = 2
_MAX_SPLITS: Final = 16
_MAX_BLOCK_ROWS: Final = 64
# outputs of a row that one program of the kernel behind a wide product finishes
_FINISHED: Final = 1024


@dataclass(frozen=True, slots=True)
class Product:
    """softcap(activation(W norm(x) + b)), W [outputs, inputs] under `role` and b under `role`.bias.

    `gated`: W is [2 * outputs, inputs], and the second half's outputs multiply the first half's, activated. The norm's
    weights stand under `norm_role`. `activation` None: none.
    """

    role: str
    inputs: int
    outputs: int
    norm: Norm | None = None
    norm_role: str = "norm"
    activation: Activation | None = None
    gated: bool = False
    softcap: float | None = None


@dataclass(frozen=True, slots=True)
class Blocks:
    """What one program of product_kernel computes: `outputs` of `rows` over one of `splits` parts of all inputs."""

    outputs: int
    inputs: int
    rows: int
    splits: int
    num_warps: int


def product_on_gpu(product: Product, node: GpuNode) -> ProductLaunch:
    """The launches of a product for any number of rows; `out` may be the residual, not x."""

    def launch(frame: Frame, x: Tensor, out: Tensor, residual: Tensor | None) -> None:
        assert x.is_meta or x.data_ptr() != out.data_ptr(), f"{node.name}: a product's output lies on its input"
        match node.choices.at(x.shape[0]).backend:
            case Backend.VENDOR:
                _launch_wide(frame, product, node, x, out, residual)
            case Backend.CUDA:
                _launch_compiled(frame, product, node, x, out, residual)
            case Backend.TRITON:
                _launch_skinny(frame, product, node, x, out, residual)

    return launch


def blocks_of(num_outputs: int, num_inputs: int, num_rows: int, gated: bool, itemsize: int, num_sms: int) -> Blocks:
    """Blocks for a product whose weights have `itemsize` bytes.

    A step is 16 KiB of weights: 64 outputs, or 128 where they are many or the rows are. Splits are chosen so that all
    programs, in rounds of as many as fit, take the fewest steps; beginning and adding up count as steps too.
    """
    places, parts = _PER_PROCESSOR * num_sms, 2 if gated else 1
    if itemsize == 4:
        # multiplied without tensor cores, from registers
        block_rows, block_outputs, block_inputs, num_warps = 16, 64, 32, 8
    else:
        block_rows = min(max(16, 1 << (num_rows - 1).bit_length()), _MAX_BLOCK_ROWS)
        large = block_rows == _MAX_BLOCK_ROWS or (not gated and -(-num_outputs // 128) >= places)
        block_outputs, num_warps = 128 if large and not gated else 64, 8 if large else 4
        block_inputs = _STEP_BYTES // (parts * block_outputs * itemsize)
    tiles, steps = -(-num_outputs // block_outputs) * -(-num_rows // block_rows), -(-num_inputs // block_inputs)

    def cost(splits: int) -> float:
        rounds = -(-tiles * splits // places)
        added = splits * parts * block_outputs * block_rows * 4 / _STEP_BYTES if splits > 1 else 0.0
        return rounds * (-(-steps // splits) + _STEPS_TO_BEGIN) + added

    most = max(1, min(_MAX_SPLITS, steps // _MIN_STEPS))
    return Blocks(block_outputs, block_inputs, block_rows, min(range(1, most + 1), key=cost), num_warps)


def _is_deferred(norm: Norm | None, dtype: torch.dtype) -> bool:
    """Whether product_kernel can take the norm in. Without its scale, float16 could overflow."""
    plain = norm is not None and norm.kind in (NormKind.RMS, NormKind.RMS_ONE_PLUS) and not norm.bias
    return plain and dtype is not torch.float16


def _launch_skinny(
    frame: Frame, product: Product, node: GpuNode, x: Tensor, out: Tensor, residual: Tensor | None
) -> None:
    """One launch, or two where the norm stands alone."""
    weight, bias, gain = _weights_of(product, node)
    deferred = _is_deferred(product.norm, node.dtype)
    if product.norm is not None and not deferred:
        x = _normed(frame, product, node, x)
    num_rows, is_gain = x.shape[0], deferred and gain is not None
    blocks = blocks_of(
        product.outputs, product.inputs, num_rows, product.gated, node.dtype.itemsize, frame.info.num_sms
    )
    tiles, row_blocks = -(-product.outputs // blocks.outputs), -(-num_rows // blocks.rows)
    parts = tiles * row_blocks * blocks.splits
    size = (2 if product.gated else 1) * blocks.rows * blocks.outputs
    is_split = blocks.splits > 1
    frame.launch(
        product_kernel,
        (blocks.splits, tiles, row_blocks),
        x,
        gain if is_gain else x,
        weight,
        x if bias is None else bias,
        x if residual is None else residual,
        out,
        frame.scratch((parts * size,), torch.float32) if is_split else x,
        frame.scratch((parts * blocks.rows,), torch.float32) if is_split else x,
        frame.counters(tiles * row_blocks) if is_split else x,
        num_rows,
        product.inputs,
        product.outputs,
        x.stride(0),
        0 if residual is None else residual.stride(0),
        out.stride(0),
        0.0 if product.norm is None else product.norm.eps,
        product.softcap or 1.0,
        num_warps=blocks.num_warps,
        num_stages=_NUM_STAGES,
        HAS_NORM=deferred,
        HAS_GAIN=is_gain,
        **_constants(product, bias, residual),
        BLOCK_OUTPUTS=blocks.outputs,
        BLOCK_INPUTS=blocks.inputs,
        BLOCK_ROWS=blocks.rows,
        SPLITS=blocks.splits,
    )


def _launch_compiled(
    frame: Frame, product: Product, node: GpuNode, x: Tensor, out: Tensor, residual: Tensor | None
) -> None:
    """The same in CUDA C++."""
    weight, bias, gain = _weights_of(product, node)
    norm = product.norm if _is_deferred(product.norm, node.dtype) else None
    if product.norm is not None and norm is None:
        x = _normed(frame, product, node, x)
    compiled.product(
        frame,
        node.compiled,
        x,
        weight,
        out,
        gain=None if norm is None else gain,
        eps=None if norm is None else norm.eps,
        bias=bias,
        residual=residual,
        activation=product.activation,
        gated=product.gated,
        softcap=product.softcap,
    )


def _launch_wide(
    frame: Frame, product: Product, node: GpuNode, x: Tensor, out: Tensor, residual: Tensor | None
) -> None:
    """The norm, the vendor's product, and what follows it."""
    weight, bias, _ = _weights_of(product, node)
    if product.norm is not None:
        x = _normed(frame, product, node, x)
    elif x.dtype is not node.dtype:
        x = frame.scratch(x.shape, node.dtype).copy_(x)
    found = torch.mm(x, weight.t(), out=frame.scratch((x.shape[0], weight.shape[0]), node.dtype))
    frame.launch(
        finish_kernel,
        (x.shape[0], -(-product.outputs // _FINISHED)),
        found,
        x if bias is None else bias,
        x if residual is None else residual,
        out,
        product.outputs,
        found.stride(0),
        0 if residual is None else residual.stride(0),
        out.stride(0),
        product.softcap or 1.0,
        num_warps=4,
        num_stages=1,
        **_constants(product, bias, residual),
        BLOCK=_FINISHED,
    )


def _constants(product: Product, bias: Tensor | None, residual: Tensor | None) -> dict[str, Any]:
    """What both kernels do with the sums."""
    return {
        "HAS_BIAS": bias is not None,
        "ACTIVATION": str(product.activation or "none"),
        "GATED": product.gated,
        "HAS_SOFTCAP": product.softcap is not None,
        "HAS_RESIDUAL": residual is not None,
    }


def _weights_of(product: Product, node: GpuNode) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Matrix, bias, and the norm's gain."""
    weights = node.weights
    return weights[product.role], weights.get(f"{product.role}.bias"), weights.get(f"{product.norm_role}.gain")


def _normed(frame: Frame, product: Product, node: GpuNode, x: Tensor) -> Tensor:
    assert product.norm is not None
    out = frame.scratch(x.shape, node.dtype)
    launch_norm(frame, product.norm, node.weights, product.norm_role, x, out)
    return out
