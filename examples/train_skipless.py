"""A transformer without residual connections: u' = MLP(attention(u)), with RMSNorm in front of both or no norm at all.

Names of modules are those of pyruntime.spec.weight_shapes, so that the state dict is what train_export.py writes.

A network without skips trains only if it starts out well conditioned (He et al. 2023, "Deep Transformers without
Shortcuts"; Ji et al. 2025, "Cutting the Skip"), and learns to look at other tokens only if its scores do not start so
far apart that no gradient passes. Here biases of queries and keys, turned by the rotary positions, let each head start
as a narrow window over positions: on the token itself or, in the last head of a group (the last of all heads where each
has its own keys), on the one before. Values and output projection pass the stream on, and the gate starts near a
constant, so that up and down, each other's transpose, pass it on too. Every square matrix starts orthogonal.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from train_model import RMS_EPS, ROPE_THETA, Config, rope_tables, rotate

# scores start as A * sum(cos(w * (distance - shift))) over the highest frequencies w of the rotary positions; a lead
# over the neighbours of 4 gives the window's middle more than nine tenths, of 2 more than half
NUM_FREQUENCIES = 6
LEAD_OF_SELF = 4.0
LEAD_OF_PREVIOUS = 2.0
# of the content in scores
QK_GAIN = 0.5
# where heads share values, of the stream's first part and of the rest in a value; the squares add up to 1
FIRST_SHARE, REST_SHARE = 0.8, 0.6
# silu(1 + z) is nearly linear in z, and a gain of a quarter keeps z small
GATE_BIAS = 1.0
GATE_GAIN = 0.25


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions in the rotate-half layout."""

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = cfg.heads, cfg.kv_heads, cfg.head_dim
        kv_dim = cfg.kv_heads * cfg.head_dim
        self.pre = make_norm(cfg)
        self.q = nn.Linear(cfg.hidden, cfg.hidden)
        self.k = nn.Linear(cfg.hidden, kv_dim)
        self.v = nn.Linear(cfg.hidden, kv_dim, bias=False)
        self.o = nn.Linear(cfg.hidden, cfg.hidden, bias=False)
        self.start()

    @torch.no_grad()
    def start(self) -> None:
        """Sets weights with which a head passes on the values of one position."""
        group, kv_dim, hidden = self.heads // self.kv_heads, self.k.out_features, self.q.in_features
        nn.init.orthogonal_(self.q.weight, gain=QK_GAIN)
        nn.init.orthogonal_(self.k.weight, gain=QK_GAIN)
        self.start_windows()
        if group == 1:
            nn.init.orthogonal_(self.v.weight)
            self.o.weight.copy_(self.v.weight.T)
            return
        rest = nn.init.orthogonal_(torch.empty(kv_dim, hidden - kv_dim))
        self.v.weight.copy_(torch.cat((FIRST_SHARE * torch.eye(kv_dim), REST_SHARE * rest), dim=1))
        # the first heads of all groups fill the first part of the stream, the second heads the second part
        order = torch.arange(hidden).view(self.kv_heads, group, self.head_dim).transpose(0, 1).flatten()
        self.o.weight.copy_(torch.eye(hidden)[order])

    def start_windows(self) -> None:
        """Sets the biases so that each head looks at the token itself, the last of each group at the one before."""
        num_pairs = self.head_dim // 2
        used = min(NUM_FREQUENCIES, num_pairs)
        freq = ROPE_THETA ** (-torch.arange(used) / num_pairs)
        back = torch.stack((freq.cos(), -freq.sin()))  # of a query that looks one token back
        lead = (1 - freq.cos()).sum() / self.head_dim**0.5  # over the neighbours, of unit biases
        size = (LEAD_OF_SELF / lead) ** 0.5
        q, k = (each.bias.zero_().view(-1, 2, num_pairs) for each in (self.q, self.k))
        k[:, 0, :used] = size
        q[:, 0, :used] = size
        group = self.heads // self.kv_heads
        looking_back = self.heads - 1 if group == 1 else slice(group - 1, None, group)
        q[looking_back, :, :used] = size * LEAD_OF_PREVIOUS / LEAD_OF_SELF * back

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # x: [batch, tokens, hidden]
        batch, tokens, _ = x.shape
        x = self.pre(x)
        q = self.q(x).view(batch, tokens, self.heads, self.head_dim).transpose(1, 2)
        k = self.k(x).view(batch, tokens, self.kv_heads, self.head_dim).transpose(1, 2)
        v = self.v(x).view(batch, tokens, self.kv_heads, self.head_dim).transpose(1, 2)
        group = self.heads // self.kv_heads
        k = rotate(k, cos, sin).repeat_interleave(group, dim=1)
        out = F.scaled_dot_product_attention(
            rotate(q, cos, sin), k, v.repeat_interleave(group, dim=1), is_causal=True
        )  # [batch, heads, tokens, dim]
        output: Tensor = self.o(out.transpose(1, 2).reshape(batch, tokens, -1))
        return output


