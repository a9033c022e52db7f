"""What is measured of a machine, not of a model: reading, the gap between launches, a barrier of a whole grid."""

import triton
import triton.language as tl

from pyruntime.kernels._common import let_next_start, wait_for_inputs


@triton.jit
def read_kernel(
    x_ptr,  # [count] float32
    sums_ptr,  # [programs] float32
    count,
    BLOCK: tl.constexpr,
):
    """The sum of every programs-th block of `x`, for each program: memory is read once and nearly nothing written."""
    program, num_programs = tl.program_id(0).to(tl.int64), tl.num_programs(0).to(tl.int64)
    offsets = tl.arange(0, BLOCK).to(tl.int64)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for begin in tl.range(program * BLOCK, count, num_programs * BLOCK):
        mask = begin + offsets < count
        total += tl.load(x_ptr + begin + offsets, mask=mask, other=0.0, eviction_policy="evict_first")
    tl.store(sums_ptr + program, tl.sum(total, axis=0))


@triton.jit
def count_kernel(
    counts_ptr,  # [programs] int32
    PDL: tl.constexpr,
):
    """One more for each program; a chain of these is all launches."""
    place = counts_ptr + tl.program_id(0)
    wait_for_inputs(PDL)
    let_next_start(PDL)
    tl.store(place, tl.load(place) + 1)


@triton.jit
def barrier_kernel(
    ticket_ptr,  # [1] int32, zero; afterwards programs * count
    count,
):
    """`count` barriers of all programs, one after the other. Every program must be resident: a cooperative launch."""
    num_programs = tl.num_programs(0)
    for _ in tl.range(0, count):
        ticket = tl.atomic_add(ticket_ptr, 1, sem="acq_rel", scope="gpu")
        goal = (ticket // num_programs + 1) * num_programs
        seen = ticket + 1
        while seen < goal:
            # adding nothing reads what the others added, behind whatever they stored before
            seen = tl.atomic_add(ticket_ptr, 0, sem="acquire", scope="gpu")
