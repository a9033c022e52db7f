"""Fixtures: tiny random models in Hugging Face form, their transformers twins, and poisoned memory."""

from __future__ import annotations

import importlib
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings

from pyruntime import env
from pyruntime.ops import attention, cache, memory
from tests.generation import save_text_model

# the package shows a function of that name
lowering = importlib.import_module("pyruntime.plan.lower")
# nothing here may reach for the network
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# a shell starts what runs in the background deaf to Ctrl-C, which some tests send
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# the models are tiny: a second thread costs more than it gives, above all on a busy machine
torch.set_num_threads(1)
# by hand, with --hypothesis-profile=stress; what it is for says so
settings.register_profile("stress", max_examples=20_000)

TINY: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every buffer that pyruntime allocates starts as NaN, so that reading what nobody wrote shows."""
    honest = memory.alloc

    def poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
        made = honest(*args, **kwargs)
        # bytes of ones are NaN in every type of float that is laid over them
        return made.fill_(torch.nan if made.is_floating_point() else 255)

    for module in (memory, cache, attention):
        monkeypatch.setattr(module, "alloc", poisoned)


@pytest.fixture(autouse=True)
def cpu_by_default(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU changes nothing for tests that are not about it: "auto" is the CPU there."""
    if request.node.get_closest_marker("gpu") is None:
        monkeypatch.setattr(lowering, "has_gpu", lambda *_: False)


@pytest.fixture(scope="session")
def make_llama(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Any]]:
    """A function from LlamaConfig overrides to (folder, transformers model); equal overrides share a folder."""
    from transformers import LlamaConfig, LlamaForCausalLM

    made: dict[str, tuple[Path, Any]] = {}

    def make(**overrides: Any) -> tuple[Path, Any]:
        key = repr(sorted(overrides.items()))
        if key not in made:
            torch.manual_seed(0)
            model = LlamaForCausalLM(LlamaConfig(**{**TINY, **overrides})).eval()
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    # transformers starts with gains of one and biases of zero, which would hide mistakes
                    spread = 0.2 if parameter.dim() > 1 else 0.3
                    parameter.copy_(torch.randn_like(parameter) * spread + (1.0 if "norm" in name else 0.0))
            folder = tmp_path_factory.mktemp("llama")
            model.save_pretrained(folder)
            made[key] = (folder, model)
        return made[key]

    return make


@pytest.fixture(scope="session")
def text_model(
    make_llama: Callable[..., tuple[Path, Any]], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Any]:
    """(folder, transformers model) of a tiny Llama with a tokenizer, a chat template and greedy defaults."""
    folder, hf_model = make_llama(vocab_size=300)
    target = tmp_path_factory.mktemp("text") / "model"
    return save_text_model(folder, target, 300, do_sample=False, max_new_tokens=7), hf_model


@pytest.fixture(scope="session")
def test_data() -> Path:
    """Folder with real models and corpora; tests that need it are skipped where it is not named."""
    folder = env.test_data()
    if folder is None:
        pytest.skip("PYRUNTIME_TEST_DATA not set")
    return folder
