"""RMSNorm and LayerNorm on a GPU against their formulas in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from pyruntime.ops.gpu.norm import launch_norm, layouts, on_gpu, refuses
from pyruntime.ops.layout import arrange
from pyruntime.ops.norm import NormAttrs
from pyruntime.spec import Norm, NormKind
from tests.gpu.helpers import DTYPES, NMSE_LIMITS, Guarded, frame_of, guarded, nmse, node_of, random, view_of

ONE_PLUS = (NormKind.RMS_ONE_PLUS, NormKind.LAYER_ONE_PLUS)


def norm_of(size: int, kind: NormKind = NormKind.RMS, *, weight: bool = True, bias: bool = False) -> Norm:
    return Norm(kind=kind, size=size, eps=1e-3, weight=weight, bias=bias)


def weights_of(norm: Norm) -> dict[str, Tensor]:
    """As a checkpoint stores them."""
    stored = {"weight": random(norm.size, seed=5, scale=0.3), "bias": random(norm.size, seed=6)}
    return {role: stored[role] for role in NormAttrs(norm).weight_shapes()}


def arranged(norm: Norm, stored: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: guarded(arrange(layout, [stored[str(role)] for role in layout.sources]))
        for name, layout in layouts(NormAttrs(norm)).items()
    }


def formula(norm: Norm, x: Tensor, stored: dict[str, Tensor]) -> Tensor:
    x = x.double()
    if norm.kind in (NormKind.LAYER, NormKind.LAYER_ONE_PLUS):
        x = x - x.sum(1, keepdim=True) / norm.size
    y = x / (x.pow(2).sum(1, keepdim=True) / norm.size + norm.eps).sqrt()
    if "weight" in stored:
        y = y * (stored["weight"].double() + (norm.kind in ONE_PLUS))
    return y + stored["bias"].double() if "bias" in stored else y


def run(norm: Norm, x: Tensor, out_dtype: torch.dtype, residual: Tensor | None = None) -> tuple[Tensor, Tensor, bool]:
    """What is found, what is expected, and whether nothing else was written."""
    stored = weights_of(norm)
    out = Guarded(x.shape, out_dtype)
    expected = formula(norm, x, stored) + (0.0 if residual is None else residual.double())
    view = view_of([x.shape[0]], [x.shape[0]], [[0]])
    launch_norm(frame_of(view, (x,), (out.inside,)), norm, arranged(norm, stored), "norm", x, out.inside, residual)
    return out.inside, expected, out.intact


@pytest.mark.parametrize("kind", NormKind)
@pytest.mark.parametrize("size", [1, 24, 63, 100, 1000, 9000])
def test_norm_is_its_formula_at_any_width(kind: NormKind, size: int) -> None:
    norm = norm_of(size, kind, bias=kind in (NormKind.LAYER, NormKind.LAYER_ONE_PLUS))
    found, expected, intact = run(norm, random(3, size), torch.float32)
    assert intact
    assert nmse(found, expected) < NMSE_LIMITS[torch.float32]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("out_dtype", DTYPES)
def test_input_and_output_have_any_dtype(dtype: torch.dtype, out_dtype: torch.dtype) -> None:
    found, expected, intact = run(norm_of(100), random(5, 100, dtype=dtype), out_dtype)
    assert intact
    assert nmse(found, expected) < NMSE_LIMITS[out_dtype]


@pytest.mark.parametrize("weight", [True, False])
def test_absent_gain_or_bias_is_not_read(weight: bool) -> None:
    norm = norm_of(24, NormKind.LAYER, weight=weight, bias=not weight)
    found, expected, _ = run(norm, random(3, 24), torch.float32)
    assert nmse(found, expected) < NMSE_LIMITS[torch.float32]


@pytest.mark.parametrize("kind", [NormKind.RMS, NormKind.LAYER])
def test_squares_beyond_float16_do_not_overflow(kind: NormKind) -> None:
    found, expected, _ = run(norm_of(63, kind), random(3, 63, dtype=torch.float16, scale=9000.0), torch.float16)
    assert nmse(found, expected) < NMSE_LIMITS[torch.float16]


def test_layer_norm_keeps_the_variance_beside_a_large_mean() -> None:
    x = random(3, 1000) + 1000.0
    found, expected, _ = run(norm_of(1000, NormKind.LAYER), x, torch.float32)
    # the inputs' own last place is 6e-5 of the spread; a difference of mean squares would be lost
    assert nmse(found, expected) < NMSE_LIMITS[torch.float32]


@pytest.mark.parametrize("size", [63, 9000])
def test_residual_is_added_behind_and_may_be_the_output(size: int) -> None:
    norm, x, residual = norm_of(size), random(3, size), random(3, size, seed=2)
    expected = run(norm, x, torch.float32, residual)
    assert nmse(*expected[:2]) < NMSE_LIMITS[torch.float32]
    held = guarded(residual)
    frame = frame_of(view_of([3], [3], [[0]]), (x,), (held,))
    launch_norm(frame, norm, arranged(norm, weights_of(norm)), "norm", x, held, held)
    assert torch.equal(held, expected[0])


def test_rows_may_be_parts_of_longer_ones() -> None:
    norm, x = norm_of(24), random(5, 60)
    found, expected, _ = run(norm, x[:, 7:31], torch.float32)
    assert nmse(found, expected) < NMSE_LIMITS[torch.float32]


@pytest.mark.parametrize("residual", [True, False])
def test_node_reads_its_inputs_and_writes_its_output(residual: bool) -> None:
    attrs = NormAttrs(replace(norm_of(24), kind=NormKind.RMS_ONE_PLUS), residual)
    stored, x, other, out = (
        weights_of(attrs.norm),
        random(5, 24),
        random(5, 24, seed=3),
        Guarded((5, 24), torch.float32),
    )
    inputs = (x, other) if residual else (x,)
    launch = on_gpu(attrs, node_of(arranged(attrs.norm, stored), torch.float32))
    launch(frame_of(view_of([5], [5], [[0]]), inputs, (out.inside,)))
    expected = formula(attrs.norm, x, stored) + (other.double() if residual else 0.0)
    assert out.intact
    assert nmse(out.inside, expected) < NMSE_LIMITS[torch.float32]


def test_only_float64_is_refused() -> None:
    attrs = NormAttrs(norm_of(24))
    assert [refuses(attrs, dtype) for dtype in DTYPES] == [None] * 3
    assert refuses(attrs, torch.float64) == "float64 is not computed on a GPU"
