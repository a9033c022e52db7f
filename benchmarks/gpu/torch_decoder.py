"""A decoder in plain PyTorch, from the same weights: what a careful user writes without this project.

Weights that read the same values are one matrix, the cache is static, attention is SDPA. A step is one call of a
compiled layer for each layer (torch.compile, of one layer: all share it), captured as one CUDA graph with the choice of
the next token inside.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.gpu.clock import Run, captured
from pyruntime.checkpoint import Model
from pyruntime.ops import rope
from pyruntime.spec import MLP, Attention

_ALIGNED: Final = 64


@dataclass(frozen=True, slots=True)
class _Layer:
    """Weights of one layer; attention's are None where it is dropped."""

    pre: Tensor | None
    qkv: Tensor | None
    bias: Tensor | None
    out: Tensor | None
    mlp_pre: Tensor
    gate_up: Tensor
    down: Tensor


class TorchDecoder:
    """`batch` sequences of up to `length` tokens, rounded up. The models are those of settings.py, with Q and P.

    `compile_with` is a backend of torch.compile, or None: eager.
    """

    def __init__(self, model: Model, dtype: torch.dtype, batch: int, length: int, compile_with: str | None) -> None:
        spec = model.spec
        # a mask whose rows are aligned takes SDPA's fused kernels
        length = -(-length // _ALIGNED) * _ALIGNED
        self._spec = spec
        self._dtype = dtype
        self._embedding = self._read(model, "embedding.weight")
        self._head = self._embedding if spec.head.tied else self._read(model, "head.weight")
        self._norm = self._read(model, "final_norm.weight")
        self._eps = 0.0 if spec.final_norm is None else spec.final_norm.eps
        self.device = self._embedding.device
        self._layers = [self._layer(model, i) for i in range(len(spec.layers))]
        self._attention = next(each for _, each in spec.attentions())
        assert self._attention.rope is not None
        angles = rope.rotary(self._attention.rope, torch.arange(length))
        # each half of a head is turned by the same angles
        self._cos, self._sin = (
            torch.cat((each, each), dim=-1).to(dtype).to(self.device) for each in (angles.cos, angles.sin)
        )
        heads = (self._attention.num_kv_heads, length, self._attention.head_dim)
        self._caches = [
            None if each.qkv is None else tuple(torch.randn((2, batch, *heads), dtype=dtype, device=self.device))
            for each in self._layers
        ]
        self.tokens = torch.zeros(batch, dtype=torch.int64, device=self.device)
        self.position = torch.zeros(1, dtype=torch.int64, device=self.device)
        self.logits = torch.empty((batch, spec.vocab_size), dtype=dtype, device=self.device)
        self._columns = torch.arange(length, device=self.device)
        self._attend: Callable[..., Tensor] = _wrapped(self._attention_layer, compile_with)
        self._mlp: Callable[..., Tensor] = _wrapped(self._mlp_layer, compile_with)

    @torch.inference_mode()
    def captured(self) -> Run:
        """A step as a function that replays it."""
        return captured(self.step, self.device)

    def start(self, tokens: list[int], position: int) -> None:
        """The next step reads `tokens` at `position`."""
        self.tokens.copy_(torch.tensor(tokens))
        self.position.fill_(position)

    def load_cache(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Put keys and values [batch, kv_heads, tokens, head_dim] in front."""
        cache = self._caches[layer]
        assert cache is not None
        for own, other in zip(cache, (keys, values), strict=True):
            own[:, :, : other.shape[2]] = other

    @torch.inference_mode()
    def step(self) -> None:
        """One token of every sequence, fed back."""
        x = functional.embedding(self.tokens, self._embedding)
        cos, sin = self._cos[self.position], self._sin[self.position]
        mask = (self._columns <= self.position)[None, None, None]
        for layer, cache in zip(self._layers, self._caches, strict=True):
            if cache is not None:
                x = self._attend(x, self.position, cos, sin, mask, *cache, layer.pre, layer.qkv, layer.bias, layer.out)
            x = self._mlp(x, layer.mlp_pre, layer.gate_up, layer.down)
        self.logits.copy_(functional.linear(self._rms(x, self._norm), self._head))
        self.tokens.copy_(self.logits.argmax(dim=-1))
        self.position.add_(1)

    @torch.inference_mode()
    def prefill(self, tokens: Tensor) -> Tensor:
        """Logits [1, vocab] behind a prompt [tokens]: cuBLAS for every product, SDPA, no cache."""
        x = functional.embedding(tokens, self._embedding)
        count = len(tokens)
        cos, sin = self._cos[:count], self._sin[:count]
        for layer in self._layers:
            if layer.qkv is not None:
                query, key, value = self._projected(x, layer.pre, layer.qkv, layer.bias)
                query, key = (_turned(each, cos[:, None], sin[:, None]) for each in (query, key))
                query, key, value = (each.transpose(0, 1)[None] for each in (query, key, value))
                found = functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
                x = x + functional.linear(found[0].transpose(0, 1).reshape(count, -1), _there(layer.out))
            x = self._mlp_layer(x, layer.mlp_pre, layer.gate_up, layer.down)
        return functional.linear(self._rms(x[-1:], self._norm), self._head)

    def _attention_layer(
        self,
        x: Tensor,
        position: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor,
        keys: Tensor,
        values: Tensor,
        pre: Tensor,
        qkv: Tensor,
        bias: Tensor | None,
        out: Tensor,
    ) -> Tensor:
        query, key, value = self._projected(x, pre, qkv, bias)
        query, key = _turned(query, cos, sin), _turned(key, cos, sin)
        keys[:, :, position] = key[:, :, None]
        values[:, :, position] = value[:, :, None]
        # the query heads of one key head see the same positions: they stand where several queries of one head would
        grouped = query.unflatten(1, (self._attention.num_kv_heads, -1))
        found = functional.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask)
        return x + functional.linear(found.flatten(1), out)

    def _mlp_layer(self, x: Tensor, pre: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        gate, up = functional.linear(self._rms(x, pre), gate_up).chunk(2, dim=-1)
        return x + functional.linear(functional.silu(gate) * up, down)

    def _projected(self, x: Tensor, pre: Tensor | None, qkv: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
        """Queries, keys and values [rows, heads, head_dim]."""
        attention = self._attention
        made = functional.linear(self._rms(x, _there(pre)), qkv, bias)
        parts = made.split([attention.q_size, attention.kv_size, attention.kv_size], dim=-1)
        return tuple(each.unflatten(-1, (-1, attention.head_dim)) for each in parts)

    def _rms(self, x: Tensor, gain: Tensor) -> Tensor:
        return functional.rms_norm(x, gain.shape, gain, self._eps)

    def _layer(self, model: Model, index: int) -> _Layer:
        layer = self._spec.layers[index]
        assert isinstance(layer.mlp, MLP)
        prefix = f"layers.{index}"
        gate, up = (self._read(model, f"{prefix}.mlp.{name}.weight") for name in ("gate", "up"))
        pre = qkv = bias = out = None
        if layer.attention is not None:
            assert isinstance(layer.attention, Attention) and layer.attention.q is not None
            names = [f"{prefix}.attention.{name}" for name in "qkv"]
            qkv = torch.cat([self._read(model, f"{name}.weight") for name in names])
            if layer.attention.q.bias:
                bias = torch.cat([self._read(model, f"{name}.bias") for name in names])
            pre, out = (self._read(model, f"{prefix}.attention.{name}.weight") for name in ("pre", "o"))
        return _Layer(
            pre=pre,
            qkv=qkv,
            bias=bias,
            out=out,
            mlp_pre=self._read(model, f"{prefix}.mlp.pre.weight"),
            gate_up=torch.cat((gate, up)),
            down=self._read(model, f"{prefix}.mlp.down.weight"),
        )

    def _read(self, model: Model, name: str) -> Tensor:
        return model.weights[name].read().to(self._dtype)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotated heads [rows, heads, head_dim]; value i pairs with value i + head_dim / 2."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def _there(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor


def _wrapped(function: Callable[..., Tensor], backend: str | None) -> Callable[..., Tensor]:
    if backend is None:
        return function
    compiled: Callable[..., Tensor] = torch.compile(function, backend=backend, fullgraph=True, dynamic=False)
    return compiled
