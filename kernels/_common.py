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


@triton.jit
def wait_for_inputs(PDL: tl.constexpr):
    """Wait until the kernel in front has ended. Above this, nothing may be written, and nothing read but weights.

    A kernel of a chain that starts early must call this in every program. Without PDL the launch itself waited.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()


@triton.jit
def let_next_start(PDL: tl.constexpr):
    """Let the next kernel take free processors; it waits for this one to end before it reads."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
