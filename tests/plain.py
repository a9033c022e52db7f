"""Llama-like models in float64, straight from stored tensors and keys of config.json, as their authors' code has them.

It judges what transformers has no class for: Baichuan, DeepSeek-MoE, and Llamas that FLAP, SliceGPT or FlashNorm left.
Nothing here knows our specification: roles come from the names of tensors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from pyruntime.spec import DropPlan

Tensors = Mapping[str, torch.Tensor]
Config = Mapping[str, Any]


def logits(config: Config, stored: Tensors, tokens: Sequence[int], plan: DropPlan = DropPlan()) -> torch.Tensor:
    """Logits [tokens, vocab] of the whole sequence; what `plan` names adds nothing."""
    tensors = {name: tensor.double() for name, tensor in stored.items()}
    x = tensors["model.embed_tokens.weight"][list(tokens)]
    for index in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{index}."
        own = {name.removeprefix(prefix): each for name, each in tensors.items() if name.startswith(prefix)}
        if index not in plan.attention:
            y = attention(config, own, norm(config, own.get("input_layernorm.weight"), x))
            x = around(own.get("attn_shortcut_Q"), x) + y
        if index not in plan.mlp:
            y = mlp(config, own, norm(config, own.get("post_attention_layernorm.weight"), x))
            x = around(own.get("mlp_shortcut_Q"), x) + y
    x = norm(config, tensors.get("model.norm.weight"), x)
    head = tensors.get("lm_head.weight", tensors["model.embed_tokens.weight"])
    if "z_loss_weight" in config:
        head = torch.nn.functional.normalize(head)
    return x @ head.T


def around(shortcut: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
    return x if shortcut is None else x @ shortcut


def norm(config: Config, weight: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
    if "slice_gpt" in config:
        # TransformerCompression's RMSN: the mean over the width before slicing, a fixed epsilon, no gain
        return x / torch.sqrt(x.square().sum(-1, keepdim=True) / config["hidden_size"] + 1e-5)
    y = x / torch.sqrt(x.square().mean(-1, keepdim=True) + config["rms_norm_eps"])
    return y if weight is None else y * weight


def linear(own: Tensors, name: str, x: torch.Tensor) -> torch.Tensor:
    y = x @ own[f"{name}.weight"].T
    return y + own[f"{name}.bias"] if f"{name}.bias" in own else y


def attention(config: Config, own: Tensors, x: torch.Tensor) -> torch.Tensor:
    head_dim = config["hidden_size"] // config["num_attention_heads"]
    if "self_attn.W_pack.weight" in own:
        packed = linear(own, "self_attn.W_pack", x).chunk(3, dim=-1)
    else:
        packed = tuple(linear(own, f"self_attn.{role}_proj", x) for role in "qkv")
    q, k, v = (each.reshape(len(x), -1, head_dim).transpose(0, 1) for each in packed)
    with_rope = "max_position_embeddings" in config
    if with_rope:
        q, k = rotated(config, q), rotated(config, k)
    k, v = (each.repeat_interleave(len(q) // len(each), dim=0) for each in (k, v))
    scores = q @ k.transpose(1, 2) / math.sqrt(head_dim)
    positions = torch.arange(len(x), dtype=torch.float64)
    if not with_rope:
        scores = scores + slopes(len(q))[:, None, None] * (positions[None, :] - positions[:, None])
    scores = scores.masked_fill(positions[None, :] > positions[:, None], -math.inf)
    y = (torch.softmax(scores, -1) @ v).transpose(0, 1).reshape(len(x), -1)
    return linear(own, "self_attn.o_proj", y)


def rotated(config: Config, x: torch.Tensor) -> torch.Tensor:
    half = x.shape[-1] // 2
    speeds = config.get("rope_theta", 10000.0) ** (-torch.arange(half, dtype=torch.float64) / half)
    angles = torch.arange(x.shape[1], dtype=torch.float64)[:, None] * speeds
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], -1)


def slopes(num_heads: int) -> torch.Tensor:
    """Press et al. 2022: powers of 2^(-8/n); where n is no power of two, every other one of the next power fills up."""
    whole = 2 ** math.floor(math.log2(num_heads))
    first = [2.0 ** (-8.0 * (i + 1) / whole) for i in range(whole)]
    more = [2.0 ** (-4.0 * (2 * i + 1) / whole) for i in range(num_heads - whole)]
    return torch.tensor(first + more, dtype=torch.float64)


def mlp(config: Config, own: Tensors, x: torch.Tensor) -> torch.Tensor:
    if "mlp.gate.weight" not in own:
        return gated(own, "mlp", x)
    probabilities = torch.softmax(linear(own, "mlp.gate", x), -1)
    y = gated(own, "mlp.shared_experts", x) if config.get("n_shared_experts") else torch.zeros_like(x)
    for row, each in enumerate(probabilities):
        best = sorted(range(len(each)), key=lambda expert: -float(each[expert]))[: config["num_experts_per_tok"]]
        total = float(each[best].sum()) if config.get("norm_topk_prob") else 1.0
        for expert in best:
            y[row] += each[expert] / total * gated(own, f"mlp.experts.{expert}", x[row])
    return y


def gated(own: Tensors, name: str, x: torch.Tensor) -> torch.Tensor:
    gate = linear(own, f"{name}.gate_proj", x)
    return linear(own, f"{name}.down_proj", gate / (1 + torch.exp(-gate)) * linear(own, f"{name}.up_proj", x))
