"""Whole models on the CUDA C++ kernels: on a GPU, or on their host twin."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pyruntime.errors import UsageError
from pyruntime.ops.gpu import compiled
from pyruntime.spec import DropPlan
from tests.gpu.helpers import INTERPRETED
from tests.gpu.twin import twin
from tests.helpers import all_logits, hf_logits, make_plan, nmse, without
from tests.test_parity import NMSE_LIMIT, PROMPT

MakeLlama = Callable[..., tuple[Path, Any]]
RAGGED = [PROMPT[:1], PROMPT[:4], PROMPT[5:8]]


@pytest.fixture
def _cuda_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that CUDA C++ can run is run by it."""
    monkeypatch.setenv("PYRUNTIME_GPU_KERNELS", "cuda")
    if INTERPRETED:
        monkeypatch.setenv("PYRUNTIME_CUDA_TWIN", twin().__file__)
    elif compiled.load(False) is None:
        pytest.skip("the CUDA extension was not built")


@pytest.mark.usefixtures("_cuda_kernels")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("chunk", [3, 1])
def test_logits_stay_near_float64(make_llama: MakeLlama, chunk: int, dtype: str) -> None:
    folder, hf_model = make_llama(head_dim=64, num_hidden_layers=3)
    pattern = DropPlan(attention=(1,))
    oracle = without(hf_model, pattern).to(getattr(torch, dtype)).double()
    plan = make_plan(folder, pattern, dtype, target="cuda")
    said = plan.explain()
    assert said.count("cuda beyond (asked for)") == len([s for s in plan.steps if s.node.op not in ("embed", "gather")])
    for sequence, found in zip(RAGGED, all_logits(plan, RAGGED, chunk), strict=True):
        assert nmse(found, hf_logits(oracle, sequence)) < NMSE_LIMIT


@pytest.mark.usefixtures("_cuda_kernels")
def test_what_they_refuse_is_said_and_run_by_triton(make_llama: MakeLlama) -> None:
    plan = make_plan(make_llama()[0], target="cuda")
    assert "triton beyond (cuda refused: its weights are float32, not bfloat16 or float16)" in plan.explain()


@pytest.mark.skipif(not INTERPRETED, reason="the extension may be there on a GPU")
def test_asking_for_what_was_not_built_is_an_error(make_llama: MakeLlama, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYRUNTIME_GPU_KERNELS", "cuda")
    monkeypatch.delenv("PYRUNTIME_CUDA_TWIN", raising=False)
    with pytest.raises(UsageError, match="_C_cuda is not built"):
        make_plan(make_llama()[0], target="cuda")
