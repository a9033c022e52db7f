"""Compile the Triton norm kernel for GPUs that need not be here; prints one JSON line per target with its spills."""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pyruntime.kernels.norm import norm_kernel

BLOCK = 4096
POINTERS = ("x_ptr", "residual_ptr", "weight_ptr", "sum_out_ptr", "out_ptr")


def compile_norm(capability: int, dtype: str) -> bytes:
    """The cubin of norm_kernel for one architecture and element type."""
    constants = {"HAS_RESIDUAL": True, "BLOCK": BLOCK}
    signature = dict.fromkeys(norm_kernel.arg_names, "i64")
    signature |= dict.fromkeys(POINTERS, f"*{dtype}") | {"eps": "fp32"} | dict.fromkeys(constants, "constexpr")
    source = ASTSource(norm_kernel, signature, constexprs=constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 8})
    return compiled.asm["cubin"]


def spilled(cubin: bytes) -> dict[str, int]:
    """Bytes of stack and local memory per thread, as the tool in Triton's own wheel reads them."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        listed = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True)
    usage = re.search(r"STACK:(\d+).*?LOCAL:(\d+)", listed.stdout + listed.stderr)
    assert usage is not None, listed.stdout
    return {"stack": int(usage[1]), "local": int(usage[2])}


if __name__ == "__main__":
    for capability in (80, 90):
        for dtype in ("fp32", "bf16"):
            row = {"capability": capability, "dtype": dtype, **spilled(compile_norm(capability, dtype))}
            print(json.dumps(row))
