"""The residual add and the choice of wanted rows on a GPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from pyruntime.ops.add import AddAttrs
from pyruntime.ops.gather import GatherAttrs
from pyruntime.ops.gpu import add, gather
from tests.gpu.helpers import DEVICE, DTYPES, NMSE_LIMITS, Guarded, frame_of, nmse, node_of, random, view_of

SIZES = [(1, 24), (3, 63), (17, 100), (5, 1100)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), SIZES)
def test_sum_of_the_stream_and_an_output_of_any_dtype(dtype: torch.dtype, rows: int, width: int) -> None:
    stream, other = random(rows, width), random(rows, width, dtype=dtype, seed=1)
    out = Guarded((rows, width), torch.float32)
    launch = add.on_gpu(AddAttrs(width), node_of({}, dtype))
    launch(frame_of(view_of([rows], [rows], [[0]]), (stream, other), (out.inside,)))
    assert out.intact
    assert nmse(out.inside, stream.double() + other.double()) < NMSE_LIMITS[torch.float32]


def test_sum_may_replace_the_stream() -> None:
    stream, other = random(3, 63), random(3, 63, seed=1)
    expected = stream.double() + other.double()
    frame = frame_of(view_of([3], [3], [[0]]), (stream, other), (stream,))
    add.on_gpu(AddAttrs(63), node_of({}, torch.float32))(frame)
    assert nmse(stream, expected) < NMSE_LIMITS[torch.float32]


@pytest.mark.parametrize(("rows", "width"), SIZES)
def test_gather_copies_the_rows_of_the_index(rows: int, width: int) -> None:
    x, out = random(2 * rows, width), Guarded((rows, width), torch.float32)
    wanted = [2 * i + 1 for i in range(rows)]
    index = torch.tensor(wanted, dtype=torch.int32, device=DEVICE)
    view = replace(view_of([rows], [rows], [[0]]), index=index)
    gather.on_gpu(GatherAttrs(width), node_of({}, torch.float32))(frame_of(view, (x,), (out.inside,)))
    assert out.intact
    assert torch.equal(out.inside, torch.stack([x[i] for i in wanted]))


def test_only_float64_is_refused() -> None:
    for dtype in DTYPES:
        assert add.refuses(AddAttrs(24), dtype) is None
        assert gather.refuses(GatherAttrs(24), dtype) is None
    assert add.refuses(AddAttrs(24), torch.float64) is not None
    assert gather.refuses(GatherAttrs(24), torch.float64) is not None
