"""K6 in CUDA C++: a run of MLPs as one launch whose blocks all run at once and meet after each product."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor

from pyruntime.ops.gpu.frame import Frame, GpuNode
from pyruntime.ops.mlp import MlpAttrs
from pyruntime.ops.mlp_chain import MlpChainAttrs
from pyruntime.spec import NormKind

MAX_ROWS: Final = 4
_MULTIPLE: Final = 8
# what a block may have on an A100; newer GPUs for servers have more
_SHARED_BYTES: Final = 163 << 10
# of the next product's weights, on their way to L2 while blocks meet: a quarter of the L2 of an A100
_PREFETCH_BYTES: Final = 10 << 20


def refused(compiled: Any, attrs: MlpChainAttrs, dtype: torch.dtype, num_sms: int) -> str | None:
    """Why the CUDA kernel cannot run it even for one row, or None."""
    if dtype not in (torch.bfloat16, torch.float16):
        return f"{str(dtype).removeprefix('torch.')}, not bfloat16 or float16"
    for part in attrs.parts:
        why = _refused_part(part)
        if why is not None:
            return why
    if most_rows(compiled, attrs, num_sms) == 0:
        return "its widest input does not fit in shared memory"
    return None


def _refused_part(part: MlpAttrs) -> str | None:
    mlp = part.mlp
    if mlp.gate is None or mlp.sub is not None:
        return "an MLP without a gate or with a norm before down"
    if part.norm is not None and (part.norm.kind not in (NormKind.RMS, NormKind.RMS_ONE_PLUS) or part.norm.bias):
        return f"a {part.norm.kind} norm or one with a bias"
    if mlp.in_size % _MULTIPLE or mlp.up.out_features % _MULTIPLE:
        return f"{mlp.in_size} or {mlp.up.out_features} values, not a multiple of {_MULTIPLE}"
    return None


def most_rows(compiled: Any, attrs: MlpChainAttrs, num_sms: int) -> int:
    """The most rows, up to 4, whose inputs a block can hold."""
    sizes = {"width": attrs.parts[0].mlp.in_size, "hidden": [part.mlp.up.out_features for part in attrs.parts]}
    fitting = (
        rows
        for rows in range(MAX_ROWS, 0, -1)
        if compiled.mlp_chain_shared_bytes(rows=rows, blocks=num_sms, **sizes) <= _SHARED_BYTES
    )
    return next(fitting, 0)


def run_chain(compiled: Any, attrs: MlpChainAttrs, node: GpuNode, frame: Frame) -> None:
    """Launch the chain on `frame`, of 1 to 4 rows, with the module `compiled`; weights as `mlp_chain.layouts` says."""
    (x,), (out,) = frame.inputs, frame.outputs
    rows, width = x.shape
    assert x.dtype is out.dtype is torch.float32 and x.stride(1) == out.stride(1) == 1
    layers = [_layer(part, node.weights, f"{i}.") for i, part in enumerate(attrs.parts)]
    widest = max(part.mlp.up.out_features for part in attrs.parts)
    hidden, counters = frame.scratch((rows, widest), node.dtype), frame.counters(2)
    most: int = compiled.mlp_chain_most_layers
    for first in range(0, len(layers), most):
        compiled.mlp_chain(
            x=x.data_ptr(),
            out=out.data_ptr(),
            hidden=hidden.data_ptr(),
            counters=counters.data_ptr(),
            x_stride=x.stride(0),
            out_stride=out.stride(0),
            rows=rows,
            width=width,
            layers=layers[first : first + most],
            blocks=frame.info.num_sms,
            prefetch_bytes=_PREFETCH_BYTES,
            dtype=str(node.dtype).removeprefix("torch."),
            stream=torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0,
        )
        x = out


def _layer(part: MlpAttrs, weights: Mapping[str, Tensor], prefix: str) -> dict[str, Any]:
    """A layer as the module takes it; 0 is what is not there."""

    def address(name: str) -> int:
        return weights[prefix + name].data_ptr() if prefix + name in weights else 0

    return {
        "gate_up": address("gate_up"),
        "down": address("down"),
        "gain": address("norm.gain"),
        "gate_up_bias": address("gate_up.bias"),
        "down_bias": address("down.bias"),
        "hidden": part.mlp.up.out_features,
        "activation": str(part.mlp.activation),
        "norm": part.norm is not None,
        "eps": 0.0 if part.norm is None else part.norm.eps,
    }
