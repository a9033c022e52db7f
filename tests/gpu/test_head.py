"""Logits on a GPU against the same in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pyruntime.ops.gpu import head as gpu
from pyruntime.ops.gpu.choose import Backend
from pyruntime.ops.head import HeadAttrs
from pyruntime.spec import Head, NormKind
from tests import naive
from tests.gpu.helpers import DTYPES, NMSE_LIMITS, info, nmse, random
from tests.gpu.products import Step, exact, lin, norm_of, run, weights_of

# numpy says so where exp(-x) is infinite and its reciprocal rightly zero
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")
BACKENDS = (Backend.TRITON, Backend.VENDOR)


def expected(attrs: HeadAttrs, weights: dict[str, Tensor], x: Tensor) -> Tensor:
    known = exact(weights)
    normed = naive.norm(attrs.norm, "norm", known, x.double().cpu().numpy())
    logits = torch.from_numpy(naive.linear(attrs.head.linear, "linear", known, normed))
    cap = attrs.head.softcap
    return logits if cap is None else cap * (logits / cap).tanh()


def check(attrs: HeadAttrs, rows: int, dtype: torch.dtype, backend: Backend, scale: float = 1.0) -> Step:
    weights, x = weights_of(attrs, dtype), random(rows, attrs.in_widths()[0], scale=scale)
    step = run(gpu, attrs, weights, [x], dtype, backend)
    assert step.intact
    assert nmse(step.found, expected(attrs, weights, x)) < NMSE_LIMITS[dtype]
    return step


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 3, 16, 17])
def test_logits_of_an_odd_vocabulary(rows: int, dtype: torch.dtype, backend: Backend) -> None:
    check(HeadAttrs(Head(linear=lin(63, 1091, bias=True), tied=False), norm_of(63)), rows, dtype, backend)


def test_many_outputs_take_larger_tiles() -> None:
    # 128 a tile where every processor has two such tiles
    size = 2 * 128 * info().num_sms - 5
    attrs = HeadAttrs(Head(linear=lin(100, size), tied=True), norm_of(100, NormKind.RMS_ONE_PLUS))
    step = check(attrs, 5, torch.bfloat16, Backend.TRITON)
    assert step.launched[0][1]["BLOCK_OUTPUTS"] == 128


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_softcap_is_exact_near_zero_and_bounds_what_is_large(scale: float, backend: Backend) -> None:
    attrs = HeadAttrs(Head(linear=lin(24, 100), tied=True, softcap=5.0))
    found = check(attrs, 3, torch.float32, backend, scale).found
    assert float(found.abs().max()) <= 5.0


@pytest.mark.parametrize("dtype", DTYPES)
def test_logits_of_split_inputs(dtype: torch.dtype) -> None:
    attrs = HeadAttrs(Head(linear=lin(1000, 63), tied=False, softcap=2.0), norm_of(1000))
    assert check(attrs, 3, dtype, Backend.TRITON).splits[0] > 1


def test_only_float64_is_refused() -> None:
    attrs = HeadAttrs(Head(linear=lin(24, 24), tied=True))
    assert [gpu.refuses(attrs, dtype) for dtype in DTYPES] == [None] * 3
    assert gpu.refuses(attrs, torch.float64) == "float64 is not computed on a GPU"
