"""Biases of values into the output projection, and biases of keys that softmax does not see (arXiv 2503.05840)."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from pyruntime.checkpoint import Model
from pyruntime.passes.fold.draft import Draft
from pyruntime.passes.fold.matrices import through
from pyruntime.passes.fold.norms import over_query_heads
from pyruntime.spec import Attention, Cached


def fold_biases(model: Model) -> Model:
    """`model` without biases of values, which pass to the output, and of keys where nothing rotates them.

    The weights of softmax add up to one, so a bias b of values gives W_O b at the output: c* = c + W_O b, b standing
    for each query head once. A bias of keys adds the same to all scores of a query, which softmax does not see. Biases
    of values stay where the output has none and is wider.
    """
    draft = Draft.of(model)
    for kind, index, prefix, sublayer in draft.sublayers():
        if isinstance(sublayer, Attention):
            where = f"attention {index}"
            sublayer = _fold_values(draft, where, prefix, sublayer)
            draft.put(kind, index, _forget_keys(draft, where, sublayer))
    return draft.finish("fold biases")


def _fold_values(draft: Draft, where: str, prefix: str, attention: Attention) -> Attention:
    v, o = attention.v, attention.o
    if v is None or not v.bias:
        return attention
    obstacle = (
        "its values are normed"
        if attention.v_norm is not None
        else "a norm stands before its output projection"
        if attention.sub is not None
        else "the weights of shaped attention do not add up to one"
        if attention.shaped
        else "it has no output projection"
        if o is None
        # not every model gains by it
        else f"o has no bias, and {o.out_features} values in place of {v.out_features} are no gain"
        if not o.bias and o.out_features > v.out_features
        else None
    )
    if o is None or obstacle is not None:
        draft.leave(f"the bias of v stays: {obstacle}", where)
        return attention
    weight = draft.weights[f"{prefix}o.weight"]
    own = (draft.weights[f"{prefix}o.bias"],) if o.bias else ()
    spread = partial(over_query_heads, attention)
    draft.compute(
        f"{prefix}o.bias",
        (o.out_features,),
        weight,
        lambda stored, bias, *rest: through(o, stored, spread(bias), *rest),
        weight,
        draft.weights[f"{prefix}v.bias"],
        *own,
    )
    draft.rewritten.append(f"{where} v bias into o")
    return replace(attention, v=replace(v, bias=False), o=replace(o, bias=True))


def _forget_keys(draft: Draft, where: str, attention: Attention) -> Attention:
    k = attention.k
    if k is None or not k.bias:
        return attention
    obstacle = (
        "its keys are rotated"
        if attention.rope is not None
        else "its keys are normed"
        if attention.k_norm is not None
        else "its scores are capped"
        if attention.softcap is not None
        else "its values are made of its keys"
        if attention.cached is Cached.KEYS
        else None
    )
    if obstacle is not None:
        draft.leave(f"the bias of k stays: {obstacle}", where)
        return attention
    draft.rewritten.append(f"{where} k bias gone")
    return replace(attention, k=replace(k, bias=False))
