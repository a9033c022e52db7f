"""Law 1: logits equal those of transformers' uncached full forward whose dropped sublayers add zero."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pyruntime.spec import DropPlan
from tests.helpers import all_logits, hf_logits, make_plan, relative_error, without

NUM_LAYERS = 4
EVERY = tuple(range(NUM_LAYERS))
# float32 against float32 with another order of sums, over four layers
LIMIT = 1e-5

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

PROMPT = [3, 17, 60, 0, 5, 5, 41, 22, 9, 33, 12]
RAGGED = [PROMPT, [7], [50, 2, 3], [*PROMPT[::-1], 1, 4], [8, 8, 8, 8]]
# how many tokens of each sequence one step takes: all, one (cached decode), and chunks that straddle pages
MODES = {"full": 64, "decode": 1, "chunked": 3}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_logits_equal_transformers(make_llama: Callable[..., tuple[Path, Any]], pattern: str, mode: str) -> None:
    folder, hf_model = make_llama()
    oracle = without(hf_model, PATTERNS[pattern])
    plan = make_plan(folder, PATTERNS[pattern])
    (found,) = all_logits(plan, [PROMPT], MODES[mode])
    assert relative_error(found, hf_logits(oracle, PROMPT)) < LIMIT


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_ragged_batch_equals_sequences_alone(
    make_llama: Callable[..., tuple[Path, Any]], pattern: str, mode: str
) -> None:
    folder, hf_model = make_llama()
    oracle = without(hf_model, PATTERNS[pattern])
    plan = make_plan(folder, PATTERNS[pattern])
    for sequence, found in zip(RAGGED, all_logits(plan, RAGGED, MODES[mode]), strict=True):
        assert relative_error(found, hf_logits(oracle, sequence)) < LIMIT


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


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_form_of_llama_equals_transformers(make_llama: Callable[..., tuple[Path, Any]], variant: str) -> None:
    folder, hf_model = make_llama(**VARIANTS[variant])
    pattern = DropPlan(attention=(0, 2), mlp=(1,))
    long = [(7 * i) % 61 for i in range(40)]
    for plan, oracle in ((DropPlan(), hf_model), (pattern, without(hf_model, pattern))):
        for chunk in (64, 7):
            (found,) = all_logits(make_plan(folder, plan), [long], chunk)
            assert relative_error(found, hf_logits(oracle, long)) < LIMIT


@pytest.mark.parametrize("dtype, limit", [("bfloat16", 5e-4), ("float16", 5e-4), ("float64", 1e-10)])
def test_other_dtypes_stay_near_float64(make_llama: Callable[..., tuple[Path, Any]], dtype: str, limit: float) -> None:
    folder, hf_model = make_llama()
    pattern = DropPlan(attention=(0, 2))
    expected = hf_logits(without(hf_model, pattern).double(), PROMPT)
    (found,) = all_logits(make_plan(folder, pattern, dtype), [PROMPT], 3)
    nmse = float((found.double() - expected).square().mean() / expected.square().mean())
    assert nmse < limit
