"""The model that ships with the project is what its card and the demo promise."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from pyruntime.cli.main import run
from pyruntime.engine.load import DropOptions, load
from pyruntime.evaluate import perplexity, windows

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
MODEL = EXAMPLES / "novels-5m"
HELD_OUT = EXAMPLES / "held_out.txt"
NUM_BYTES = 12_000


def test_it_is_a_deep_grouped_query_llama_of_at_most_12_megabytes() -> None:
    spec = load(MODEL).model.spec
    assert len(spec.layers) >= 12
    assert all(attention.num_kv_heads < attention.num_heads for _, attention in spec.attentions())
    assert (MODEL / "model.safetensors").stat().st_size <= 12_000_000


def test_it_is_as_its_manifest_says(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["verify", str(MODEL)]) == 0
    assert capsys.readouterr().out.startswith("OK: ")


def test_held_out_bits_per_byte_are_those_of_transformers_and_under_the_bar() -> None:
    from transformers import AutoModelForCausalLM

    loaded = load(MODEL, dtype="float32")
    assert loaded.tokenizer is not None
    text = HELD_OUT.read_text(encoding="utf-8")[:NUM_BYTES]
    ids = loaded.tokenizer.encode(text)
    pieces = windows(ids[1:], loaded.model.spec.max_position, bos=ids[0])
    found = perplexity(loaded.plan, pieces)
    hf_model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    nll = 0.0
    for piece in pieces:
        with torch.no_grad():
            logits = hf_model(torch.tensor([piece[:-1]]), use_cache=False).logits[0]
        nll += float(torch.nn.functional.cross_entropy(logits.double(), torch.tensor(piece[1:]), reduction="sum"))
    assert found.nll == pytest.approx(nll, rel=1e-5)
    num_bytes = len(text.encode())
    assert found.bits_per_byte(num_bytes) == pytest.approx(nll / math.log(2) / num_bytes)
    assert found.bits_per_byte(num_bytes) < 2.2


def test_dropping_the_demos_attentions_costs_quality_but_not_sense() -> None:
    dense, pruned = (load(MODEL, drops=DropOptions(drop_attn=which), dtype="float32") for which in (None, "1,8,10,11"))
    assert dense.tokenizer is not None
    ids = dense.tokenizer.encode(HELD_OUT.read_text(encoding="utf-8")[:NUM_BYTES])
    pieces = windows(ids[1:], 512, bos=ids[0])
    price = perplexity(pruned.plan, pieces).value / perplexity(dense.plan, pieces).value
    assert 1.0 < price < 2.0
    assert pruned.plan.kv_bytes_per_token * 12 == dense.plan.kv_bytes_per_token * 8
