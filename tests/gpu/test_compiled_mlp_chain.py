"""Runs of MLPs in one CUDA launch against float64; where there is no GPU, in its host twin."""

from __future__ import annotations

import importlib
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from pyruntime.ops.gpu.compiled_mlp_chain import most_rows, refused, run_chain
from pyruntime.ops.gpu.mlp_chain import layouts
from pyruntime.ops.layout import arrange
from pyruntime.ops.mlp import MlpAttrs
from pyruntime.ops.mlp_chain import MlpChainAttrs
from pyruntime.spec import MLP, Activation, Norm, NormKind
from tests import naive
from tests.gpu.helpers import INTERPRETED, NMSE_LIMITS, Guarded, frame_of, guarded, nmse, node_of, random, view_of
from tests.gpu.products import exact, lin, norm_of, weights_of
from tests.gpu.twin import twin

# sums of a block's warps: 16 warps of 32 lanes with 8 elements each
WARPS, LANES = 16, 32


def compiled() -> Any:
    """The CUDA module, or its twin."""
    return twin() if INTERPRETED else importlib.import_module("pyruntime._C_cuda")


def part_of(
    width: int,
    hidden: int,
    activation: Activation = Activation.SILU,
    norm: Norm | None = None,
    bias: bool = False,
    gated: bool = True,
) -> MlpAttrs:
    gate = lin(width, hidden, bias) if gated else None
    mlp = MLP(gate=gate, up=lin(width, hidden, bias), down=lin(hidden, width, bias), activation=activation)
    return MlpAttrs(mlp, norm, residual=True)


def chain_of(width: int, *hidden: int, **options: Any) -> MlpChainAttrs:
    return MlpChainAttrs(tuple(part_of(width, each, norm=norm_of(width), **options) for each in hidden))


def expected(attrs: MlpChainAttrs, weights: dict[str, Tensor], stream: Tensor) -> Tensor:
    known, x = exact(weights), stream.double().cpu().numpy()
    for i, part in enumerate(attrs.parts):
        normed = naive.norm(part.norm, f"{i}.norm", known, x)
        gate, up = (naive.linear(each, f"{i}.{role}", known, normed) for role, each in _inner(part.mlp).items())
        hidden = naive.activate(part.mlp.activation, gate) * up
        x = x + naive.linear(part.mlp.down, f"{i}.down", known, hidden)
    return torch.from_numpy(x)


def _inner(mlp: MLP) -> dict[str, Any]:
    return {"gate": mlp.gate, "up": mlp.up}


def run(
    attrs: MlpChainAttrs,
    weights: dict[str, Tensor],
    x: Tensor,
    dtype: torch.dtype,
    module: Any = None,
    in_place: bool = False,
) -> Tensor:
    """What the kernel makes of it, surroundings and counters checked."""
    arranged = {
        name: guarded(arrange(layout, [None if role is None else weights[role] for role in layout.sources]))
        for name, layout in layouts(attrs).items()
    }
    rows, made = x.shape[0], Guarded(x.shape, torch.float32)
    if in_place:
        made.inside.copy_(x)
    before = x.clone()
    frame = frame_of(
        view_of([1] * rows, [1] * rows, [[0]] * rows, decode=True), (made.inside if in_place else x,), (made.inside,)
    )
    run_chain(module or compiled(), attrs, node_of(arranged, dtype), frame)
    assert made.intact and torch.equal(x, before)
    assert not frame.counters(4096).any()
    return made.inside


def check(attrs: MlpChainAttrs, rows: int, dtype: torch.dtype = torch.bfloat16, scale: float = 1.0) -> None:
    weights, x = weights_of(attrs, dtype), random(rows, attrs.parts[0].mlp.in_size, seed=20, scale=scale)
    found = run(attrs, weights, x, dtype)
    # what the MLPs add must be right too, which is small beside a large stream
    added = expected(attrs, weights, x) - x.double().cpu()
    assert nmse(found.double().cpu() - x.double().cpu(), added) < NMSE_LIMITS[dtype]


