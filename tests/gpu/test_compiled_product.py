"""Matrix products of the CUDA kernels against float64: in their host twin where Triton is interpreted, or on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from pyruntime.ops.gpu import compiled
from pyruntime.ops.gpu.frame import Frame
from pyruntime.spec import Activation
from tests.gpu.helpers import DEVICE, INTERPRETED, Guarded, frame_of, guarded, nmse, random, view_of
from tests.gpu.twin import kernels

ROWS = (1, 2, 3, 4, 5, 8, 17, 33, 64)
DTYPES = (torch.bfloat16, torch.float16)
# sums in float32 of products that are exact in it
EXACT = 1e-10
# outputs or activations rounded to 16 bit
ROUNDED = 5e-4
ACTIVATIONS: Mapping[Activation, Callable[[Tensor], Tensor]] = {
    Activation.SILU: functional.silu,
    Activation.GELU: functional.gelu,
    Activation.GELU_TANH: lambda x: functional.gelu(x, approximate="tanh"),
    Activation.RELU: functional.relu,
    Activation.RELU2: lambda x: functional.relu(x).square(),
}


@pytest.fixture
def module() -> Iterator[Any]:
    """The kernels that run here."""
    found = kernels()
    yield found
    if INTERPRETED:
        found.set_order()


class Case:
    """A product of `rows` rows; everything that a kernel may read lies between NaN."""

    def __init__(
        self, rows: int, outputs: int, inputs: int, dtype: torch.dtype, x_dtype: torch.dtype | None = None
    ) -> None:
        self.x = random(rows, inputs, dtype=dtype, seed=1)
        if x_dtype is not None:
            self.x = guarded(self.x.to(x_dtype))
        self.weight = random(outputs, inputs, dtype=dtype, seed=2, scale=inputs**-0.5)
        self.bias = random(outputs, seed=3)
        self.residual = random(rows, outputs, seed=4)
        self.gain = guarded(random(inputs, seed=5).abs() + 0.5)
        self.frame = frame_of(view_of([1] * rows, [1] * rows, [[0]] * rows), (self.x,), ())

    def plain(self) -> Tensor:
        """The product in float64."""
        return self.x.double() @ self.weight.double().T

    def normed(self, eps: float) -> Tensor:
        """The product behind an RMSNorm, in float64."""
        x = self.x.double()
        x = x * self.gain.double() / (x.square().mean(-1, keepdim=True) + eps).sqrt()
        return x @ self.weight.double().T


def run(
    module: Any, case: Case, width: int | None = None, dtype: torch.dtype = torch.float32, sms: int = 0, **options: Any
) -> Tensor:
    """The output, of which every value was written and nothing beside it; counters are zero again."""
    made = Guarded((case.x.shape[0], width or case.weight.shape[0]), dtype)
    frame = with_sms(case.frame, sms)
    compiled.product(frame, module, case.x, case.weight, made.inside, **options)
    assert made.intact and not made.inside.isnan().any() and not frame.counters(4096).any()
    return made.inside


def with_sms(frame: Frame, sms: int) -> Frame:
    """The frame on a device of `sms` processors, or its own."""
    return replace(frame, info=replace(frame.info, num_sms=sms)) if sms else frame


def splits_of(module: Any, case: Case, sms: int) -> int:
    rows, inputs = case.x.shape
    sizes = {"rows": rows, "inputs": inputs, "pairs": -(-case.weight.shape[0] // 2)}
    return int(module.plan_product(**sizes, num_sms=sms, shared_bytes=227 * 1024)["splits"])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", ROWS)
def test_product_is_the_sum_of_products_with_bias_and_residual(module: Any, rows: int, dtype: torch.dtype) -> None:
    case = Case(rows, 37, 104, dtype)
    expected = case.plain() + case.bias.double() + case.residual.double()
    assert nmse(run(module, case, bias=case.bias, residual=case.residual), expected) < EXACT


@pytest.mark.parametrize(("outputs", "inputs"), [(1, 8), (2, 63 * 8), (100, 512), (129, 1000)])
@pytest.mark.parametrize("rows", [1, 4, 16])
def test_product_takes_any_number_of_outputs_and_units_of_inputs(
    module: Any, rows: int, outputs: int, inputs: int
) -> None:
    case = Case(rows, outputs, inputs, torch.bfloat16)
    assert nmse(run(module, case), case.plain()) < EXACT


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [2, 9])
def test_float32_activations_are_rounded_to_the_dtype_of_the_weights(
    module: Any, rows: int, dtype: torch.dtype
) -> None:
    case = Case(rows, 24, 160, dtype, torch.float32)
    case.x.copy_(random(rows, 160, seed=9))
    expected = case.x.to(dtype).double() @ case.weight.double().T
    assert nmse(run(module, case), expected) < EXACT


@pytest.mark.parametrize("rows", ROWS)
def test_norm_in_front_is_that_of_the_unrounded_row(module: Any, rows: int) -> None:
    case = Case(rows, 37, 104, torch.bfloat16, torch.float32)
    case.x.copy_(random(rows, 104, seed=9, scale=3.0))
    assert nmse(run(module, case, gain=case.gain, eps=0.1), case.normed(0.1)) < ROUNDED
    case.gain.fill_(1.0)
    assert nmse(run(module, case, eps=0.1), case.normed(0.1)) < ROUNDED


@pytest.mark.parametrize("activation", Activation)
@pytest.mark.parametrize("rows", [1, 3, 7, 40])
def test_gate_is_activated_and_multiplies_up(module: Any, rows: int, activation: Activation) -> None:
    case = Case(rows, 2 * 21, 96, torch.float16)
    gate, up = (case.plain() + case.bias.double()).split(21, dim=1)
    expected = ACTIVATIONS[activation](gate) * up
    found = run(module, case, 21, torch.float16, bias=case.bias, activation=activation, gated=True)
    assert nmse(found, expected) < ROUNDED


@pytest.mark.parametrize("activation", Activation)
def test_activation_stands_behind_the_bias(module: Any, activation: Activation) -> None:
    case = Case(2, 21, 96, torch.bfloat16)
    expected = ACTIVATIONS[activation](case.plain() + case.bias.double())
    assert nmse(run(module, case, bias=case.bias, activation=activation), expected) < EXACT * 100


@pytest.mark.parametrize("rows", [1, 6])
def test_softcap_bounds_the_logits(module: Any, rows: int) -> None:
    case = Case(rows, 43, 64, torch.bfloat16)
    expected = 0.5 * torch.tanh(case.plain() / 0.5)
    assert nmse(run(module, case, softcap=0.5), expected) < EXACT * 100


@pytest.mark.parametrize("rows", ROWS)
def test_split_products_equal_whole_ones(module: Any, rows: int) -> None:
    case = Case(rows, 11, 5128, torch.bfloat16, torch.float32)
    assert splits_of(module, case, 132) > 1
    whole = case.normed(1e-5) + case.residual.double()
    found = run(module, case, sms=132, gain=case.gain, eps=1e-5, residual=case.residual)
    assert nmse(found, whole) < ROUNDED


@pytest.mark.parametrize(("rows", "inputs"), [(1, 5128), (12, 1544), (64, 1032)])
def test_no_order_of_blocks_and_threads_changes_a_bit(module: Any, rows: int, inputs: int) -> None:
    case = Case(rows, 45, inputs, torch.bfloat16)
    assert splits_of(module, case, 16) > 1
    first = run(module, case, sms=16, gain=case.gain, eps=1e-5)
    for seed, at_once in ((1, 1), (2, 3), (3, 16)):
        if INTERPRETED:
            module.set_order(seed=seed, at_once=at_once)
        assert torch.equal(run(module, case, sms=16, gain=case.gain, eps=1e-5), first)


@pytest.mark.parametrize("rows", [3, 20])
def test_output_may_lie_on_the_residual(module: Any, rows: int) -> None:
    case = Case(rows, 37, 104, torch.bfloat16)
    expected = case.plain() + case.residual.double()
    compiled.product(case.frame, module, case.x, case.weight, case.residual, residual=case.residual)
    assert nmse(case.residual, expected) < EXACT


def test_more_rows_than_a_launch_holds_take_several(module: Any) -> None:
    case = Case(compiled.MAX_ROWS + 6, 10, 64, torch.bfloat16)
    expected = case.plain() + case.residual.double()
    assert nmse(run(module, case, residual=case.residual), expected) < EXACT


def test_rows_may_lie_apart(module: Any) -> None:
    case = Case(5, 10, 64, torch.float16)
    wide = torch.full((5, 96), torch.nan, dtype=torch.float16, device=DEVICE)
    wide[:, :64] = case.x
    out = torch.full((5, 16), torch.nan, device=DEVICE)
    compiled.product(case.frame, module, wide[:, :64], case.weight, out[:, :10])
    assert nmse(out[:, :10], case.plain()) < EXACT and out[:, 10:].isnan().all()


@pytest.mark.parametrize(
    ("inputs", "dtype", "reason"),
    [
        (64, torch.float32, "its weights are float32, not bfloat16 or float16"),
        (60, torch.float16, "60 inputs are no multiple of 8"),
        (64, torch.float16, None),
    ],
)
def test_refusals_say_why(module: Any, inputs: int, dtype: torch.dtype, reason: str | None) -> None:
    assert compiled.refuses(module, inputs, dtype) == reason
    assert compiled.refuses(None, inputs, dtype) == "the CUDA extension was not built"


_ZERO = (
    *("gain", "bias", "residual", "partials", "squares", "counters", "residual_stride", "stream", "cos", "sin"),
    *("head_dim", "num_heads", "num_kv_heads", "rope_dim", "positions", "sequences", "keys", "values"),
    *("page_table", "page_stride", "page_size", "num_partials", "num_squares", "num_counters"),
)
GOOD: dict[str, Any] = dict.fromkeys(_ZERO, 0) | {
    "x": 256,
    "weight": 256,
    "out": 256,
    "rows": 1,
    "inputs": 1024,
    "outputs": 8,
    "columns": 1,
    "splits": 1,
    "x_stride": 1024,
    "out_stride": 8,
    "dtype": "bfloat16",
    "x_dtype": "float32",
    "out_dtype": "float32",
    "activation": "none",
    "eps": 0.0,
    "softcap": 0.0,
    "norm": False,
    "gated": False,
    "early": False,
}
SPLIT = {"splits": 2, "partials": 256, "squares": 256, "counters": 256}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": 0}, "x is a null pointer"),
        ({"weight": 264}, "weight is not aligned to 16 bytes"),
        ({"rows": 65}, "rows is 65; expected 1 to 64"),
        ({"inputs": 1020}, "must be multiples of 8"),
        ({"x_stride": 512}, "x_stride is 512"),
        ({"dtype": "float32"}, "weights are float32"),
        ({"x_dtype": "float16"}, "x is neither float32 nor as the weights"),
        ({"dtype": "float16", "norm": True}, "overflows float16"),
        ({"gain": 256}, "a gain without a norm"),
        ({"gated": True, "outputs": 7}, "gated outputs must be even"),
        ({"activation": "tanh"}, "activation is 'tanh'"),
        ({"eps": float("nan")}, "eps is nan"),
        ({"columns": 5}, "columns is 5; expected 1 to 4"),
        ({**SPLIT, "splits": 3}, "splits is 3; expected 1 to 2"),
        ({**SPLIT, "partials": 0}, "partials is a null pointer"),
        ({**SPLIT, "num_partials": 16, "num_squares": 2}, "num_counters is 0"),
        ({**SPLIT, "num_partials": 15, "num_counters": 1, "num_squares": 2}, "num_partials is 15"),
        ({"rows": 64, "inputs": 8192, "x_stride": 8192}, "take more splits"),
        ({"head_dim": 4, "num_heads": 1, "positions": 256}, "not 8 outputs"),
        ({"head_dim": 8, "num_heads": 1, "rope_dim": 3, "positions": 256, "cos": 256, "sin": 256}, "even number"),
        ({"head_dim": 8, "num_heads": 1}, "positions is a null pointer"),
        ({"more": 1}, "arguments"),
    ],
)
def test_the_launcher_raises_instead_of_launching_nonsense(module: Any, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        module.product(**{**GOOD, **change})
    with pytest.raises(ValueError, match="is missing"):
        module.product(**{name: value for name, value in GOOD.items() if name != "out"})
