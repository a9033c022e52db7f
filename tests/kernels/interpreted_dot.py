"""Run the shared dot helper in the Triton interpreter for each dtype; prints one JSON line per dtype."""

from __future__ import annotations

import json

import torch
import triton
import triton.language as tl

from pyruntime.kernels._common import dot


@triton.jit
def product_kernel(a_ptr, b_ptr, out_ptr, SIZE: tl.constexpr):  # noqa: ANN001, ANN201 - Triton parameters have no Python types
    rows = tl.arange(0, SIZE)[:, None]
    columns = tl.arange(0, SIZE)[None, :]
    at = rows * SIZE + columns
    acc = tl.full((SIZE, SIZE), 1.0, tl.float32)
    tl.store(out_ptr + at, dot(tl.load(a_ptr + at), tl.load(b_ptr + at), acc))


if __name__ == "__main__":
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        generator = torch.Generator().manual_seed(0)
        a = torch.randn(16, 16, generator=generator).to(dtype)
        b = torch.randn(16, 16, generator=generator).to(dtype)
        out = torch.full((16, 16), float("nan"))
        product_kernel[(1,)](a, b, out, 16)
        expected = 1.0 + a.double() @ b.double()
        print(json.dumps({"dtype": str(dtype), "error": float((out.double() - expected).abs().max())}))
