"""Law 1 on target cuda, over less than tests/test_parity.py asks of a GPU: launches are dear in the interpreter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pyruntime.graph import build, fuse
from pyruntime.plan import lower
from pyruntime.spec import DropPlan, ModelSpec
from tests import naive
from tests.helpers import all_logits, hf_logits, make_plan, nmse, relative_error, without
from tests.specs import (
    ATTENTION,
    EXPERTS,
    ODD_MODELS,
    PLAIN_MLP,
    SLIM_ATTENTIONS,
    as_arrays,
    model_of,
    random_model,
    random_weights,
)
from tests.test_parity import LIMIT, NMSE_LIMIT, PATTERNS, PROMPT, VARIANTS

MakeLlama = Callable[..., tuple[Path, Any]]
# a page and a bit, in two steps of chunked prefill, or prefill and then decoding
RAGGED = [PROMPT[:1], PROMPT[:18], PROMPT[5:20]]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_chunked_prefill_equals_transformers(make_llama: MakeLlama, pattern: str) -> None:
    folder, hf_model = make_llama()
    oracle = without(hf_model, PATTERNS[pattern]).double()
    plan = make_plan(folder, PATTERNS[pattern], target="cuda")
    assert {step.implementation.target for step in plan.steps} == {"cuda"}
    for sequence, found in zip(RAGGED, all_logits(plan, RAGGED, 10), strict=True):
        assert relative_error(found, hf_logits(oracle, sequence)) < LIMIT


@pytest.mark.parametrize("pattern", ["nothing", "first attention", "all attentions", "last block", "random 1"])
def test_decoding_equals_transformers(make_llama: MakeLlama, pattern: str) -> None:
    folder, hf_model = make_llama()
    oracle = without(hf_model, PATTERNS[pattern]).double()
    plan = make_plan(folder, PATTERNS[pattern], target="cuda")
    short = [PROMPT[:4], PROMPT[3:6]]
    for sequence, found in zip(short, all_logits(plan, short, 1), strict=True):
        assert relative_error(found, hf_logits(oracle, sequence)) < LIMIT


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("pattern", ["nothing", "first attention", "random 1"])
def test_narrow_dtypes_stay_near_float64(make_llama: MakeLlama, pattern: str, dtype: str) -> None:
    folder, hf_model = make_llama()
    oracle = without(hf_model, PATTERNS[pattern]).to(getattr(torch, dtype)).double()
    plan = make_plan(folder, PATTERNS[pattern], dtype, target="cuda")
    for sequence, found in zip(RAGGED, all_logits(plan, RAGGED, 10), strict=True):
        assert nmse(found, hf_logits(oracle, sequence)) < NMSE_LIMIT


@pytest.mark.parametrize("variant", ["multi-query", "wide heads", "biases", "relu2", "rope yarn"])
def test_forms_of_llama_equal_transformers(make_llama: MakeLlama, variant: str) -> None:
    folder, hf_model = make_llama(**VARIANTS[variant])
    pattern = DropPlan(attention=(0, 2), mlp=(1,))
    (found,) = all_logits(make_plan(folder, pattern, target="cuda"), [PROMPT[:18]], 16)
    # a square doubles every relative error, once a layer
    limit = 2 * LIMIT if variant == "relu2" else LIMIT
    assert relative_error(found, hf_logits(without(hf_model, pattern).double(), PROMPT[:18])) < limit


def check(spec: ModelSpec, targets: set[str], chunk: int = 12) -> None:
    """The plan of a specification against the naive transformer in float64, unfused and fused."""
    tokens = [(5 * i * i + 3 * i) % 37 for i in range(18)]
    model = random_model(spec, torch.float32)
    expected = torch.from_numpy(naive.logits(spec, as_arrays(random_weights(spec, torch.float32)), tokens))
    for graph in (build(spec), fuse(build(spec))):
        plan = lower(graph, model, dtype="float32", target="cuda")
        assert {step.implementation.target for step in plan.steps} == targets
        (found,) = all_logits(plan, [tokens], chunk)
        assert relative_error(found, expected) < LIMIT


@pytest.mark.parametrize("name", ODD_MODELS)
def test_odd_models_equal_the_naive_transformer(name: str) -> None:
    check(ODD_MODELS[name], {"cuda"})


@pytest.mark.parametrize("name", ["keys", "inputs, norms and biases"])
def test_slim_attention_runs_beside_kernels(name: str) -> None:
    check(model_of([(SLIM_ATTENTIONS[name], PLAIN_MLP, False), (ATTENTION, None, False)]), {"cuda", "reference"})


def test_experts_run_beside_kernels() -> None:
    spec = model_of([(ATTENTION, EXPERTS, False)])
    model, graph = random_model(spec, torch.float32), fuse(build(spec))
    # the naive transformer has no experts; the reference's are judged by transformers
    (expected,) = all_logits(lower(graph, model, dtype="float64"), [[5, 0, 36, 11, 2, 30]], 6)
    plan = lower(graph, model, dtype="float32", target="cuda")
    assert {step.implementation.target for step in plan.steps} == {"cuda", "reference"}
    (found,) = all_logits(plan, [[5, 0, 36, 11, 2, 30]], 6)
    assert relative_error(found, expected) < LIMIT
