"""Every implementation in the table against the reference of its op, on all that it does not refuse."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from pyruntime.ops.cache import KvCache
from pyruntime.ops.mlp import MlpAttrs
from pyruntime.ops.step import Rows, SequenceSlice, make_step
from pyruntime.ops.table import OPS
from pyruntime.spec import MLP, Activation, Linear, Norm, NormKind

HIDDEN, FFN = 33, 70


def linear(n_in: int, n_out: int, bias: bool = False) -> Linear:
    return Linear(in_features=n_in, out_features=n_out, bias=bias)


BASE = MlpAttrs(
    MLP(gate=linear(HIDDEN, FFN), up=linear(HIDDEN, FFN), down=linear(FFN, HIDDEN), activation=Activation.SILU),
    norm=Norm(kind=NormKind.RMS, size=HIDDEN, eps=1e-5),
    residual=True,
)
RELU = replace(BASE, mlp=replace(BASE.mlp, activation=Activation.RELU))
PLAIN = replace(BASE, mlp=replace(BASE.mlp, gate=None))
BIASED = replace(BASE, mlp=replace(BASE.mlp, down=linear(FFN, HIDDEN, bias=True)))
LAYER_NORM = replace(BASE, norm=replace(BASE.norm, kind=NormKind.LAYER))  # type: ignore[type-var]


@pytest.mark.parametrize("rows", [1, 5, 19])
@pytest.mark.parametrize("attrs", [BASE, replace(BASE, residual=False)], ids=["residual", "no residual"])
@pytest.mark.parametrize("same", [True, False], ids=["stream", "other residual"])
def test_mlp_equals_the_float64_reference(attrs: MlpAttrs, rows: int, same: bool) -> None:
    reference, cpu = OPS["mlp"]
    assert (reference.target, cpu.target) == ("reference", "cpu")
    assert cpu.refuses(attrs, torch.float32) is None
    generator = torch.Generator().manual_seed(rows)
    weights = {role: torch.randn(shape, generator=generator) for role, shape in attrs.weight_shapes().items()}
    x = torch.randn(rows, HIDDEN, generator=generator)
    residual = [x if same else torch.randn(rows, HIDDEN, generator=generator)] if attrs.residual else []
    view = make_step([SequenceSlice([0] * rows, 0, range(rows), [])], KvCache((), rows, 1, torch.float32)).view(
        Rows.ALL
    )
    (found,) = cpu.run(attrs, weights, [x, *residual], view)
    wide = {role: weight.double() for role, weight in weights.items()}
    (expected,) = reference.run(attrs, wide, [x.double(), *(each.double() for each in residual)], view)
    assert float((found - expected).square().mean() / expected.square().mean()) < 1e-6


@pytest.mark.parametrize(
    "attrs, dtype, why",
    [
        (BASE, torch.bfloat16, "not float32"),
        (RELU, torch.float32, "gated SiLU"),
        (PLAIN, torch.float32, "gated SiLU"),
        (BIASED, torch.float32, "biases"),
        (LAYER_NORM, torch.float32, "RMSNorm"),
        (replace(BASE, norm=None), torch.float32, "RMSNorm"),
    ],
)
def test_what_the_kernel_cannot_run_is_refused_with_its_reason(attrs: MlpAttrs, dtype: torch.dtype, why: str) -> None:
    assert why in str(OPS["mlp"][1].refuses(attrs, dtype))


def test_every_op_has_a_reference_first() -> None:
    assert all(implementations[0].target == "reference" for implementations in OPS.values())
