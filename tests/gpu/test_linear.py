"""Linear maps on a GPU, with norm, bias and residual, against the same in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pyruntime.ops.gpu import linear as gpu
from pyruntime.ops.gpu.choose import Backend
from pyruntime.ops.linear import LinearAttrs
from pyruntime.spec import Linear, Norm, NormKind
from tests import naive
from tests.gpu.helpers import DTYPES, NMSE_LIMITS, guarded, nmse, random
from tests.gpu.products import Step, exact, lin, norm_of, run, weights_of

BACKENDS = (Backend.TRITON, Backend.VENDOR)


def expected(attrs: LinearAttrs, weights: dict[str, Tensor], inputs: list[Tensor]) -> Tensor:
    known = exact(weights)
    x, *residual = (each.double().cpu().numpy() for each in inputs)
    y = naive.linear(attrs.linear, "linear", known, naive.norm(attrs.norm, "norm", known, x))
    return torch.from_numpy(y + residual[0] if attrs.residual else y)


def inputs_of(attrs: LinearAttrs, rows: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    dtypes = (dtype, torch.float32)
    return [random(rows, width, dtype=dtypes[i], seed=20 + i) for i, width in enumerate(attrs.in_widths())]


def check(attrs: LinearAttrs, rows: int, dtype: torch.dtype, backend: Backend, x_dtype: torch.dtype) -> Step:
    weights, inputs = weights_of(attrs, dtype), inputs_of(attrs, rows, x_dtype)
    step = run(gpu, attrs, weights, inputs, dtype, backend)
    assert step.intact
    assert nmse(step.found, expected(attrs, weights, inputs)) < NMSE_LIMITS[dtype]
    return step


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 3, 16, 17])
def test_norm_product_bias_and_residual_at_odd_sizes(rows: int, dtype: torch.dtype, backend: Backend) -> None:
    check(LinearAttrs(lin(63, 100, bias=True), norm_of(63), residual=True), rows, dtype, backend, torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 5])
def test_input_in_the_weights_dtype_and_nothing_around(rows: int, dtype: torch.dtype, backend: Backend) -> None:
    check(LinearAttrs(lin(160, 24)), rows, dtype, backend, dtype)


@pytest.mark.parametrize("rows", [33, 70])
def test_any_number_of_rows_takes_blocks_of_64(rows: int) -> None:
    attrs = LinearAttrs(lin(600, 130), norm_of(600), residual=True)
    step = check(attrs, rows, torch.bfloat16, Backend.TRITON, torch.float32)
    assert max(step.splits) > 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 5])
def test_last_of_several_programs_finishes_their_tile(rows: int, dtype: torch.dtype) -> None:
    attrs = LinearAttrs(lin(1000, 100, bias=True), norm_of(1000), residual=True)
    assert check(attrs, rows, dtype, Backend.TRITON, torch.float32).splits[0] > 2


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "norm",
    [
        norm_of(100, NormKind.RMS_ONE_PLUS),
        norm_of(100, weight=False),
        norm_of(100, bias=True),
        norm_of(100, NormKind.LAYER, bias=True),
        norm_of(100, NormKind.LAYER_ONE_PLUS),
    ],
    ids=["one plus", "weightless", "biased", "layer", "layer one plus"],
)
def test_every_norm_stands_in_front(norm: Norm, backend: Backend) -> None:
    check(LinearAttrs(lin(100, 24), norm), 3, torch.float32, backend, torch.float32)


def test_deferred_norm_is_one_launch_and_float16_norms_first() -> None:
    attrs = LinearAttrs(lin(24, 24), norm_of(24))
    steps = [check(attrs, 1, dtype, Backend.TRITON, torch.float32) for dtype in (torch.bfloat16, torch.float16)]
    assert [step.kernels for step in steps] == [["product_kernel"], ["norm_kernel", "product_kernel"]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_stream_beyond_float16_is_normed_before_it_is_rounded(backend: Backend) -> None:
    attrs = LinearAttrs(lin(100, 24), norm_of(100))
    weights, inputs = weights_of(attrs, torch.float16), [random(3, 100, scale=1e5)]
    found = run(gpu, attrs, weights, inputs, torch.float16, backend).found
    assert nmse(found, expected(attrs, weights, inputs)) < NMSE_LIMITS[torch.float16]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [24, 1000])
def test_output_may_take_the_residuals_place(size: int, backend: Backend) -> None:
    attrs = LinearAttrs(lin(size, 100), residual=True)
    weights, (x, residual) = weights_of(attrs, torch.float32), inputs_of(attrs, 5)
    apart = run(gpu, attrs, weights, [x, residual], torch.float32, backend).found
    held = guarded(residual)
    assert torch.equal(run(gpu, attrs, weights, [x, held], torch.float32, backend, out=held).found, apart)


def test_same_input_gives_the_same_bits() -> None:
    attrs = LinearAttrs(lin(1000, 100), norm_of(1000))
    weights, inputs = weights_of(attrs, torch.bfloat16), inputs_of(attrs, 3)
    first, second = (run(gpu, attrs, weights, inputs, torch.bfloat16).found for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("backend", BACKENDS)
def test_triangular_map_is_unpacked(backend: Backend) -> None:
    triangular = Linear(in_features=63, out_features=63, triangular=True)
    check(LinearAttrs(triangular, residual=True), 3, torch.float32, backend, torch.float32)


def test_few_rows_are_ours_and_many_the_vendors_by_default() -> None:
    attrs = LinearAttrs(lin(24, 24), norm_of(24))
    weights = weights_of(attrs, torch.float32)
    kernels = [run(gpu, attrs, weights, inputs_of(attrs, rows), torch.float32).kernels for rows in (16, 17)]
    assert kernels == [["product_kernel"], ["norm_kernel", "finish_kernel"]]


def test_output_on_the_input_is_a_mistake() -> None:
    attrs = LinearAttrs(lin(24, 24), norm_of(24), residual=True)
    x = random(3, 24)
    with pytest.raises(AssertionError, match="output lies on its input"):
        run(gpu, attrs, weights_of(attrs, torch.float32), [x, x], torch.float32, out=x)


def test_only_float64_is_refused() -> None:
    attrs = LinearAttrs(lin(24, 24))
    assert [gpu.refuses(attrs, dtype) for dtype in DTYPES] == [None] * 3
    assert gpu.refuses(attrs, torch.float64) == "float64 is not computed on a GPU"
