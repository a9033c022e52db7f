"""Writes a trained model: a Llama as a Hugging Face folder, one without residual connections in pyruntime's format."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor
from train_model import RMS_EPS, ROPE_THETA, Config, Llama
from train_skipless import Skipless
from train_text import BOS, BOS_ID, EOS, EOS_ID

from pyruntime.checkpoint.native import native_config
from pyruntime.spec import (
    MLP,
    Activation,
    Attention,
    Embedding,
    Head,
    Layer,
    Linear,
    ModelSpec,
    Norm,
    NormKind,
    Rope,
    RopeKind,
)

TOKENS = {"bos_token_id": BOS_ID, "eos_token_id": EOS_ID}


def export_model(model: Llama | Skipless, out: Path) -> dict[str, Tensor]:
    """Writes weights and configs; returns the weights as the file holds them.

    A Llama's are in bfloat16. Those of a skipless model are in float32: merging multiplies them by inverses.
    """
    dtype = torch.float32 if isinstance(model, Skipless) else torch.bfloat16
    weights = {name: w.detach().to(dtype).contiguous() for name, w in model.named_parameters()}
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    (out / "model.safetensors").chmod(0o644)
    if isinstance(model, Skipless):
        config = native_config(skipless_spec(model.cfg), "float32", TOKENS)
    else:
        config = llama_config(model.cfg)
    write_json(out / "config.json", config)
    write_json(out / "generation_config.json", TOKENS)
    return weights


def llama_config(cfg: Config) -> dict[str, Any]:
    """config.json of a Llama."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": cfg.vocab,
        "hidden_size": cfg.hidden,
        "intermediate_size": cfg.ffn,
        "num_hidden_layers": cfg.layers,
        "num_attention_heads": cfg.heads,
        "num_key_value_heads": cfg.kv_heads,
        "head_dim": cfg.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": cfg.context,
        "rms_norm_eps": RMS_EPS,
        "rope_parameters": {"rope_type": "default", "rope_theta": ROPE_THETA},
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
        **TOKENS,
        "dtype": "bfloat16",
    }


def skipless_spec(cfg: Config) -> ModelSpec:
    """What a Skipless is, in pyruntime's terms."""
    norm = Norm(kind=NormKind.RMS, size=cfg.hidden, eps=RMS_EPS) if cfg.norm == "rms" else None
    square = Linear(in_features=cfg.hidden, out_features=cfg.hidden)
    kv_dim = cfg.kv_heads * cfg.head_dim
    attention = Attention(
        num_heads=cfg.heads,
        num_kv_heads=cfg.kv_heads,
        head_dim=cfg.head_dim,
        q=replace(square, bias=True),
        k=Linear(in_features=cfg.hidden, out_features=kv_dim, bias=True),
        v=Linear(in_features=cfg.hidden, out_features=kv_dim),
        o=square,
        scale=cfg.head_dim**-0.5,
        rope=Rope(kind=RopeKind.DEFAULT, dim=cfg.head_dim, theta=ROPE_THETA),
        pre=norm,
        residual=False,
    )
    mlp = MLP(
        gate=Linear(in_features=cfg.hidden, out_features=cfg.ffn, bias=True),
        up=Linear(in_features=cfg.hidden, out_features=cfg.ffn),
        down=Linear(in_features=cfg.ffn, out_features=cfg.hidden),
        activation=Activation.SILU,
        pre=norm,
        residual=False,
    )
    return ModelSpec(
        family="skipless",
        embedding=Embedding(vocab_size=cfg.vocab, size=cfg.hidden),
        layers=tuple(Layer(index=i, attention=attention, mlp=mlp) for i in range(cfg.layers)),
        final_norm=norm,
        head=Head(linear=Linear(in_features=cfg.hidden, out_features=cfg.vocab), tied=False),
        max_position=cfg.context,
    )


def export_tokenizer(tokenizer: Tokenizer, out: Path, cfg: Config) -> None:
    """Writes tokenizer.json and the config that transformers reads beside it."""
    tokenizer.save(str(out / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": cfg.context,
    }
    write_json(out / "tokenizer_config.json", config)


def write_json(path: Path, value: Any) -> None:
    """Writes a value as indented JSON."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
