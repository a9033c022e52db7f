"""MLPs on a GPU against the same in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pyruntime.ops.gpu import mlp as gpu
from pyruntime.ops.gpu.choose import Backend
from pyruntime.ops.gpu.product import blocks_of
from pyruntime.ops.mlp import MlpAttrs
from pyruntime.spec import MLP, Activation, Norm, NormKind
from tests import naive
from tests.gpu.helpers import DTYPES, NMSE_LIMITS, guarded, nmse, random
from tests.gpu.products import Step, exact, lin, norm_of, run, weights_of

# numpy says so where exp(-x) is infinite and its reciprocal rightly zero
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")
BACKENDS = (Backend.TRITON, Backend.VENDOR)


def mlp_of(
    size: int,
    hidden: int,
    *,
    activation: Activation = Activation.SILU,
    gated: bool = True,
    bias: bool = False,
    sub: Norm | None = None,
) -> MLP:
    gate = lin(size, hidden, bias) if gated else None
    return MLP(gate=gate, up=lin(size, hidden, bias), down=lin(hidden, size, bias), activation=activation, sub=sub)


def expected(attrs: MlpAttrs, weights: dict[str, Tensor], inputs: list[Tensor]) -> Tensor:
    known, mlp = exact(weights), attrs.mlp
    x, *residual = (each.double().cpu().numpy() for each in inputs)
    x = naive.norm(attrs.norm, "norm", known, x)
    up = naive.linear(mlp.up, "up", known, x)
    gate = up if mlp.gate is None else naive.linear(mlp.gate, "gate", known, x)
    hidden = naive.activate(mlp.activation, gate) * (1.0 if mlp.gate is None else up)
    y = naive.linear(mlp.down, "down", known, naive.norm(mlp.sub, "sub", known, hidden))
    return torch.from_numpy(y + residual[0] if attrs.residual else y)


def check(attrs: MlpAttrs, rows: int, dtype: torch.dtype, backend: Backend) -> Step:
    weights = weights_of(attrs, dtype)
    inputs = [random(rows, width, seed=20 + i) for i, width in enumerate(attrs.in_widths())]
    step = run(gpu, attrs, weights, inputs, dtype, backend)
    assert step.intact
    assert nmse(step.found, expected(attrs, weights, inputs)) < NMSE_LIMITS[dtype]
    return step


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 3, 16, 17])
def test_gated_mlp_at_odd_sizes(rows: int, dtype: torch.dtype, backend: Backend) -> None:
    check(MlpAttrs(mlp_of(63, 100, bias=True), norm_of(63), residual=True), rows, dtype, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("activation", Activation)
def test_every_activation_with_and_without_a_gate(activation: Activation, gated: bool, backend: Backend) -> None:
    attrs = MlpAttrs(mlp_of(24, 160, activation=activation, gated=gated))
    weights, inputs = weights_of(attrs, torch.float32), [random(5, 24)]
    step = run(gpu, attrs, weights, inputs, torch.float32, backend)
    # the two forms of gelu are 4e-8 apart
    assert nmse(step.found, expected(attrs, weights, inputs)) < 1e-10


@pytest.mark.parametrize("activation", [Activation.SILU, Activation.GELU, Activation.GELU_TANH])
def test_activations_far_from_zero_are_zero_or_their_argument(activation: Activation) -> None:
    attrs = MlpAttrs(mlp_of(24, 160, activation=activation, gated=False))
    weights, inputs = weights_of(attrs, torch.float32), [random(3, 24, scale=1e4)]
    step = run(gpu, attrs, weights, inputs, torch.float32)
    assert nmse(step.found, expected(attrs, weights, inputs)) < NMSE_LIMITS[torch.float32]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 5])
def test_last_of_several_programs_finishes_both_halves(rows: int, dtype: torch.dtype) -> None:
    attrs = MlpAttrs(mlp_of(600, 250, bias=True), norm_of(600), residual=True)
    assert check(attrs, rows, dtype, Backend.TRITON).splits[0] > 1


def test_any_number_of_rows_takes_blocks_of_64() -> None:
    check(MlpAttrs(mlp_of(130, 100), norm_of(130), residual=True), 70, torch.bfloat16, Backend.TRITON)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", [NormKind.RMS, NormKind.LAYER])
def test_norm_before_down_takes_the_hidden_values(kind: NormKind, dtype: torch.dtype, backend: Backend) -> None:
    check(MlpAttrs(mlp_of(63, 100, sub=norm_of(100, kind)), norm_of(63), residual=True), 3, dtype, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_hidden_values_beyond_float16_pass_through_the_norm_before_down(backend: Backend) -> None:
    attrs = MlpAttrs(mlp_of(24, 160, sub=norm_of(160)))
    # a few thousand for gate and up each
    weights, inputs = weights_of(attrs, torch.float16), [random(3, 24, scale=3000.0)]
    step = run(gpu, attrs, weights, inputs, torch.float16, backend)
    assert nmse(step.found, expected(attrs, weights, inputs)) < NMSE_LIMITS[torch.float16]


@pytest.mark.parametrize("backend", BACKENDS)
def test_output_may_take_the_residuals_place(backend: Backend) -> None:
    attrs = MlpAttrs(mlp_of(24, 600), norm_of(24), residual=True)
    weights, x = weights_of(attrs, torch.float32), random(5, 24)
    apart = run(gpu, attrs, weights, [x, x], torch.float32, backend).found
    held = guarded(x)
    assert torch.equal(run(gpu, attrs, weights, [held, held], torch.float32, backend, out=held).found, apart)


def test_small_steps_launch_two_kernels_in_bfloat16() -> None:
    attrs = MlpAttrs(mlp_of(24, 100), norm_of(24), residual=True)
    assert check(attrs, 1, torch.bfloat16, Backend.TRITON).kernels == ["product_kernel", "product_kernel"]
    many = check(attrs, 17, torch.bfloat16, Backend.VENDOR).kernels
    assert many == ["norm_kernel", "finish_kernel", "finish_kernel"]


def test_same_input_gives_the_same_bits() -> None:
    attrs = MlpAttrs(mlp_of(600, 250), norm_of(600))
    weights, inputs = weights_of(attrs, torch.bfloat16), [random(3, 600)]
    first, second = (run(gpu, attrs, weights, inputs, torch.bfloat16).found for _ in range(2))
    assert torch.equal(first, second)


# outputs, inputs and gated of gate and up, down, o: Llama-3 8B, Llama-2 13B, Llama-3.2 1B, Qwen2.5 0.5B
SHAPES = [
    *[(14336, 4096, True), (4096, 14336, False), (4096, 4096, False)],
    *[(13824, 5120, True), (5120, 13824, False), (5120, 5120, False)],
    *[(8192, 2048, True), (2048, 8192, False), (2048, 2048, False)],
    *[(4864, 896, True), (896, 4864, False)],
]


@pytest.mark.parametrize("rows", [1, 16])
@pytest.mark.parametrize(("outputs", "inputs", "gated"), SHAPES)
def test_programs_of_a_decode_step_fill_whole_rounds(outputs: int, inputs: int, gated: bool, rows: int) -> None:
    blocks = blocks_of(outputs, inputs, rows, gated, 2, num_sms=132)
    # two on each processor at a time
    rounds = blocks.splits * math.ceil(outputs / blocks.outputs) / (2 * 132)
    assert rounds / math.ceil(rounds) > 0.66
    assert inputs / blocks.inputs / blocks.splits >= 2


@pytest.mark.parametrize("rows", [1, 16, 32, 64])
@pytest.mark.parametrize(("outputs", "inputs", "gated"), [*SHAPES, (128256, 4096, False)])
def test_two_programs_fit_on_a_processor(outputs: int, inputs: int, gated: bool, rows: int) -> None:
    blocks = blocks_of(outputs, inputs, rows, gated, 2, num_sms=132)
    weights = blocks.outputs * blocks.inputs * 2 * (2 if gated else 1)
    stages = 3 * (weights + blocks.rows * blocks.inputs * 4)
    # 227 KiB of an H200, and three programs of a step for one sequence
    assert stages * (3 if rows <= 16 else 2) <= 227 * 1024
