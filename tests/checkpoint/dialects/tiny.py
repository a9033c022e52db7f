"""Tiny checkpoints of models that transformers has no class for, and the independent transformer that judges them.

What each layer has is written down by hand in the tests as a specification; the reader's result has no part in it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from pyruntime.checkpoint import Model, read_model
from pyruntime.errors import UsageError
from pyruntime.graph import build, fuse
from pyruntime.plan import lower
from pyruntime.spec import MLP, Attention, Embedding, Head, ModelSpec, Replacement, Rope, RopeKind
from tests import naive
from tests.helpers import TARGETS, all_logits, relative_error
from tests.specs import as_arrays, attention_of, lin, mlp_of, model_of, random_weights, rms

HIDDEN = 64
HEADS = 8
VOCAB = 37
TOKENS = [(5 * i * i + 3 * i) % VOCAB for i in range(21)]
# as in tests/test_expressible.py
LIMITS = {"reference": 1e-10, "cpu": 1e-5}
DTYPES = {"reference": "float64", "cpu": "float32"}

# our names and those of the checkpoints, written down a second time
STEMS = {
    "embedding": "model.embed_tokens",
    "final_norm": "model.norm",
    "head": "lm_head",
    "attention.pre": "input_layernorm",
    "attention.q": "self_attn.q_proj",
    "attention.k": "self_attn.k_proj",
    "attention.v": "self_attn.v_proj",
    "attention.o": "self_attn.o_proj",
    "attention.linear": "self_attn.linear_attn",
    "mlp.pre": "post_attention_layernorm",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
    "mlp.linear": "mlp.linear_mlp",
}

LINEAR = Replacement(linear=lin(HIDDEN, HIDDEN), pre=rms(HIDDEN))


def attention(num_kv_heads: int, num_heads: int = HEADS, head_dim: int = HIDDEN // HEADS, **changes: Any) -> Attention:
    """An attention of Llama's kind."""
    rope = Rope(kind=RopeKind.DEFAULT, dim=head_dim, theta=10000.0)
    return attention_of(HIDDEN, num_heads, num_kv_heads, head_dim, rope=rope, scale=head_dim**-0.5, **changes)


def mlp(width: int) -> MLP:
    """A gated MLP of Llama's kind."""
    return mlp_of(HIDDEN, width)


def spec_of(
    *layers: tuple[Attention | Replacement | None, MLP | Replacement | None], family: str = "llama"
) -> ModelSpec:
    """A model of these layers."""
    return model_of(
        [(*layer, False) for layer in layers],
        family=family,
        embedding=Embedding(vocab_size=VOCAB, size=HIDDEN, scale=1.0),
        final_norm=rms(HIDDEN),
        head=Head(linear=lin(HIDDEN, VOCAB), tied=False),
    )


def config_of(num_layers: int, **keys: Any) -> dict[str, Any]:
    """config.json of a Llama of these sizes; `...` leaves a key out."""
    whole = {
        "model_type": "llama",
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "num_hidden_layers": num_layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": 4,
        "intermediate_size": 256,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "dtype": "float32",
        **keys,
    }
    return {key: value for key, value in whole.items() if value is not ...}


def hf_name(weight: str) -> str:
    """The checkpoint's name of our `weight`."""
    stem, end = weight.rsplit(".", 1)
    if stem in STEMS:
        return f"{STEMS[stem]}.{end}"
    _, index, rest = stem.split(".", 2)
    return f"model.layers.{index}.{STEMS[rest]}.{end}"


def write(folder: Path, config: dict[str, Any], spec: ModelSpec, **more: torch.Tensor) -> Path:
    """A checkpoint of random tensors that `spec` names, and of `more`."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {hf_name(weight): tensor for weight, tensor in random_weights(spec, torch.float32).items()}
    save_file({**tensors, **more}, folder / "model.safetensors")
    return folder


def check_parity(folder: Path, spec: ModelSpec, tokens: Sequence[int] = TOKENS) -> Model:
    """Compare what `write` left in `folder`, on both targets, whole and cached, with the naive transformer."""
    expected = torch.from_numpy(naive.logits(spec, as_arrays(random_weights(spec, torch.float32)), tokens))
    model = read_model(folder)
    for target in TARGETS:
        for graph in (build(model.spec), fuse(build(model.spec))):
            plan = lower(graph, model, dtype=DTYPES[target], target=target)
            for chunk in (64, 4, 1):
                (found,) = all_logits(plan, [tokens], chunk)
                assert relative_error(found, expected) < LIMITS[target], (target, chunk)
    return model


def refused(folder: Path, config: dict[str, Any], code: str = "CONFIG") -> str:
    """Why a folder with this config.json is refused; its weights are never asked for."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError) as caught:
        read_model(folder)
    assert (caught.value.code, caught.value.exit_code) == (code, 2)
    assert str(caught.value).isprintable()
    return str(caught.value)
