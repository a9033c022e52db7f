"""The CUDA C++ kernels from Python: the module, and launches of matrix products over tensors."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator
from typing import Any, Final

import torch
from torch import Tensor

from pyruntime import env
from pyruntime.ops.gpu.frame import Frame
from pyruntime.spec import Activation, Attention

_MODULE: Final = "pyruntime._C_cuda"
_TWIN: Final = "_C_cuda_twin"
# of one launch; more rows take several, each of which reads the weights
MAX_ROWS: Final = 64
# shared memory of a block, in KiB, where it is less than what other devices have
_SHARED_KIB: Final = {80: 163, 86: 99, 87: 163, 89: 99, 120: 99, 121: 99}
_MOST_SHARED_KIB: Final = 227
# with less, there is room for fewer rows
_SHARED_KIB_OF_MAX_ROWS: Final = 163
_FEWER_ROWS: Final = 16
# inputs that a thread reads at once, 16 bytes of weights
_ALIGNED: Final = 8


def load(interpreted: bool) -> Any:
    """The module with the CUDA kernels, or None where it was not built.

    `interpreted`: memory is the CPU's, as in Triton's interpreter. Then it is the host twin of the kernels that
    PYRUNTIME_CUDA_TWIN names, or None.
    """
    if not interpreted:
        return None if importlib.util.find_spec(_MODULE) is None else importlib.import_module(_MODULE)
    path = env.cuda_twin()
    if path is None:
        return None
    spec = importlib.util.spec_from_file_location(_TWIN, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def refuses(compiled: Any, inputs: int, dtype: torch.dtype) -> str | None:
    """Why the CUDA kernels cannot multiply with weights [outputs, `inputs`] of `dtype`, or None."""
    if compiled is None:
        return "the CUDA extension was not built"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"its weights are {_name(dtype)}, not bfloat16 or float16"
    if inputs % _ALIGNED:
        return f"{inputs} inputs are no multiple of {_ALIGNED}"
    return None


def stream_of(x: Tensor) -> int:
    """The stream that launches on the memory of `x` go to."""
    return int(torch.cuda.current_stream(x.device).cuda_stream) if x.is_cuda else 0


def product(
    frame: Frame,
    compiled: Any,
    x: Tensor,
    weight: Tensor,
    out: Tensor,
    *,
    gain: Tensor | None = None,
    eps: float | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: Activation | None = None,
    gated: bool = False,
    softcap: float | None = None,
) -> None:
    """out = softcap(activation(weight norm(x) + bias)) + residual.

    `x` [rows, inputs] float32 or as `weight` [outputs, inputs]; `out` and `residual` [rows, outputs], `out` may be the
    residual. `gated`: weight is [2 * outputs, inputs], and the second half's outputs multiply the activated first
    half's. `eps` asks for an RMSNorm of x with `gain` [inputs] float32 or none; float16 takes x as normed before.
    """
    pairs = out.shape[1] if gated else -(-out.shape[1] // 2)
    shared = {
        "weight": weight.data_ptr(),
        "gain": _address(gain),
        "bias": _address(bias),
        "eps": eps or 0.0,
        "norm": eps is not None,
        "gated": gated,
        "activation": str(activation or "none"),
        "softcap": softcap or 0.0,
        **_NO_HEADS,
    }
    for rows in _launches(frame, x):
        part = None if residual is None else residual[rows]
        placed = {"residual": _address(part), "residual_stride": 0 if part is None else part.stride(0)}
        _launch(frame, compiled, x[rows], weight, out[rows], pairs, {**shared, **placed})


def qkv(
    frame: Frame,
    compiled: Any,
    x: Tensor,
    weight: Tensor,
    attention: Attention,
    slot: int,
    *,
    query: bool = True,
    cache: bool = True,
    gain: Tensor | None = None,
    eps: float | None = None,
    bias: Tensor | None = None,
) -> None:
    """Queries, rotated, into the frame's output; keys, rotated, and values into cache `slot`.

    `weight` [outputs, inputs] has the rows of queries, if `query`, then of keys and values, if `cache`. No role may be
    merged away or have norms of its heads. For the rest see `product`.
    """
    view, rope = frame.view, attention.rope
    num_heads, num_kv_heads = attention.num_heads if query else 0, attention.num_kv_heads if cache else 0
    cos, sin = (None, None) if rope is None else frame.rotary(rope)
    keys, values = frame.cache.pools(slot) if cache else (None, None)
    shared = {
        **_NO_HEADS,
        "weight": weight.data_ptr(),
        "gain": _address(gain),
        "bias": _address(bias),
        "eps": eps or 0.0,
        "norm": eps is not None,
        "gated": False,
        "activation": "none",
        "softcap": 0.0,
        "residual": 0,
        "residual_stride": 0,
        "head_dim": attention.head_dim,
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "rope_dim": 0 if rope is None else rope.dim,
        "page_table": view.page_table.data_ptr(),
        "page_stride": view.page_table.stride(0),
        "page_size": frame.cache.page_size,
        "cos": _address(cos),
        "sin": _address(sin),
        "keys": _address(keys),
        "values": _address(values),
    }
    pairs = (num_heads + 2 * num_kv_heads) * -(-attention.head_dim // 2)
    for rows in _launches(frame, x):
        placed = {"positions": view.positions[rows].data_ptr(), "sequences": view.sequences[rows].data_ptr()}
        # without queries there is no output: keys and values are found by their own addresses
        out = frame.outputs[0][rows] if query else x[rows, :0]
        _launch(frame, compiled, x[rows], weight, out, pairs, {**shared, **placed})


_NO_HEADS: Final[dict[str, int]] = dict.fromkeys(
    (
        "head_dim",
        "num_heads",
        "num_kv_heads",
        "rope_dim",
        "positions",
        "sequences",
        "page_table",
        "page_stride",
        "page_size",
        "cos",
        "sin",
        "keys",
        "values",
    ),
    0,
)


def _launches(frame: Frame, x: Tensor) -> Iterator[slice]:
    """The rows of each launch."""
    size = MAX_ROWS if _shared_kib(frame) >= _SHARED_KIB_OF_MAX_ROWS else _FEWER_ROWS
    for begin in range(0, x.shape[0], size):
        yield slice(begin, begin + size)


def _shared_kib(frame: Frame) -> int:
    return _SHARED_KIB.get(frame.info.capability, _MOST_SHARED_KIB)


def _launch(
    frame: Frame, compiled: Any, x: Tensor, weight: Tensor, out: Tensor, pairs: int, arguments: dict[str, Any]
) -> None:
    """One launch, cut as suits the device. Rows lie apart as far as the tensors say, columns are contiguous."""
    assert x.stride(1) == 1 and weight.is_contiguous() and (out.shape[1] <= 1 or out.stride(1) == 1)
    rows, inputs = x.shape
    plan = compiled.plan_product(
        rows=rows, pairs=pairs, inputs=inputs, num_sms=frame.info.num_sms, shared_bytes=_shared_kib(frame) * 1024
    )
    partials, squares, counters = None, None, None
    if plan["splits"] > 1:
        partials = frame.scratch((plan["num_partials"],), torch.float32)
        squares = frame.scratch((plan["num_squares"],), torch.float32)
        counters = frame.counters(plan["num_counters"])
    compiled.product(
        **plan,
        **arguments,
        partials=_address(partials),
        squares=_address(squares),
        counters=_address(counters),
        x=x.data_ptr(),
        out=out.data_ptr(),
        x_stride=x.stride(0),
        out_stride=out.stride(0),
        rows=rows,
        inputs=inputs,
        outputs=weight.shape[0],
        dtype=_name(weight.dtype),
        x_dtype=_name(x.dtype),
        out_dtype=_name(out.dtype),
        early=frame.info.has_dependent_launch,
        stream=stream_of(x),
    )


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
