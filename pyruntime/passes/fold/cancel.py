"""Pre-norms that the norms of queries, keys and values make redundant (FlashNorm, arXiv 2407.09577, proposition 3)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Final

import torch

from pyruntime.checkpoint import Model
from pyruntime.checkpoint.computed import exact
from pyruntime.passes.fold.draft import Draft, check_dtype
from pyruntime.passes.fold.gate import CHANGE_LIMITS, gain_of
from pyruntime.passes.fold.matrices import matrix, scale_inputs
from pyruntime.passes.fold.norms import ONE_PLUS
from pyruntime.spec import Attention, Cached, Norm, NormKind

_RMS: Final = (NormKind.RMS, NormKind.RMS_ONE_PLUS)


def cancel_norms(
    model: Model, streams: Mapping[int, torch.Tensor], *, dtype: str | None = None, force: bool = False
) -> Model:
    """`model` without the pre-norms of attentions whose queries, keys and values are all normed without bias between.

    RMS(W (g x / r)) is RMS(W g x) for any scale r but for the eps of the second norm, which counted for 1/r^2 as much.
    `streams` holds, for each layer, vectors [n, size] that its attention really reads; on them the largest change of a
    normed value is measured, and where it exceeds what `dtype` (the model's own) bears, the norm stays, unless `force`.
    Raises UsageError DTYPE.
    """
    dtype = model.dtype if dtype is None else dtype
    check_dtype(dtype)
    draft = Draft.of(model)
    for kind, index, prefix, attention in draft.sublayers():
        if not isinstance(attention, Attention) or attention.pre is None:
            continue
        where, limit = f"attention {index} pre", CHANGE_LIMITS[dtype]
        obstacle = _obstacle(attention)
        if obstacle is not None:
            draft.leave(obstacle, where)
            continue
        if index not in streams:
            draft.leave("nothing is known of what it reads, so the effect of eps is not either", where)
            continue
        change = largest_change(draft, prefix, attention, streams[index].double())
        # written so that a NaN is refused
        if not change <= limit and not force:
            draft.leave(f"without it eps would change normed values by {change:.1e}, at most {limit:.0e}", where)
            continue
        if not change <= limit:
            draft.forced.append(where)
        draft.notes.append(f"{where}: {'' if change <= limit else 'forced, '}normed values change by {change:.1e}")
        draft.put(kind, index, _without_pre(draft, prefix, attention, attention.pre))
        draft.rewritten.append(where)
    return draft.finish("cancel norms")


def largest_change(draft: Draft, prefix: str, attention: Attention, x: torch.Tensor) -> float:
    """Largest change of a root mean square behind a norm of queries, keys or values, over the inputs `x` [n, size].

    With M the mean square of W g x, r^2 that of x plus its eps, and e the eps of the second norm, it goes from
    sqrt(M / (M + e r^2)) to sqrt(M / (M + e)); where both are near one that is e |r^2 - 1| / 2M.
    """
    pre = attention.pre
    assert pre is not None
    squares = x.square().mean(dim=1) + pre.eps
    x = x * gain_of(draft.weights, f"{prefix}pre", pre)
    worst = 0.0
    for name, own in _normed(attention).items():
        linear = getattr(attention, name)
        y = x @ matrix(linear, exact(draft.weights[f"{prefix}{name}.weight"])).T
        means = y.reshape(len(x), -1, own.size).square().mean(dim=2)  # [n, heads]
        before = (means / (means + own.eps * squares[:, None])).sqrt()
        after = (means / (means + own.eps)).sqrt()
        # max of a tensor, not of floats: NaN wins
        worst = float(torch.tensor([worst, float((after - before).abs().max())]).max())
    return worst


def _obstacle(attention: Attention) -> str | None:
    assert attention.pre is not None
    if attention.pre.kind not in _RMS or attention.pre.bias:
        return "it is no RMSNorm without bias"
    if attention.columns is not None or None in (attention.q, attention.k, attention.v):
        return "its output is used as it is"
    if attention.cached is not Cached.KEYS_VALUES:
        return f"the cache holds {attention.cached}"
    missing = [f"{name}_norm" for name in "qkv" if getattr(attention, f"{name}_norm") is None]
    if missing == ["v_norm"]:
        return "queries and keys are normed again, but values need its scale"
    if missing:
        return f"there is no {', '.join(missing)} behind it"
    if any(own.kind not in _RMS for own in _normed(attention).values()):
        return "a norm behind it is no RMSNorm"
    biased = [name for name in "qkv" if getattr(attention, name).bias]
    return f"{', '.join(biased)} add a bias to what it scales" if biased else None


def _normed(attention: Attention) -> dict[str, Norm]:
    found = {name: getattr(attention, f"{name}_norm") for name in "qkv"}
    return {name: norm for name, norm in found.items() if norm is not None}


def _without_pre(draft: Draft, prefix: str, attention: Attention, pre: Norm) -> Attention:
    """The attention with the gain of its pre-norm in q, k and v."""
    for name in "qkv" if pre.weight else "":
        linear, weight = getattr(attention, name), draft.weights[f"{prefix}{name}.weight"]
        offset = float(pre.kind in ONE_PLUS)
        draft.compute(
            f"{prefix}{name}.weight",
            linear.weight_shape,
            weight,
            lambda stored, gain, linear=linear, offset=offset: scale_inputs(linear, stored, gain + offset),
            weight,
            draft.weights[f"{prefix}pre.weight"],
        )
    return replace(attention, pre=None)
