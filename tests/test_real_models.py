"""Real trained models, found through PYRUNTIME_TEST_DATA: published figures, and transformers' greedy text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from pyruntime import LLM, SamplingParams
from pyruntime.engine.load import DropOptions, Loaded, load
from pyruntime.evaluate import perplexity

pytestmark = pytest.mark.slow


def stories(loaded: Loaded, path: Path, count: int) -> list[list[int]]:
    """The first `count` stories, `<s>` first, cut to the model's context."""
    assert loaded.tokenizer is not None
    lines = path.read_text(encoding="utf-8").splitlines()[:count]
    limit = loaded.model.spec.max_position
    return [loaded.tokenizer.encode(json.loads(line)["text"])[:limit] for line in lines]


# perplexities that each model's SOURCE.md measured with transformers, on 100 stories: dense, without one attention, and
# without one MLP
PUBLISHED = {
    "stories260k": [("", 5.28), ("attn 2", 6.21), ("attn 0", 7.04), ("attn 4", 6.83)],
    "bitllama-1m": [
        ("", 5.365),
        *((f"attn {i}", value) for i, value in enumerate((11.04, 27.19, 5.29, 5.49, 5.50, 6.30, 8.67, 5.52))),
        *((f"mlp {i}", value) for i, value in enumerate((6.68, 6.29, 6.39, 5.80, 5.78, 5.82, 6.24, 6.81))),
    ],
}


@pytest.mark.parametrize(
    "name, dropped, published", [(name, *row) for name, rows in PUBLISHED.items() for row in rows], ids=str
)
def test_published_perplexity(test_data: Path, name: str, dropped: str, published: float) -> None:
    kind, _, layer = dropped.partition(" ")
    drops = DropOptions(**{f"drop_{kind}": layer} if dropped else {})
    loaded = load(test_data / "models" / name, drops=drops, dtype="float32")
    texts = stories(loaded, test_data / "corpora/tinystories-1000.jsonl", 100)
    assert all(text[0] == 1 for text in texts)
    assert perplexity(loaded.plan, texts).value == pytest.approx(published, rel=0.003)


@pytest.mark.parametrize("name", ["stories260k", "babyllama-char-1m", "bitllama-1m"])
def test_greedy_text_equals_transformers_for_200_tokens(test_data: Path, name: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = test_data / "models" / name
    (output,) = LLM(folder).generate(
        "Once upon a time", SamplingParams(temperature=0.0, max_tokens=200), use_tqdm=False
    )
    hf_model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompt = AutoTokenizer.from_pretrained(folder)("Once upon a time", return_tensors="pt")
    assert output.prompt_token_ids == tuple(prompt["input_ids"][0].tolist())
    expected = hf_model.generate(**prompt, max_new_tokens=200, do_sample=False)[0].tolist()
    found = [*output.prompt_token_ids, *output.outputs[0].token_ids]
    if found != expected:
        # another order of sums may decide a tie differently, and nothing else
        first = next(i for i, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b)
        with torch.no_grad():
            top = hf_model(torch.tensor([expected[:first]])).logits[0, -1].topk(2).values
        assert float(top[0] - top[1]) < 1e-4
