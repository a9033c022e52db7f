"""RMSNorm and LayerNorm on a GPU, alone or in front of a product that cannot take them in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from torch import Tensor

from pyruntime.kernels.norm import norm_kernel
from pyruntime.ops.gpu.device import refused_dtype as refuses
from pyruntime.ops.gpu.frame import Frame, GpuNode, Launch
from pyruntime.ops.layout import Layout
from pyruntime.ops.norm import NormAttrs
from pyruntime.ops.norm import layouts as norm_layouts
from pyruntime.spec import Norm, NormKind

__all__ = ["launch_norm", "layouts", "on_gpu", "refuses"]


# values that one program holds at a time, and per warp: 16 a thread
_MAX_BLOCK: Final = 8192
_PER_WARP: Final = 512
_MAX_WARPS: Final = 16


def layouts(attrs: NormAttrs) -> dict[str, Layout]:
    """Gain and bias."""
    return norm_layouts(attrs)


def on_gpu(attrs: NormAttrs, node: GpuNode) -> Launch:
    """One launch for any number of rows."""

    def launch(frame: Frame) -> None:
        residual = frame.inputs[1] if attrs.residual else None
        launch_norm(frame, attrs.norm, node.weights, "norm", frame.inputs[0], frame.outputs[0], residual)

    return launch


def launch_norm(
    frame: Frame,
    norm: Norm,
    weights: Mapping[str, Tensor],
    role: str,
    x: Tensor,
    out: Tensor,
    residual: Tensor | None = None,
) -> None:
    """out = norm(x), or residual + norm(x), all [rows, norm.size] with contiguous rows; one program per row.

    `x` and `out` are of any dtype; `out` may be `x` or `residual`. Gain and bias are `role`.gain and `role`.bias.
    """
    assert x.shape == out.shape and x.shape[1] == norm.size, (x.shape, out.shape, norm.size)
    assert all(each.stride(1) == 1 for each in (x, out, residual) if each is not None and norm.size > 1)
    gain, bias = weights.get(f"{role}.gain"), weights.get(f"{role}.bias")
    block = min(_power_of_two(norm.size), _MAX_BLOCK)
    # pointers that stand in for what is absent are never read
    frame.launch(
        norm_kernel,
        (x.shape[0],),
        x,
        x if gain is None else gain,
        x if bias is None else bias,
        x if residual is None else residual,
        out,
        norm.size,
        x.stride(0),
        0 if residual is None else residual.stride(0),
        out.stride(0),
        norm.eps,
        num_warps=min(max(block // _PER_WARP, 1), _MAX_WARPS),
        LAYER=norm.kind in (NormKind.LAYER, NormKind.LAYER_ONE_PLUS),
        HAS_GAIN=gain is not None,
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        BLOCK=block,
    )


def _power_of_two(size: int) -> int:
    return 1 << (size - 1).bit_length()
