"""The kernels that measure a machine: what they leave is known."""

from __future__ import annotations

import pytest
import torch

from pyruntime.kernels.probe import barrier_kernel, count_kernel, read_kernel
from tests.gpu.helpers import DEVICE, INTERPRETED, Guarded, guarded, info


@pytest.mark.parametrize("count", [1, 63, 1000])
@pytest.mark.parametrize("programs", [1, 3])
def test_reading_sums_every_value_once(count: int, programs: int) -> None:
    values = guarded(torch.arange(1, count + 1, dtype=torch.float32))
    sums = Guarded((programs,), torch.float32)
    read_kernel[(programs,)](values, sums.inside, count, BLOCK=128)
    assert float(sums.inside.sum()) == count * (count + 1) / 2
    assert sums.intact


@pytest.mark.parametrize("early", [False, True])
def test_each_launch_of_a_chain_counts_once(early: bool) -> None:
    if early and not info().has_dependent_launch:
        pytest.skip("kernels of this device cannot start early")
    counts = torch.zeros(5, dtype=torch.int32, device=DEVICE)
    options = {"launch_pdl": True} if early else {}
    for _ in range(7):
        count_kernel[(5,)](counts, PDL=early, num_warps=1, **options)
    assert counts.tolist() == [7] * 5


def test_every_program_comes_to_every_barrier() -> None:
    # programs run one after the other in the interpreter: a second one would be waited for without end
    programs = 1 if INTERPRETED else info().num_sms
    ticket = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    options = {} if INTERPRETED else {"launch_cooperative_grid": True}
    barrier_kernel[(programs,)](ticket, 3, **options)
    assert int(ticket) == 3 * programs
