"""Sublayers that add zero to the stream, as mergekit leaves them behind where it scales an output by zero."""

from __future__ import annotations

from pyruntime.checkpoint import Model, Weight
from pyruntime.checkpoint.computed import exact
from pyruntime.checkpoint.weight import TensorRef
from pyruntime.passes.fold.draft import Draft
from pyruntime.passes.fold.maps import map_outputs
from pyruntime.passes.fold.norms import ONE_PLUS
from pyruntime.spec import Attention, DropPlan, Linear, Norm, Sublayer, drop_sublayers


def drop_zero_sublayers(model: Model) -> Model:
    """`model` without the sublayers whose last map, or whose post norm, gives nothing but zeros.

    Only the tensors that can show it are read, and of a stored matrix no more than its first row where that is not
    zero. A sublayer without residual, or with a matrix on it, stays.
    """
    draft = Draft.of(model)
    found: dict[str, list[int]] = {"attention": [], "mlp": []}
    for kind, index, prefix, sublayer in draft.sublayers():
        if not _gives_zero(draft, prefix, sublayer):
            continue
        if sublayer.residual and sublayer.shortcut is None:
            found[kind].append(index)
        else:
            draft.leave("gives zeros, but the stream does not pass it unchanged", f"{kind} {index}")
    plan = DropPlan(tuple(found["attention"]), tuple(found["mlp"]))
    draft.layers = list(drop_sublayers(model.spec, plan).layers)
    return draft.finish("drop zero sublayers", tuple(f"{kind} {i}" for kind, own in found.items() for i in own))


def _gives_zero(draft: Draft, prefix: str, sublayer: Sublayer) -> bool:
    post = sublayer.post
    if post is None:
        return _writes_zero(draft, prefix, sublayer)
    if post.bias and not _is(draft.weights[f"{prefix}post.bias"], 0.0):
        return False
    # a norm makes zeros of zeros, whatever its gain
    return _has_zero_gain(draft, prefix, post) or _writes_zero(draft, prefix, sublayer)


def _has_zero_gain(draft: Draft, prefix: str, post: Norm) -> bool:
    return post.weight and _is(draft.weights[f"{prefix}post.weight"], -1.0 if post.kind in ONE_PLUS else 0.0)


def _writes_zero(draft: Draft, prefix: str, sublayer: Sublayer) -> bool:
    if isinstance(sublayer, Attention) and sublayer.o is None:
        return False
    maps: dict[str, Linear] = {}

    def note(name: str, linear: Linear) -> Linear:
        maps[name] = linear
        return linear

    map_outputs(sublayer, prefix, note)
    # the short ones first
    names = [f"{name}.bias" for name, linear in maps.items() if linear.bias] + [f"{name}.weight" for name in maps]
    return all(_is(draft.weights[name], 0.0) for name in names)


def _is(weight: Weight, value: float) -> bool:
    """Whether every value of `weight` is `value`."""
    if isinstance(weight, TensorRef) and bool((weight.rows(0, 1).read() != value).any()):
        return False
    return bool((exact(weight) == value).all())
