"""A head that is tied by config.json, and what the files hold: the logits are transformers' in every combination."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pyruntime.checkpoint import read_model
from tests.helpers import all_logits, hf_logits, make_plan, relative_error

TOKENS = [3, 17, 60, 0, 5]


@pytest.mark.parametrize("stored", ["both, different", "both, equal", "embedding only", "head only"])
def test_logits_equal_transformers(make_llama: Callable[..., tuple[Path, Any]], tmp_path: Path, stored: str) -> None:
    from transformers import LlamaForCausalLM

    folder, _ = make_llama(tie_word_embeddings=False)
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    tensors = load_file(folder / "model.safetensors")
    if stored == "both, equal":
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    if stored == "embedding only":
        del tensors["lm_head.weight"]
    if stored == "head only":
        del tensors["model.embed_tokens.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    hf_model = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    (found,) = all_logits(make_plan(tmp_path), [TOKENS], 64)
    assert relative_error(found, hf_logits(hf_model, TOKENS)) < 1e-5
    assert any("head" in note for note in read_model(tmp_path).notes) == (stored != "embedding only")
