"""Slim attention: a cache of keys alone, or of inputs, for multi-head attention (Graef et al., arXiv 2503.05840)."""

from __future__ import annotations

from dataclasses import replace

import torch

from pyruntime.checkpoint import Model
from pyruntime.checkpoint.computed import exact
from pyruntime.errors import UsageError
from pyruntime.passes.fold.draft import Draft, check_dtype
from pyruntime.passes.fold.gate import judge_inverse, samples
from pyruntime.passes.fold.matrices import matrix
from pyruntime.spec import Attention, Cached, Linear


def slim(model: Model, cached: Cached, *, dtype: str | None = None, force: bool = False) -> Model:
    """`model` whose attentions cache keys alone or their inputs, wherever that is exact and smaller.

    KEYS: v = W_V W_K^-1 (k - b_K) + b_V (section 2 of arXiv 2503.05840), refused where the condition number of W_K or
    the error of the values is too large in `dtype` (the model's own); `force` takes it anyway and says so. INPUTS needs
    no inverse. Raises UsageError FOLD for a cache of keys and values, DTYPE for an unknown dtype.
    """
    if cached is Cached.KEYS_VALUES:
        raise UsageError("FOLD", "keys and values is what attentions cache already; expected keys or inputs")
    dtype = model.dtype if dtype is None else dtype
    check_dtype(dtype)
    draft = Draft.of(model)
    for kind, index, prefix, attention in draft.sublayers():
        if not isinstance(attention, Attention):
            continue
        where = f"attention {index}"
        obstacle = _obstacle(attention, cached)
        if obstacle is not None:
            draft.leave(obstacle, where)
        elif cached is Cached.INPUTS:
            draft.put(kind, index, replace(attention, cached=cached))
            draft.rewritten.append(f"{where} caches its {attention.in_size} inputs")
        else:
            _keys_only(draft, index, prefix, attention, dtype, force)
    if draft.rewritten:
        draft.notes.append(_cost(model, cached))
    return draft.finish(f"slim attention ({cached})")


def _obstacle(attention: Attention, cached: Cached) -> str | None:
    if attention.cached is not Cached.KEYS_VALUES:
        return f"its cache holds {attention.cached} already"
    if attention.k is None or attention.v is None:
        return "it has no k or no v of its own"
    if cached is Cached.INPUTS and attention.in_size >= 2 * attention.kv_size:
        return f"its {attention.in_size} inputs are no less than {2 * attention.kv_size} keys and values"
    if cached is Cached.KEYS and attention.k.in_features != attention.kv_size:
        return f"W_K is {attention.kv_size}x{attention.k.in_features}, and only a square one has an inverse"
    return None


def _keys_only(draft: Draft, index: int, prefix: str, attention: Attention, dtype: str, force: bool) -> None:
    k, v = attention.k, attention.v
    assert k is not None and v is not None
    where, weights = f"attention {index}", draft.weights
    sources = (weights[f"{prefix}k.weight"], weights[f"{prefix}v.weight"])
    key, value = matrix(k, exact(sources[0])), matrix(v, exact(sources[1]))
    added = exact(weights[f"{prefix}k.bias"]) if k.bias else 0.0
    x = samples(weights, prefix, attention)
    verdict = judge_inverse(key, _values_of_keys(key, value), value, dtype, x, added)
    if verdict.refused is not None and not (force and verdict.condition < torch.inf):
        draft.leave(f"refused in {dtype} ({verdict.refused})", where)
        return
    draft.rewritten.append(f"{where} caches its keys")
    if verdict.refused is not None:
        draft.forced.append(where)
    draft.notes.append(f"{where}: {'forced, ' if verdict.refused else ''}{verdict.line()} in {dtype}")

    def made(key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return _values_of_keys(matrix(k, key), matrix(v, value))

    size = attention.kv_size
    draft.compute(f"{prefix}v.weight", (size, size), sources[1], made, *sources)
    if k.bias or v.bias:
        biases = [weights[f"{prefix}{name}.bias"] for name, linear in (("k", k), ("v", v)) if linear.bias]

        def bias(key: torch.Tensor, value: torch.Tensor, *own: torch.Tensor) -> torch.Tensor:
            from_key = -made(key, value) @ own[0] if k.bias else 0.0
            return from_key + (own[-1] if v.bias else torch.zeros(size, dtype=torch.float64))

        draft.compute(f"{prefix}v.bias", (size,), sources[1], bias, *sources, *biases)
    linear = Linear(in_features=size, out_features=size, bias=k.bias or v.bias)
    draft.put("attention", index, replace(attention, v=linear, cached=Cached.KEYS))


def _values_of_keys(key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """W with W key = value; NaN where `key` has no inverse."""
    found, info = torch.linalg.solve_ex(key, value, left=False)
    return found if int(info) == 0 else torch.full_like(value, torch.nan)


def _cost(model: Model, cached: Cached) -> str:
    sizes = {(each.in_size, each.kv_size) for _, each in model.spec.attentions()}
    width, kv_size = max(sizes)
    flops = 2 * kv_size * kv_size if cached is Cached.KEYS else 4 * width * kv_size
    made = "values" if cached is Cached.KEYS else "keys and values"
    return f"each step makes the {made} of the whole context anew: up to {flops:,} FLOPs for each position and layer"
