"""Run the Triton norm kernel in the interpreter on one set of shapes; prints one JSON line per case.

A program of its own: Triton reads TRITON_INTERPRET when it is imported, and that choice holds for the whole process.
"""

from __future__ import annotations

import json
import math
from typing import Any

import torch
import triton
from torch import Tensor

from pyruntime.kernels.norm import norm_kernel

EPS = 1e-5
GUARD = 32
SENTINEL = -77.0
SIZES = (1, 63, 100, 1000)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def formula(state: Tensor, weight: Tensor) -> Tensor:
    wide = state.double()
    return wide / (wide.pow(2).mean(-1, keepdim=True) + EPS).sqrt() * weight.double()


def guarded(rows: int, stride: int, hidden: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """An output poisoned with NaN inside a buffer of sentinels: the whole buffer and the [rows, hidden] view in it."""
    buffer = torch.full((GUARD + rows * stride + GUARD,), SENTINEL, dtype=dtype)
    view = buffer[GUARD:-GUARD].view(rows, stride)[:, :hidden]
    view.fill_(math.nan)
    return buffer, view


def surroundings_intact(buffer: Tensor, rows: int, stride: int, hidden: int) -> bool:
    inside = buffer[GUARD:-GUARD].view(rows, stride)[:, hidden:]
    return all(bool((part == SENTINEL).all()) for part in (buffer[:GUARD], buffer[-GUARD:], inside))


def nmse(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).pow(2).sum() / expected.pow(2).sum())


def is_rounded(found: Tensor, exact: Tensor) -> bool:
    """Whether every element is a neighbour of the exact value. The interpreter rounds bfloat16 towards zero."""
    return bool(((found.double() - exact).abs() <= torch.finfo(found.dtype).eps * exact.abs()).all())


def run_case(rows: int, hidden: int, dtype: torch.dtype, has_residual: bool) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(hidden * 31 + rows)
    stride = hidden + 5
    # NaN beyond each row: reading it would show in the result
    x = torch.full((rows, stride), math.nan, dtype=dtype)
    residual = torch.full((rows, stride), math.nan, dtype=dtype)
    x[:, :hidden] = torch.randn(rows, hidden, generator=generator)
    residual[:, :hidden] = torch.randn(rows, hidden, generator=generator)
    weight = (1.0 + 0.2 * torch.randn(hidden, generator=generator)).to(dtype)
    out_buffer, out = guarded(rows, stride, hidden, dtype)
    sum_buffer, sum_out = guarded(rows, stride, hidden, dtype)
    block = triton.next_power_of_2(hidden)
    strides = (stride, stride, stride, stride)
    norm_kernel[(rows,)](x, residual, weight, sum_out, out, hidden, *strides, EPS, has_residual, block)
    if has_residual:
        state = sum_out
        sum_ok = is_rounded(sum_out, x[:, :hidden].double() + residual[:, :hidden].double())
    else:
        state = x[:, :hidden]
        sum_ok = bool(sum_out.isnan().all())
    return {
        "case": f"{rows}x{hidden} {dtype} residual={has_residual}",
        "dtype": str(dtype),
        "nmse": nmse(out, formula(state, weight)),
        "sum_ok": sum_ok,
        "intact": surroundings_intact(out_buffer, rows, stride, hidden)
        and surroundings_intact(sum_buffer, rows, stride, hidden),
    }


if __name__ == "__main__":
    for dtype in DTYPES:
        for hidden in SIZES:
            for rows in (1, 2, 7):
                for has_residual in (True, False):
                    print(json.dumps(run_case(rows, hidden, dtype, has_residual)))
