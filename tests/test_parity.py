"""Law 1: logits equal those of transformers' uncached full forward whose dropped sublayers add zero."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pyruntime.ops import _native
from pyruntime.spec import DropPlan
from tests.helpers import TARGETS, all_logits, hf_logits, make_plan, nmse, relative_error, without

NUM_LAYERS = 4
EVERY = tuple(range(NUM_LAYERS))
# float32 against transformers in float64 with the same weights, over four layers
LIMIT = 1e-5
NMSE_LIMIT = 5e-4

MakeLlama = Callable[..., tuple[Path, Any]]

PATTERNS = {
    "nothing": DropPlan(),
    "first attention": DropPlan(attention=(0,)),
    "last attention": DropPlan(attention=(3,)),
    "middle attentions": DropPlan(attention=(1, 2)),
    "all but first attention": DropPlan(attention=(1, 2, 3)),
    "all attentions": DropPlan(attention=EVERY),
    "first mlp": DropPlan(mlp=(0,)),
    "last mlp": DropPlan(mlp=(3,)),
    "all mlps": DropPlan(mlp=EVERY),
    "first block": DropPlan(attention=(0,), mlp=(0,)),
    "last block": DropPlan(attention=(3,), mlp=(3,)),
    "everything": DropPlan(attention=EVERY, mlp=EVERY),
}
_random = random.Random(0)
for _i in range(6):
    PATTERNS[f"random {_i}"] = DropPlan(
        attention=tuple(i for i in EVERY if _random.random() < 0.5),
        mlp=tuple(i for i in EVERY if _random.random() < 0.5),
    )

# lengths around the borders of pages of 4 and of 16
PROMPT = [(7 * i * i + 3 * i) % 61 for i in range(37)]
RAGGED = [PROMPT[:1], PROMPT[5:8], PROMPT[:16], PROMPT[::-1][:17], PROMPT[3:36], [*PROMPT, 1, 4, 8]]
# how many tokens of each sequence one step takes: all, one (cached decode), and chunks that straddle pages
MODES = {"full": 64, "decode": 1, "chunked": 7}

targets = pytest.mark.parametrize("target", TARGETS)


@targets
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_logits_equal_transformers(make_llama: MakeLlama, pattern: str, mode: str, target: str) -> None:
    folder, hf_model = make_llama()
    oracle = without(hf_model, PATTERNS[pattern]).double()
    plan = make_plan(folder, PATTERNS[pattern], target=target)
    (found,) = all_logits(plan, [PROMPT], MODES[mode])
    assert relative_error(found, hf_logits(oracle, PROMPT)) < LIMIT


@targets
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_ragged_batch_equals_sequences_alone(make_llama: MakeLlama, pattern: str, mode: str, target: str) -> None:
    folder, hf_model = make_llama()
    oracle = without(hf_model, PATTERNS[pattern]).double()
    plan = make_plan(folder, PATTERNS[pattern], target=target)
    for sequence, found in zip(RAGGED, all_logits(plan, RAGGED, MODES[mode]), strict=True):
        assert relative_error(found, hf_logits(oracle, sequence)) < LIMIT


@targets
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_bfloat16_stays_near_float64(make_llama: MakeLlama, pattern: str, mode: str, target: str) -> None:
    """The oracle has the same weights, rounded to bfloat16, and computes in float64."""
    folder, hf_model = make_llama()
    oracle = without(hf_model, PATTERNS[pattern]).to(torch.bfloat16).double()
    plan = make_plan(folder, PATTERNS[pattern], "bfloat16", target=target)
    for sequence, found in zip(RAGGED, all_logits(plan, RAGGED, MODES[mode]), strict=True):
        assert nmse(found, hf_logits(oracle, sequence)) < NMSE_LIMIT


VARIANTS: dict[str, dict[str, Any]] = {
    "multi-head": {"num_key_value_heads": 4},
    "multi-query": {"num_key_value_heads": 1},
    "wide heads": {"head_dim": 24},
    "tied head": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "gelu": {"hidden_act": "gelu"},
    "gelu_tanh": {"hidden_act": "gelu_pytorch_tanh"},
    "relu": {"hidden_act": "relu"},
    "relu2": {"hidden_act": "relu2"},
    "rope linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.5}},
    "rope dynamic": {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 500.0, "factor": 2.0}},
    "rope llama3": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        }
    },
    "rope yarn": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 500.0,
            "factor": 4.0,
            "original_max_position_embeddings": 16,
        }
    },
    "rope yarn with mscale": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 16,
            "beta_fast": 8.0,
            "beta_slow": 0.5,
            "mscale": 0.7,
            "mscale_all_dim": 1.3,
            "truncate": False,
        }
    },
}


@targets
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_form_of_llama_equals_transformers(make_llama: MakeLlama, variant: str, target: str) -> None:
    folder, hf_model = make_llama(**VARIANTS[variant])
    pattern = DropPlan(attention=(0, 2), mlp=(1,))
    long = [(7 * i) % 61 for i in range(40)]
    for plan, oracle in ((DropPlan(), without(hf_model, DropPlan())), (pattern, without(hf_model, pattern))):
        lowered = make_plan(folder, plan, target=target)
        for chunk in (64, 7):
            (found,) = all_logits(lowered, [long], chunk)
            # a square doubles every relative error, once a layer
            limit = 2 * LIMIT if variant == "relu2" else LIMIT
            assert relative_error(found, hf_logits(oracle.double(), long)) < limit


@pytest.mark.parametrize(
    "target, dtype, limit",
    [
        ("reference", "bfloat16", 5e-4),
        ("reference", "float16", 5e-4),
        ("reference", "float64", 1e-10),
        ("cpu", "bfloat16", 5e-4),
    ],
)
def test_other_dtypes_stay_near_float64(make_llama: MakeLlama, dtype: str, limit: float, target: str) -> None:
    """The oracle has the weights before they were rounded."""
    folder, hf_model = make_llama()
    pattern = DropPlan(attention=(0, 2))
    expected = hf_logits(without(hf_model, pattern).double(), PROMPT)
    (found,) = all_logits(make_plan(folder, pattern, dtype, target=target), [PROMPT], 3)
    assert nmse(found, expected) < limit


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("isa", _native.load().module.isa_available())
@pytest.mark.parametrize("pattern", ["nothing", "random 0", "all attentions", "last block"])
def test_every_cpu_path(
    make_llama: MakeLlama, monkeypatch: pytest.MonkeyPatch, pattern: str, isa: str, dtype: str
) -> None:
    monkeypatch.setenv("PYRUNTIME_CPU_ISA", isa)
    folder, hf_model = make_llama()
    oracle = without(hf_model, PATTERNS[pattern])
    oracle = oracle.to(torch.bfloat16).double() if dtype == "bfloat16" else oracle.double()
    plan = make_plan(folder, PATTERNS[pattern], dtype, target="cpu")
    for chunk in MODES.values():
        for sequence, found in zip(RAGGED, all_logits(plan, RAGGED, chunk), strict=True):
            expected = hf_logits(oracle, sequence)
            if dtype == "bfloat16":
                assert nmse(found, expected) < NMSE_LIMIT
            else:
                assert relative_error(found, expected) < LIMIT