class Mlp(nn.Module):
    """SwiGLU (Shazeer 2020) with a bias in the gate."""

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.pre = make_norm(cfg)
        self.gate = nn.Linear(cfg.hidden, cfg.ffn)
        self.up = nn.Linear(cfg.hidden, cfg.ffn, bias=False)
        self.down = nn.Linear(cfg.ffn, cfg.hidden, bias=False)
        self.start()

    @torch.no_grad()
    def start(self) -> None:
        """Sets weights with which the MLP is the identity up to the variation of the gate."""
        nn.init.constant_(self.gate.bias, GATE_BIAS)
        nn.init.orthogonal_(self.gate.weight, gain=GATE_GAIN)
        nn.init.orthogonal_(self.up.weight)
        self.down.weight.copy_(self.up.weight.T / F.silu(torch.tensor(GATE_BIAS)))

    def forward(self, x: Tensor) -> Tensor:  # x: [batch, tokens, hidden]
        x = self.pre(x)
        output: Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return output


class Layer(nn.Module):
    """One attention and one MLP, one after the other."""

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.attention = Attention(cfg)
        self.mlp = Mlp(cfg)

    def forward(self, h: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # h: [batch, tokens, hidden]
        output: Tensor = self.mlp(self.attention(h, cos, sin))
        return output


class Skipless(nn.Module):
    """Embedding, layers without residual connections, and a head of its own."""

    cos: Tensor
    sin: Tensor

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        self.cfg = cfg
        self.embedding = nn.Embedding(cfg.vocab, cfg.hidden)
        self.layers = nn.ModuleList(Layer(cfg) for _ in range(cfg.layers))
        self.final_norm = make_norm(cfg)
        self.head = nn.Linear(cfg.hidden, cfg.vocab, bias=False)
        cos, sin = rope_tables(cfg.context, cfg.head_dim)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        if cfg.compile:
            for layer in self.layers:
                layer.compile()
        with torch.no_grad():
            self.head.weight.zero_()

    def forward(self, ids: Tensor, targets: Tensor, skipped: frozenset[tuple[str, int]] = frozenset()) -> Tensor:
        """Negative log likelihood of each target, [batch * tokens], zero where the target is -100.

        Nothing can be skipped: without a residual connection nothing of the stream would be left.
        """
        assert not skipped
        logits = self.logits(ids).float().flatten(0, 1)
        return F.cross_entropy(logits, targets.flatten(), ignore_index=-100, reduction="none")

    def logits(self, ids: Tensor) -> Tensor:  # [batch, tokens] -> [batch, tokens, vocab]
        """Logits of the next token at each position."""
        rate = self.cfg.dropout if self.training else 0.0
        cos, sin = self.cos[: ids.shape[1]], self.sin[: ids.shape[1]]
        h = F.dropout(self.embedding(ids), rate)  # [batch, tokens, hidden]
        for layer in self.layers:
            h = F.dropout(layer(h, cos, sin), rate)
        logits: Tensor = self.head(self.final_norm(h))
        return logits


def make_norm(cfg: Config) -> nn.Module:
    """The norm of the settings over the stream."""
    return nn.RMSNorm(cfg.hidden, eps=RMS_EPS) if cfg.norm == "rms" else nn.Identity()
