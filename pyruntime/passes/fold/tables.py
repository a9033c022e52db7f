"""What depends on the token alone, computed once for each token of the vocabulary (Graef, arXiv 2402.13388)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

import torch

from pyruntime.checkpoint import Model
from pyruntime.ops.mlp import MlpAttrs
from pyruntime.ops.mlp import forward as mlp_forward
from pyruntime.ops.norm import norm_of
from pyruntime.passes.fold.draft import Draft
from pyruntime.passes.fold.matrices import matrix
from pyruntime.spec import (
    MLP,
    Attention,
    Cached,
    Layer,
    Linear,
    Norm,
    Replacement,
    Sublayer,
    linear_names,
    norm_names,
    sublayer_prefix,
    weight_shapes,
)

# rows of the vocabulary at a time: in float64 the hidden values of a wide MLP take some hundred MB
_ROWS: Final = 1024

# weights of one sublayer by role, such as up.weight, matrices written out
Own = Mapping[str, torch.Tensor]


def tabulate_first_layer(model: Model) -> Model:
    """`model` whose first attention takes queries, keys and values from a row for each token.

    table[t] = [q | k | v] of the normed embedding of t, before rotation and the norms of heads (Graef, arXiv
    2402.13388). In a parallel layer the MLP depends on the token alone too and goes into the embedding table.
    """
    draft = Draft.of(model)
    first = next(draft.sublayers(), None)
    obstacle = _no_table(draft, first)
    if obstacle is not None or first is None:
        draft.notes.append(obstacle or "no sublayer is left")
        return draft.finish("tabulate first layer")
    _, index, prefix, attention = first
    assert isinstance(attention, Attention)
    width = _tabulate(draft, prefix, attention)
    gone = replace(attention, q=None, k=None, v=None, columns=None, rest=None, pre=None, table=True)
    draft.put("attention", index, gone)
    draft.rewritten.append(f"attention {index} q, k, v")
    layer = draft.layers[index]
    removed: tuple[str, ...] = ()
    if layer.parallel and layer.mlp is not None:
        rest = replace(layer, attention=None)
        reason = _not_token_only("mlp", rest)
        if reason is None:
            _embed_behind(draft, [rest])
            draft.put("mlp", index, None)
            removed = (f"mlp {index}",)
        else:
            draft.leave(reason, f"mlp {index}")
    _note_reads(draft, model, width)
    return draft.finish("tabulate first layer", removed)


def fold_mlp_prefix(model: Model) -> Model:
    """`model` whose sublayers before its first attention are part of the embedding table.

    E*[t] is the stream behind them; a head that was tied keeps the old table for itself. With learned positions nothing
    depends on the token alone.
    """
    draft = Draft.of(model)
    found: list[Layer] = []
    for layer in draft.layers:
        part, reason = _token_only_part(draft, layer)
        if any(True for _ in part.sublayers()):
            found.append(part)
        if reason is not None:
            draft.notes.append(f"the prefix ends before {reason}")
            break
    removed = tuple(f"{kind} {layer.index}" for layer in found for kind, _ in layer.sublayers())
    if found:
        _embed_behind(draft, found)
        for layer in found:
            for kind, _ in layer.sublayers():
                draft.put(kind, layer.index, None)
    return draft.finish("fold MLP prefix", removed)


def _no_table(draft: Draft, first: tuple[str, int, str, Sublayer] | None) -> str | None:
    if first is None:
        return "no sublayer is left"
    kind, index, _, attention = first
    where = f"{kind} {index}"
    if not isinstance(attention, Attention):
        return f"{where} reads the stream first and is no attention; fold what stands before the first attention"
    if draft.embedding.positions is not None:
        return "learned positions add to the stream, so nothing depends on the token alone"
    if attention.table:
        return f"{where} has a table already"
    if attention.cached is not Cached.KEYS_VALUES:
        return f"{where} caches {attention.cached}, for which it needs its maps"
    if attention.in_size != attention.out_size:
        return f"{where} gives {attention.out_size} values from {attention.in_size}; a table needs equal widths"
    return None


def _tabulate(draft: Draft, prefix: str, attention: Attention) -> int:
    """Put the table in place of the maps; its width."""
    names = [name for name in ("q", "k", "v", "rest") if getattr(attention, name) is not None]
    roles = _roles(attention, names, ("pre",))
    scale, width = draft.embedding.scale, attention.q_size + 2 * attention.kv_size
    embedding = draft.weights["embedding.weight"]

    def formula(table: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
        own = _own(attention, roles, values)
        return _by_rows(table, width, lambda rows: _queries_keys_values(attention, own, rows * scale))

    like = draft.weights[f"{prefix}{names[0]}.weight"] if names else embedding
    sources = (embedding, *(draft.weights[prefix + role] for role in roles))
    draft.compute(f"{prefix}table.weight", (draft.embedding.vocab_size, width), like, formula, *sources)
    return width


def _by_rows(table: torch.Tensor, width: int, compute: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """`compute` of each row of `table`, [rows, width]; some rows at a time, so that nothing is there twice."""
    found = table.new_empty(len(table), width)
    for into, rows in zip(found.split(_ROWS), table.split(_ROWS), strict=True):
        into.copy_(compute(rows))
    return found


def _queries_keys_values(attention: Attention, own: Own, x: torch.Tensor) -> torch.Tensor:
    x = norm_of(attention.pre, "pre", own, x)
    if attention.columns is not None:
        return torch.cat([x, _linear("rest", own, x)], dim=1)[:, list(attention.columns)]
    return torch.cat([_linear(name, own, x) for name in "qkv"], dim=1)


def _note_reads(draft: Draft, before: Model, width: int) -> None:
    """Values that a step reads up to the first scores: table 1 of arXiv 2402.13388."""
    kept = weight_shapes(replace(before.spec, layers=tuple(draft.layers), embedding=draft.embedding, head=draft.head))
    gone = (tuple(weight.shape) for name, weight in before.weights.items() if name not in kept)
    # matrices alone, as the paper counts
    weights = sum(math.prod(shape) for shape in gone if len(shape) > 1)
    old, new = before.spec.embedding.size, draft.embedding.size + width
    shares = ", ".join(f"{_times((weights + n * old) / (n * new))} for {n}" for n in (1, 16, 256))
    draft.notes.append(
        f"matrices of {weights:,} weights are gone from the first layer; up to its scores a step of one token reads "
        f"{new:,} values where it read {weights + old:,} (less by tokens in a step: {shares})"
    )


def _times(share: float) -> str:
    return f"{share:,.0f}x" if share >= 10 else f"{share:.2g}x"


def _token_only_part(draft: Draft, layer: Layer) -> tuple[Layer, str | None]:
    """What of `layer` depends on the token alone, and what stands behind it that does not."""
    if draft.embedding.positions is not None:
        return replace(layer, attention=None, mlp=None), "the first sublayer: learned positions add to the stream"
    reasons = {kind: _not_token_only(kind, layer) for kind, _ in layer.sublayers()}
    obstacle = next((reason for reason in reasons.values() if reason is not None), None)
    if obstacle is None:
        return layer, None
    # the second of two serial sublayers may be the obstacle; parallel ones read the same stream, so they stay together
    keeps = not layer.parallel and reasons.get("attention", "") is None
    return replace(layer, attention=layer.attention if keeps else None, mlp=None), obstacle


def _not_token_only(kind: str, layer: Layer) -> str | None:
    sublayer = layer.attention if kind == "attention" else layer.mlp
    if isinstance(sublayer, MLP | Replacement):
        # what else stands in a parallel layer adds to the same stream
        without = layer.parallel and not sublayer.residual
        return f"{kind} {layer.index}, which has no residual" if without else None
    return f"{kind} {layer.index}, which is no plain MLP"


def _embed_behind(draft: Draft, layers: Sequence[Layer]) -> None:
    """Let the embedding table hold the stream behind `layers`."""
    if draft.head.tied:
        draft.weights["head.weight"] = draft.weights["embedding.weight"]
        draft.head = replace(draft.head, tied=False)
        draft.notes.append("the head has a table of its own now, as the embedding is another")
    parts = [(layer, kind, sublayer) for layer in layers for kind, sublayer in layer.sublayers()]
    roles = [_roles(sublayer, linear_names(sublayer), norm_names(sublayer)) for _, _, sublayer in parts]
    names = [
        sublayer_prefix(layer.index, kind) + role
        for (layer, kind, _), own in zip(parts, roles, strict=True)
        for role in own
    ]
    scale = draft.embedding.scale

    def formula(table: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
        left = iter(values)
        owns = [_own(each, own, [next(left) for _ in own]) for (_, _, each), own in zip(parts, roles, strict=True)]
        bodies = list(zip(parts, owns, strict=True))
        return _by_rows(table, size, lambda rows: _stream(bodies, rows * scale))

    table = draft.weights["embedding.weight"]
    size = parts[-1][2].out_size
    sources = (table, *(draft.weights[name] for name in names))
    draft.compute("embedding.weight", (draft.embedding.vocab_size, size), table, formula, *sources)
    draft.embedding = replace(draft.embedding, size=size, scale=1.0)


def _stream(bodies: Iterable[tuple[tuple[Layer, str, Sublayer], Own]], x: torch.Tensor) -> torch.Tensor:
    index, entry = -1, x
    for (layer, _, sublayer), own in bodies:
        if layer.index != index:
            index, entry = layer.index, x
        y = _body(sublayer, own, entry if layer.parallel else x)
        y = norm_of(sublayer.post, "post", own, y)
        x = _linear("shortcut", own, x) + y if sublayer.residual else y
    return x


def _body(sublayer: Sublayer, own: Own, x: torch.Tensor) -> torch.Tensor:
    x = norm_of(sublayer.pre, "pre", own, x)
    if isinstance(sublayer, Replacement):
        return _linear("linear", own, x)
    assert isinstance(sublayer, MLP)
    dense = {name: replace(linear, triangular=False) for name, linear in _linears(sublayer).items()}
    changes: dict[str, Any] = {name: linear for name, linear in dense.items() if name != "shortcut"}
    return mlp_forward(MlpAttrs(replace(sublayer, **changes)), own, x)


def _linear(role: str, own: Own, x: torch.Tensor) -> torch.Tensor:
    """`x` through the map under `role`, or `x` itself where there is none."""
    weight, bias = own.get(f"{role}.weight"), own.get(f"{role}.bias")
    return x if weight is None else torch.nn.functional.linear(x, weight, bias)


def _linears(sublayer: Sublayer) -> dict[str, Linear]:
    found = {name: getattr(sublayer, name) for name in linear_names(sublayer)}
    return {name: linear for name, linear in found.items() if linear is not None}


def _roles(sublayer: Sublayer, linears: Iterable[str], norms: Iterable[str]) -> tuple[str, ...]:
    """Names of the weights of these parts, without the sublayer's prefix."""
    found = []
    for name in linears:
        linear: Linear | None = getattr(sublayer, name)
        if linear is not None:
            found += [f"{name}.weight", *([f"{name}.bias"] if linear.bias else [])]
    for name in norms:
        norm: Norm | None = getattr(sublayer, name)
        if norm is not None:
            found += [f"{name}.{part}" for part in ("weight", "bias") if getattr(norm, part)]
    return tuple(found)


def _own(sublayer: Sublayer, roles: Sequence[str], values: Sequence[torch.Tensor]) -> Own:
    linears = _linears(sublayer)
    return {
        role: matrix(linears[role[:-7]], value) if role.endswith(".weight") and role[:-7] in linears else value
        for role, value in zip(roles, values, strict=True)
    }
