"""Runs of MLPs on a GPU against the same in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from pyruntime.ops.gpu import mlp_chain as gpu
from pyruntime.ops.gpu.choose import Backend
from pyruntime.ops.gpu.workspace import Workspace
from pyruntime.ops.mlp import MlpAttrs
from pyruntime.ops.mlp_chain import MlpChainAttrs
from pyruntime.spec import MLP, Activation
from tests import naive
from tests.gpu.helpers import DTYPES, NMSE_LIMITS, frame_of, nmse, node_of, random, view_of
from tests.gpu.products import exact, lin, norm_of, run, weights_of

BACKENDS = (Backend.TRITON, Backend.VENDOR)
SIZE = 63


def part_of(hidden: int, activation: Activation = Activation.SILU, gated: bool = True) -> MlpAttrs:
    gate = lin(SIZE, hidden) if gated else None
    mlp = MLP(gate=gate, up=lin(SIZE, hidden), down=lin(hidden, SIZE, bias=True), activation=activation)
    return MlpAttrs(mlp, norm_of(SIZE), residual=True)


# the second part's down is split
CHAIN = MlpChainAttrs((part_of(100), part_of(600, Activation.GELU, gated=False), part_of(24)))


def expected(attrs: MlpChainAttrs, weights: dict[str, Tensor], stream: Tensor) -> Tensor:
    known, x = exact(weights), stream.double().cpu().numpy()
    for i, part in enumerate(attrs.parts):
        normed = naive.norm(part.norm, f"{i}.norm", known, x)
        up = naive.linear(part.mlp.up, f"{i}.up", known, normed)
        gate = up if part.mlp.gate is None else naive.linear(part.mlp.gate, f"{i}.gate", known, normed)
        hidden = naive.activate(part.mlp.activation, gate) * (1.0 if part.mlp.gate is None else up)
        x = x + naive.linear(part.mlp.down, f"{i}.down", known, hidden)
    return torch.from_numpy(x)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 5, 17])
def test_each_part_reads_what_the_one_before_left(rows: int, dtype: torch.dtype, backend: Backend) -> None:
    weights, x = weights_of(CHAIN, dtype), random(rows, SIZE, seed=20)
    before = x.clone()
    step = run(gpu, CHAIN, weights, [x], dtype, backend)
    assert step.intact
    assert nmse(step.found, expected(CHAIN, weights, x)) < NMSE_LIMITS[dtype]
    assert torch.equal(x, before)


def test_a_chain_launches_its_products_and_nothing_else() -> None:
    weights, x = weights_of(CHAIN, torch.bfloat16), random(1, SIZE)
    assert run(gpu, CHAIN, weights, [x], torch.bfloat16).kernels == ["product_kernel"] * 6


def test_a_chain_works_in_the_memory_of_its_widest_mlp() -> None:
    def num_bytes(chain: MlpChainAttrs) -> int:
        """Of scratch memory, for many rows."""
        meta, rows = torch.device("meta"), 300
        weights = {name: torch.empty(0, device=meta) for name in gpu.layouts(chain)}
        for i, part in enumerate(chain.parts):
            hidden = part.mlp.up.out_features
            weights[f"{i}.gate_up"] = torch.empty(2 * hidden, SIZE, device=meta)
            weights[f"{i}.down"] = torch.empty(SIZE, hidden, device=meta)
        stream = torch.empty(rows, SIZE, device=meta)
        frame = frame_of(view_of([1], [1], [[0]]), (stream,), (stream,))
        frame = replace(frame, workspace=Workspace(meta), launcher=lambda *launch: None)
        gpu.on_gpu(chain, node_of(weights, torch.float32, Backend.VENDOR))(frame)
        return frame.workspace.num_bytes

    narrow, wide = part_of(100), part_of(1000)
    assert num_bytes(MlpChainAttrs((narrow, wide, wide, wide))) == num_bytes(MlpChainAttrs((wide,)))