@pytest.mark.parametrize("rows", [1, 2, 3, 4])
@pytest.mark.parametrize(
    ("hidden", "dtype"),
    [((40,), torch.float16), ((104, 24), torch.bfloat16), ((24, 136, 8), torch.float16)],
)
def test_chains_of_any_length_match_float64(hidden: tuple[int, ...], dtype: torch.dtype, rows: int) -> None:
    check(chain_of(72, *hidden), rows, dtype)


# the larger sizes take a thread more than the loads that it has under way at once
@pytest.mark.parametrize(
    ("width", "hidden", "rows"),
    [(8, 8, 1), (8, 8, 4), (8, 264, 4), (264, 8, 3), (1040, 64, 1), (1040, 64, 4), (64, 2064, 1), (64, 1040, 3)],
)
def test_any_multiples_of_8_match(width: int, hidden: int, rows: int) -> None:
    check(chain_of(width, hidden), rows)


@pytest.mark.parametrize("activation", list(Activation))
def test_every_activation_matches(activation: Activation) -> None:
    check(chain_of(64, 64, activation=activation), 2)


def test_biases_are_added() -> None:
    check(chain_of(64, 40, 24, bias=True), 3)


@pytest.mark.parametrize(
    "norm",
    [None, norm_of(64, weight=False), norm_of(64, NormKind.RMS_ONE_PLUS)],
    ids=["none", "weightless", "one plus"],
)
def test_norms_match(norm: Norm | None) -> None:
    check(MlpChainAttrs((part_of(64, 40, norm=norm), part_of(64, 24, norm=norm))), 2)


def test_a_large_stream_does_not_overflow_float16() -> None:
    check(chain_of(64, 40), 2, torch.float16, scale=30000.0)


def test_blocks_in_any_order_give_the_same_bits() -> None:
    attrs = chain_of(136, 104, 40)
    weights, x = weights_of(attrs, torch.bfloat16), random(2, 136)
    once = run(attrs, weights, x, torch.bfloat16)
    for seed in (1, 2):
        if INTERPRETED:
            twin().set_order(seed=seed)
        again = run(attrs, weights, x, torch.bfloat16)
        if INTERPRETED:
            twin().set_order()
        assert torch.equal(again, once)


def test_a_chain_of_many_layers_is_several_launches() -> None:
    attrs = chain_of(16, 8, 16, 24, 16, 8)
    weights, x = weights_of(attrs, torch.bfloat16), random(1, 16, seed=3)
    calls: list[int] = []

    class FewerLayers:
        mlp_chain_most_layers = 2

        @staticmethod
        def mlp_chain(**arguments: Any) -> None:
            calls.append(len(arguments["layers"]))
            compiled().mlp_chain(**arguments)

    found = run(attrs, weights, x, torch.bfloat16, FewerLayers)
    assert calls == [2, 2, 1]
    assert torch.equal(found, run(attrs, weights, x, torch.bfloat16))
    assert compiled().mlp_chain_most_layers >= 32


def test_the_stream_may_stay_in_its_place() -> None:
    attrs = chain_of(72, 40, 24)
    weights, x = weights_of(attrs, torch.bfloat16), random(2, 72)
    once = run(attrs, weights, x, torch.bfloat16)
    assert torch.equal(run(attrs, weights, x, torch.bfloat16, in_place=True), once)


