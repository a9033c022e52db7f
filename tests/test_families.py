"""Law 1 for every family: logits equal those of transformers' uncached forward whose dropped sublayers add zero."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from pyruntime.checkpoint import read_model
from pyruntime.checkpoint.families import FAMILIES
from pyruntime.graph import build
from pyruntime.plan import lower
from pyruntime.spec import DropPlan
from tests import families
from tests.families import MIXTURES, NUM_LAYERS, VARIANTS, without
from tests.helpers import TARGETS, all_logits, hf_logits, make_plan, nmse, relative_error

# float32 against transformers in float64 with the same weights, over four layers
LIMIT = 1e-5
NMSE_LIMIT = 5e-4
EVERY = tuple(range(NUM_LAYERS))
PATTERNS = {
    "nothing": DropPlan(),
    "first attention": DropPlan(attention=(0,)),
    "last attention": DropPlan(attention=(3,)),
    "all attentions": DropPlan(attention=EVERY),
    "all mlps": DropPlan(mlp=EVERY),
    "outer blocks": DropPlan(attention=(0, 3), mlp=(0, 3)),
    "mixed": DropPlan(attention=(1, 2), mlp=(0, 2)),
    "everything": DropPlan(attention=EVERY, mlp=EVERY),
}
PROMPT = [(7 * i * i + 3 * i) % 61 for i in range(37)]
# lengths around the borders of pages of 4 and of 16
RAGGED = [PROMPT[:1], PROMPT[5:8], PROMPT[:16], PROMPT[::-1][:17], PROMPT]
# how many tokens of each sequence one step takes: all, one (cached decode), and chunks that straddle pages
MODES = {"full": 64, "decode": 1, "chunked": 7}


@dataclass(frozen=True)
class Judge:
    """A checkpoint folder, and transformers' logits of the ragged sequences by what is dropped and by dtype."""

    folder: Path
    mixture: bool
    expected: Callable[[DropPlan, torch.dtype], list[torch.Tensor]]


@pytest.fixture(scope="module", params=list(VARIANTS))
def judge(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Judge:
    variant = VARIANTS[request.param]
    folder = tmp_path_factory.mktemp("family")
    hf_model = families.make(variant, folder)

    @functools.cache
    def expected(plan: DropPlan, dtype: torch.dtype) -> list[torch.Tensor]:
        oracle = without(variant, hf_model, plan).to(dtype).double()
        return [hf_logits(oracle, sequence) for sequence in RAGGED]

    return Judge(folder, variant.name in MIXTURES, expected)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_logits_equal_transformers(judge: Judge, pattern: str, target: str) -> None:
    """Full forward, cached decode and chunked prefill of a ragged batch; and of one sequence alone."""
    plan = make_plan(judge.folder, PATTERNS[pattern], target=target)
    expected = judge.expected(PATTERNS[pattern], torch.float32)
    for mode, chunk in MODES.items():
        for found, logits in zip(all_logits(plan, RAGGED, chunk), expected, strict=True):
            assert relative_error(found, logits) < LIMIT, mode
    (alone,) = all_logits(plan, [PROMPT], MODES["full"])
    assert relative_error(alone, expected[-1]) < LIMIT


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("pattern", ["nothing", "mixed"])
def test_bfloat16_stays_near_float64(judge: Judge, pattern: str, target: str) -> None:
    """The oracle has the same weights, rounded to bfloat16, and computes in float64."""
    plan = make_plan(judge.folder, PATTERNS[pattern], "bfloat16", target=target)
    for found, logits in zip(
        all_logits(plan, RAGGED, 7), judge.expected(PATTERNS[pattern], torch.bfloat16), strict=True
    ):
        if judge.mixture:
            # rounding may turn a near tie between two experts around, and then that row is another one
            by_row = torch.stack([torch.tensor(nmse(*rows)) for rows in zip(found, logits, strict=True)])
            assert by_row.quantile(0.75) < NMSE_LIMIT
        else:
            assert nmse(found, logits) < NMSE_LIMIT


def test_nothing_of_a_family_is_left_unread(judge: Judge) -> None:
    """Neither a key of the configuration nor a byte of the dense model's files."""
    model = read_model(judge.folder)
    assert not [note for note in model.notes if "longrope" not in note]
    lower(build(model.spec), model)
    stored = (judge.folder / "model.safetensors").stat().st_size
    header = 8 + int.from_bytes((judge.folder / "model.safetensors").read_bytes()[:8], "little")
    assert model.bytes_read == model.weight_bytes == stored - header


def test_every_family_has_a_variant() -> None:
    prefixes: dict[str, Any] = {
        "gpt_neox": "GPTNeoX",
        "gemma3_text": "Gemma3",
        "bitnet": "BitNet",
        "gpt2": "GPT2",
        "qwen2_moe": "Qwen2Moe",
    }
    names = {prefixes.get(model_type, model_type.capitalize()) for model_type in FAMILIES}
    # Llama's own variants are in test_parity; what transformers does not have, in tests of the checkpoints
    elsewhere = {"Llama", "Nemotron-nas", "Deci", "Baichuan", "Deepseek"}
    assert names - elsewhere == {variant.name for variant in VARIANTS.values()}
