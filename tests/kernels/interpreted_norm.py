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
# the widest rows take two turns
MAX_BLOCK = 512
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


def run_case(rows: int, hidden: int, dtype: torch.dtype, has_residual: bool) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(hidden * 31 + rows)
    stride = hidden + 5
    # NaN beyond each row: reading it would show in the result
    x = torch.full((rows, stride), math.nan, dtype=dtype)
    residual = torch.full((rows, stride), math.nan)
    x[:, :hidden] = torch.randn(rows, hidden, generator=generator)
    residual[:, :hidden] = torch.randn(rows, hidden, generator=generator)
    gain = 1.0 + 0.2 * torch.randn(hidden, generator=generator)
    out_buffer, out = guarded(rows, stride, hidden, dtype)
    block = min(triton.next_power_of_2(hidden), MAX_BLOCK)
    # no LayerNorm, a gain, no bias, no early start
    flags = (False, True, False, has_residual, block, False)
    norm_kernel[(rows,)](x, gain, x, residual, out, hidden, stride, stride, stride, EPS, *flags)
    expected = formula(x[:, :hidden], gain) + (residual[:, :hidden].double() if has_residual else 0.0)
    return {
        "case": f"{rows}x{hidden} {dtype} residual={has_residual}",
        "dtype": str(dtype),
        "nmse": nmse(out, expected),
        "intact": surroundings_intact(out_buffer, rows, stride, hidden),
    }


if __name__ == "__main__":
    for dtype in DTYPES:
        for hidden in SIZES:
            for rows in (1, 2, 7):
                for has_residual in (True, False):
                    print(json.dumps(run_case(rows, hidden, dtype, has_residual)))
