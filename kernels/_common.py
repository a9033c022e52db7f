"""What every Triton kernel shares."""

import os

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")


@triton.jit
def dot(a, b, acc):
    """acc + a @ b with float32 sums. The only place that may call tl.dot.

    The interpreter multiplies bfloat16 operands wrongly and says nothing, so there they become float32 first. Compiled
    code keeps the narrow operands: the branch is gone before any instruction is chosen. float32 operands are multiplied
    as float32, never as TF32.
    """
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    return tl.dot(a, b, acc, input_precision="ieee")