def test_every_unit_belongs_to_one_block() -> None:
    for units, blocks in itertools.product((0, 1, 7, 40, 131, 132, 4864), (1, 3, 132)):
        own = [compiled().mlp_chain_units(units=units, blocks=blocks, block=block) for block in range(blocks)]
        assert own[0][0] == 0 and own[-1][1] == units
        assert all(left[1] == right[0] for left, right in itertools.pairwise(own))
        assert max(end - begin for begin, end in own) <= -(-units // blocks)


def test_every_word_belongs_to_one_slice() -> None:
    for words, bits in itertools.product((1, 2, 15, 16, 112, 608, 1792), range(5)):
        slices = compiled().mlp_chain_slices(words=words, bits=bits)
        assert [word for begin, end in slices for word in range(begin, end)] == list(range(words))
        assert len(slices) == 2**bits


def test_the_cost_is_what_the_busiest_warp_does() -> None:
    for units, words, bits in itertools.product((1, 7, 37, 109), (1, 32, 33, 112, 608), range(5)):
        slices = compiled().mlp_chain_slices(words=words, bits=bits)
        longest = max(len(range(begin, end, LANES)) for begin, end in slices)
        jobs = units * len(slices)
        cost = compiled().mlp_chain_cost(units=units, words=words, bits=bits)
        assert cost == len(range(0, jobs, WARPS)) * (longest + 1)


def test_slices_are_as_few_as_cost_the_least() -> None:
    for units, words in itertools.product((1, 2, 7, 16, 37, 109), (1, 33, 112, 512, 608, 1792)):
        costs = [compiled().mlp_chain_cost(units=units, words=words, bits=bits) for bits in range(5)]
        assert compiled().mlp_chain_slice_bits(units=units, words=words) == costs.index(min(costs))


def llama(width: int, hidden: int) -> MlpChainAttrs:
    return chain_of(width, hidden)


@pytest.mark.parametrize(
    ("width", "hidden", "rows"), [(896, 4864, 4), (2048, 8192, 4), (4096, 14336, 4), (8192, 28672, 2)]
)
def test_rows_of_real_models_fit(width: int, hidden: int, rows: int) -> None:
    assert most_rows(compiled(), llama(width, hidden), 132) == rows


@pytest.mark.parametrize(
    ("attrs", "dtype", "why"),
    [
        (chain_of(64, 64), torch.float32, "float32"),
        (chain_of(63, 64), torch.bfloat16, "multiple of 8"),
        (chain_of(64, 100), torch.bfloat16, "multiple of 8"),
        (chain_of(64, 64, gated=False), torch.bfloat16, "without a gate"),
        (MlpChainAttrs((part_of(64, 64, norm=norm_of(64, NormKind.LAYER)),)), torch.bfloat16, "layer"),
        (chain_of(64, 1 << 18), torch.bfloat16, "does not fit"),
    ],
)
def test_it_says_what_it_cannot_run(attrs: MlpChainAttrs, dtype: torch.dtype, why: str) -> None:
    assert why in (refused(compiled(), attrs, dtype, 132) or "")
    assert refused(compiled(), chain_of(64, 64), torch.bfloat16, 132) is None


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"rows": 5}, "rows is 5"),
        ({"width": 60}, "multiple of 8"),
        ({"x": 8}, "aligned"),
        ({"hidden": 0}, "null pointer"),
        ({"x_stride": 60}, "row stride 60"),
        ({"dtype": "float32"}, "float32"),
        ({"layers": []}, "layers is 0"),
    ],
)
def test_the_launcher_raises_instead_of_launching_nonsense(change: dict[str, Any], why: str) -> None:
    layer = {
        "gate_up": 256, "down": 256, "gain": 0, "gate_up_bias": 0, "down_bias": 0, "hidden": 64, "activation": "silu",
        "norm": True, "eps": 1e-5,
    }  # fmt: skip
    good = {
        "x": 256, "out": 256, "hidden": 256, "counters": 256, "x_stride": 64, "out_stride": 64, "rows": 1, "width": 64,
        "layers": [layer], "blocks": 4, "prefetch_bytes": 0, "dtype": "bfloat16", "stream": 0,
    }  # fmt: skip
    with pytest.raises(ValueError, match=why):
        compiled().mlp_chain(**{**good, **change})
