"""MatShrink: values and outputs of a head in a basis in which part of the value map is the identity."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from pyruntime.checkpoint import Model
from pyruntime.checkpoint.computed import exact
from pyruntime.passes.fold.draft import Draft, check_dtype
from pyruntime.passes.fold.gate import NMSE_LIMIT, rounded, samples
from pyruntime.spec import Attention, Cached, Linear

# a map of values with identity columns, and the change of basis of each head [kv_heads, head_dim, head_dim]
Shrunk = tuple[torch.Tensor, torch.Tensor]


def shrink_values(model: Model, *, dtype: str | None = None) -> Model:
    """`model` with V_h* = M^-1 V_h and O_h* = O_h M for each key-value head h, M being columns of V_h.

    These columns of V_h* are the identity, so head_dim^2 weights of each head carry nothing (MatShrink of the
    transformer-tricks project). Pivoting chooses the columns, as the first ones may be nearly dependent. The identity
    is stored like any other values: the report says what a format that leaves it out would save. A layer whose error
    in `dtype` (the model's own) is too large stays as it is. Raises UsageError DTYPE.
    """
    dtype = model.dtype if dtype is None else dtype
    check_dtype(dtype)
    draft = Draft.of(model)
    blocks = weights = 0
    for kind, index, prefix, attention in draft.sublayers():
        if not isinstance(attention, Attention):
            continue
        where, obstacle = f"attention {index}", _obstacle(attention)
        if obstacle is None:
            obstacle = _refusal(draft, prefix, attention, dtype)
        if obstacle is not None:
            draft.leave(obstacle, where)
            continue
        draft.put(kind, index, _shrink(draft, prefix, attention))
        draft.rewritten.append(f"{where} v, o")
        blocks += attention.num_kv_heads
        weights += attention.num_kv_heads * attention.head_dim**2
    if blocks:
        draft.notes.append(
            f"{blocks} identity blocks hold {weights:,} weights that carry nothing; they are stored and computed all "
            "the same, as no target leaves them out"
        )
    return draft.finish("shrink values")


def identity_blocks(model: Model) -> dict[str, int]:
    """How many heads of each map of values, and of each output projection, have an identity block in them.

    Reads these maps, and names only those that have one. In an output projection it stands along the outputs, where the
    published MatShrink puts it; along the inputs of values where `shrink_values` does.
    """
    found = {}
    for _, index, prefix, attention in Draft.of(model).sublayers():
        if not isinstance(attention, Attention):
            continue
        for name, axis in (("v", 0), ("o", 1)):
            linear: Linear | None = getattr(attention, name)
            if linear is None or linear.triangular:
                continue
            whole = exact(model.weights[f"{prefix}{name}.weight"])
            heads = whole.split(attention.head_dim, dim=axis)
            count = sum(_has_identity(head if axis == 0 else head.T) for head in heads)
            if count:
                found[f"layers.{index}.attention.{name}.weight"] = count
    return found


def _has_identity(head: torch.Tensor) -> bool:
    """Whether every unit vector is among the columns of `head` [head_dim, width]."""
    units = head[:, (head.count_nonzero(dim=0) == 1) & (head.sum(dim=0) == 1)]
    return bool((units.sum(dim=1) > 0).all())


def _obstacle(attention: Attention) -> str | None:
    v, o = attention.v, attention.o
    if v is None or o is None:
        return "it has no v or no o of its own"
    if v.triangular or o.triangular:
        return "its v or o is triangular"
    if attention.v_norm is not None or attention.sub is not None:
        return "a norm stands between v and o"
    if attention.cached is Cached.KEYS:
        return "its values are made of its keys"
    if attention.head_dim >= v.in_features:
        return "a head is no narrower than its input"
    return None


def _refusal(draft: Draft, prefix: str, attention: Attention, dtype: str) -> str | None:
    value, output = (exact(draft.weights[f"{prefix}{name}.weight"]) for name in ("v", "o"))
    if not all(bool(torch.isfinite(each).all()) for each in (value, output)):
        return "it has values that are NaN or infinite"
    found, basis = _values(attention, value)
    x = samples(draft.weights, prefix, attention)
    plain = _outputs(attention, x @ value.T, output)
    changed = _outputs(attention, x @ rounded(found, dtype).T, rounded(_in_basis(attention, output, basis), dtype))
    nmse = float((changed - plain).square().mean() / plain.square().mean())
    # written so that a NaN is refused
    return None if nmse <= NMSE_LIMIT else f"refused in {dtype} (NMSE {nmse:.1e}, at most {NMSE_LIMIT:.0e})"


def _outputs(attention: Attention, values: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    """What comes out where every query sees one position alone."""
    heads = values.reshape(len(values), attention.num_kv_heads, attention.head_dim)
    return heads.repeat_interleave(attention.num_heads // attention.num_kv_heads, dim=1).flatten(1) @ output.T


def _shrink(draft: Draft, prefix: str, attention: Attention) -> Attention:
    v, o, weights = attention.v, attention.o, draft.weights
    assert v is not None and o is not None
    value, output = weights[f"{prefix}v.weight"], weights[f"{prefix}o.weight"]
    draft.compute(f"{prefix}v.weight", v.weight_shape, value, lambda whole: _values(attention, whole)[0], value)
    draft.compute(
        f"{prefix}o.weight",
        o.weight_shape,
        output,
        lambda whole, values: _in_basis(attention, whole, _values(attention, values)[1]),
        output,
        value,
    )
    if v.bias:
        bias = weights[f"{prefix}v.bias"]

        def moved(own: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
            basis = _values(attention, values)[1]
            found: torch.Tensor = torch.linalg.solve(basis, own.reshape(attention.num_kv_heads, -1, 1))
            return found.flatten()

        draft.compute(f"{prefix}v.bias", (v.out_features,), bias, moved, bias, value)
    return replace(attention)


def _values(attention: Attention, whole: torch.Tensor) -> Shrunk:
    found, basis = zip(*map(_with_identity, whole.split(attention.head_dim)), strict=True)
    return torch.cat(found), torch.stack(basis)


def _with_identity(head: torch.Tensor) -> Shrunk:
    """M^-1 head with M = head[:, columns], and M."""
    columns = list(_pivots(head))
    basis = head[:, columns]
    found, info = torch.linalg.solve_ex(basis, head)
    if int(info):
        return torch.full_like(head, torch.nan), basis
    found[:, columns] = torch.eye(len(head), dtype=head.dtype)
    return found, basis


def _pivots(head: torch.Tensor) -> Iterator[int]:
    """As many columns as there are rows: each time the one with the most that the others do not span (pivoted QR)."""
    left = head.clone()
    for _ in range(len(head)):
        column = int(left.square().sum(dim=0).argmax())
        direction = left[:, column] / left[:, column].norm()
        left = left - torch.outer(direction, direction @ left)
        left[:, column] = 0.0
        yield column


def _in_basis(attention: Attention, output: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    """O M for the heads of each group."""
    group = attention.num_heads // attention.num_kv_heads
    heads = output.split(attention.head_dim, dim=1)
    return torch.cat([head @ basis[i // group] for i, head in enumerate(heads)], dim=1)
