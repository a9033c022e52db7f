"""The settings of a training run and the Llama that it trains.

Names of modules are those of transformers' LlamaForCausalLM, so that the state dict is what train_export.py writes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

RMS_EPS = 1e-5
ROPE_THETA = 10000.0


@dataclass(frozen=True, slots=True)
class Config:
    """All that a run depends on besides the text; the command line reads its defaults from here."""

    layers: int = 12
    hidden: int = 192
    heads: int = 6
    kv_heads: int = 2
    ffn: int = 512
    vocab: int = 2048
    context: int = 512
    skipless: bool = False
    norm: str = "rms"
    batch: int = 8
    minutes: float = 72.0
    steps: int = 0
    optimizer: str = "adamw"
    lr: float = 2e-3
    warmup_steps: int = 100
    weight_decay: float = 0.1
    clip: float = 1.0
    dropout: float = 0.1
    skip_attn: float = 0.25
    skip_mlp: float = 0.1
    seed: int = 0
    threads: int = 2
    precision: str = "bfloat16"
    compile: bool = False
    eval_every: int = 100
    save_every: int = 100

    def __post_init__(self) -> None:
        if self.hidden % (2 * self.heads) or self.heads % self.kv_heads:
            raise ValueError(
                f"hidden {self.hidden}, heads {self.heads}, kv_heads {self.kv_heads}: hidden must be a multiple of "
                "2 * heads and heads a multiple of kv_heads"
            )
        choices = {"precision": ("float32", "bfloat16"), "norm": ("rms", "none"), "optimizer": ("adamw", "muon")}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} {getattr(self, name)!r}: use {' or '.join(allowed)}")
        if self.norm == "none" and not self.skipless:
            raise ValueError("norm 'none' needs --skipless: with residual connections the stream grows without norms")

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.hidden // self.heads


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions in the rotate-half layout."""

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = cfg.heads, cfg.kv_heads, cfg.head_dim
        kv_dim = cfg.kv_heads * cfg.head_dim
        self.q_proj = nn.Linear(cfg.hidden, cfg.hidden, bias=False)
        self.k_proj = nn.Linear(cfg.hidden, kv_dim, bias=False)
        self.v_proj = nn.Linear(cfg.hidden, kv_dim, bias=False)
        self.o_proj = nn.Linear(cfg.hidden, cfg.hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # x: [batch, tokens, hidden]
        batch, tokens, _ = x.shape
        q = self.q_proj(x).view(batch, tokens, self.heads, self.head_dim).transpose(1, 2)
        k = self.k_proj(x).view(batch, tokens, self.kv_heads, self.head_dim).transpose(1, 2)
        v = self.v_proj(x).view(batch, tokens, self.kv_heads, self.head_dim).transpose(1, 2)
        group = self.heads // self.kv_heads
        k = rotate(k, cos, sin).repeat_interleave(group, dim=1)
        out = F.scaled_dot_product_attention(
            rotate(q, cos, sin), k, v.repeat_interleave(group, dim=1), is_causal=True
        )  # [batch, heads, tokens, dim]
        return self.o_proj(out.transpose(1, 2).reshape(batch, tokens, -1))


class Mlp(nn.Module):
    """SwiGLU (Shazeer 2020)."""

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(cfg.hidden, cfg.ffn, bias=False)
        self.up_proj = nn.Linear(cfg.hidden, cfg.ffn, bias=False)
        self.down_proj = nn.Linear(cfg.ffn, cfg.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # x: [batch, tokens, hidden]
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """One attention and one MLP, each behind its RMSNorm."""

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(cfg.hidden, eps=RMS_EPS)
        self.self_attn = Attention(cfg)
        self.post_attention_layernorm = nn.RMSNorm(cfg.hidden, eps=RMS_EPS)
        self.mlp = Mlp(cfg)


class Decoder(nn.Module):
    """Embedding, layers and the last norm."""

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(cfg.vocab, cfg.hidden)
        self.layers = nn.ModuleList(Layer(cfg) for _ in range(cfg.layers))
        self.norm = nn.RMSNorm(cfg.hidden, eps=RMS_EPS)


class Llama(nn.Module):
    """The decoder with its output tied to the embedding."""

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.cfg = cfg
        self.model = Decoder(cfg)
        cos, sin = rope_tables(cfg.context, cfg.head_dim)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.attend, self.feed, self.loss = attend, feed, token_losses
        if cfg.compile:
            self.attend, self.feed, self.loss = (torch.compile(f) for f in (attend, feed, token_losses))
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                last = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(weight, std=0.02 / math.sqrt(2 * cfg.layers) if last else 0.02)

    def forward(self, ids: Tensor, targets: Tensor, skipped: frozenset[tuple[str, int]] = frozenset()) -> Tensor:
        """Negative log likelihood of each target, [batch * tokens], zero where the target is -100.

        `skipped` names the sublayers left out, as ("attn" or "mlp", layer index).
        """
        rate = self.cfg.dropout if self.training else 0.0
        cos, sin = self.cos[: ids.shape[1]], self.sin[: ids.shape[1]]
        h = F.dropout(self.model.embed_tokens(ids), rate)  # [batch, tokens, hidden]
        for layer_idx, layer in enumerate(self.model.layers):
            if ("attn", layer_idx) not in skipped:
                h = self.attend(layer, h, cos, sin, rate)
            if ("mlp", layer_idx) not in skipped:
                h = self.feed(layer, h, rate)
        return self.loss(self.model, h, targets)


def rope_tables(num_positions: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of rotary positions (Su et al. 2021), each [positions, head_dim], both halves alike."""
    inv_freq = ROPE_THETA ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    angles = torch.outer(torch.arange(num_positions, dtype=torch.float32), inv_freq).repeat(1, 2)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Applies rotary positions to x [batch, heads, tokens, dim], in the type of x."""
    lower, upper = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-upper, lower), dim=-1) * sin).to(x.dtype)


def attend(layer: Layer, h: Tensor, cos: Tensor, sin: Tensor, dropout: float) -> Tensor:
    """The attention sublayer with its residual; h is [batch, tokens, hidden]."""
    return h + F.dropout(layer.self_attn(layer.input_layernorm(h), cos, sin), dropout)


def feed(layer: Layer, h: Tensor, dropout: float) -> Tensor:
    """The MLP sublayer with its residual; h is [batch, tokens, hidden]."""
    return h + F.dropout(layer.mlp(layer.post_attention_layernorm(h)), dropout)


def token_losses(decoder: Decoder, h: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy of each token in nats, [batch * tokens]."""
    logits = F.linear(decoder.norm(h), decoder.embed_tokens.weight)
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="none")
