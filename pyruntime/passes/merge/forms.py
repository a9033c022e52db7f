"""The forms a merge can take in one layer: what is removed, in which basis, and the rewrite that comes of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Final

import torch

from pyruntime.checkpoint import Model, Weight
from pyruntime.checkpoint.computed import Computed, exact
from pyruntime.passes.merge.algebra import Factored, packed, pivot_columns, upper_first
from pyruntime.passes.merge.basis import Basis, Change, Into, Memo, OutOf, Rotated
from pyruntime.passes.merge.options import Form
from pyruntime.passes.merge.stream import (
    Boundary,
    Impossible,
    Map,
    Rewrite,
    Singular,
    attention_of,
    boundary_after,
    boundary_before,
    boundary_inside,
)
from pyruntime.spec import Attention, Linear, Norm, NormKind, sublayer_prefix

_RMS: Final = (NormKind.RMS, NormKind.RMS_ONE_PLUS)
_LAYER: Final = (NormKind.LAYER, NormKind.LAYER_ONE_PLUS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One way to change the basis of a stream.

    `gone` are the maps that become the identity, `triangular` the one that becomes triangular. `columns` of the pivoted
    form are those of `Attention.columns`; its `chosen` are the columns of [Q|K|V] that the stream becomes. `cancelled`
    are norms of queries, keys and values that make the one before them redundant. `fields` change beside the maps.
    """

    form: Form
    boundary: Boundary
    basis: Basis
    width: int
    gone: frozenset[str] = frozenset()
    triangular: frozenset[str] = frozenset()
    columns: tuple[int, ...] | None = None
    chosen: tuple[int, ...] = ()
    cancelled: dict[str, Norm] = field(default_factory=dict)
    fields: dict[str, Any] = field(default_factory=dict)


def entry(model: Model, index: int, form: Form, memo: Memo) -> Candidate:
    """What replaces Q (or K, V) of layer `index`. Raises Impossible."""
    attention = attention_of(model.spec.layers[index])
    boundary = boundary_before(model.spec, index)
    if form is Form.TRIANGULAR:
        return _triangular_entry(model, index, attention, boundary, memo)
    prefix = sublayer_prefix(index, "attention")
    fields: dict[str, Any] = {}
    cancelled: dict[str, Norm] = {}
    if boundary.norm is not None:
        cancelled = _cancelling(attention, boundary)
        fields[f"{prefix}pre"] = None
    maps = {each.name.removeprefix(prefix): each for each in boundary.readers if each.name.startswith(prefix)}
    if form is Form.PIVOTED:
        return _pivoted(model, boundary, list(maps.values()), prefix, cancelled, fields, memo)
    chosen = maps[form]
    if chosen.linear.out_features < boundary.width:
        raise Impossible(f"{form} gives {chosen.linear.out_features} values, fewer than the stream's {boundary.width}")
    basis = Basis(((chosen.weight(model), chosen.bias(model)),), _into, memo)
    return Candidate(
        form=form,
        boundary=boundary,
        basis=basis,
        width=chosen.linear.out_features,
        gone=frozenset({chosen.name}),
        cancelled=cancelled,
        fields=fields,
    )


def output(model: Model, index: int, form: Form, memo: Memo) -> Candidate:
    """What replaces P of layer `index`. Raises Impossible."""
    layer = model.spec.layers[index]
    attention = attention_of(layer)
    if attention.o is None:
        raise Impossible("the attention has no output projection any more")
    if attention.table and attention.o.in_features != attention.o.out_features:
        raise Impossible("an attention with a table stands on a stream as wide as its output, which would change")
    parallel = layer.parallel and layer.mlp is not None
    boundary = boundary_after(model.spec, index) if parallel else boundary_inside(model.spec, index)
    name = sublayer_prefix(index, "attention") + "o"
    o = Map(name, attention.o)
    if form is Form.TRIANGULAR:
        return _triangular_output(model, index, o, boundary, memo, parallel)
    if boundary.norm is not None:
        raise Impossible("a norm stands behind the output projection; the triangular form is exact there")
    if parallel and o.linear.in_features != o.linear.out_features:
        raise Impossible("the output projection of a parallel layer is not square")
    make = partial(_out_of, inverted=parallel)
    return Candidate(
        form=form,
        boundary=boundary,
        basis=Basis(((o.weight(model), o.bias(model)),), make, memo, leaves=True),
        width=o.linear.in_features,
        gone=frozenset({name}),
    )


def rewrite(model: Model, candidate: Candidate, dtype: torch.dtype) -> Rewrite:
    """What `candidate` changes; new weights are rounded to `dtype` when they are read."""
    found = Rewrite(candidate.fields, {})
    if not candidate.boundary.writers:
        found |= _table(model, candidate, dtype)
    for i, writer in enumerate(candidate.boundary.writers):
        found |= _writer(model, candidate, writer, dtype, first=i == 0)
    for reader in candidate.boundary.readers:
        found |= _reader(model, candidate, reader, dtype)
    return found | _rest(candidate, dtype) if candidate.columns is not None else found


def _cancelling(attention: Attention, boundary: Boundary) -> dict[str, Norm]:
    """The norms of queries, keys and values that undo any scale of the input (FlashNorm, proposition 3)."""
    norms = {"q": attention.q_norm, "k": attention.k_norm, "v": attention.v_norm}
    found = {role: norm for role, norm in norms.items() if norm is not None and norm.kind in _RMS}
    if len(boundary.readers) != 3 or len(found) != 3 or any(each.linear.bias for each in boundary.readers):
        raise Impossible("a norm stands before the attention; the triangular form is exact there")
    assert boundary.norm is not None
    if boundary.norm.kind not in _RMS or boundary.norm.bias or boundary.norm.weight:
        raise Impossible(
            "the norm before the attention is no RMSNorm without bias, so that of q, k and v does not undo it"
        )
    return found


def _pivoted(
    model: Model,
    boundary: Boundary,
    maps: list[Map],
    prefix: str,
    cancelled: dict[str, Norm],
    fields: dict[str, Any],
    memo: Memo,
) -> Candidate:
    parts = tuple((each.weight(model), each.bias(model)) for each in maps)
    total = sum(each.linear.out_features for each in maps)
    if total <= boundary.width:
        raise Impossible(f"queries, keys and values are {total} values, no more than the stream's {boundary.width}")
    chosen = pivot_columns(torch.cat([exact(weight).T for weight, _ in parts], dim=1))
    if chosen is None:
        raise Singular(f"[Q|K|V] has fewer than {boundary.width} independent columns, or NaN")
    basis = Basis(parts, partial(_into_columns, chosen=chosen), memo)
    place = {column: i for i, column in enumerate(chosen)}
    others = (column for column in range(total) if column not in place)
    place |= {column: boundary.width + i for i, column in enumerate(others)}
    columns = tuple(place[column] for column in range(total))
    rest = Linear(in_features=boundary.width, out_features=total - boundary.width, bias=basis.biased)
    return Candidate(
        form=Form.PIVOTED,
        boundary=boundary,
        basis=basis,
        width=boundary.width,
        gone=frozenset(each.name for each in maps),
        columns=columns,
        chosen=chosen,
        cancelled=cancelled,
        fields={**fields, f"{prefix}columns": columns, f"{prefix}rest": rest},
    )


def _triangular_entry(model: Model, index: int, attention: Attention, boundary: Boundary, memo: Memo) -> Candidate:
    norm = _weightless(boundary)
    if attention.q_size != boundary.width:
        raise Impossible(f"Q is {boundary.width}x{attention.q_size}; a triangular one is square")
    kinds = {each.name.split(".")[2] for each in boundary.readers}
    q = boundary.readers[0]
    return Candidate(
        form=Form.TRIANGULAR,
        boundary=boundary,
        basis=Basis(((q.weight(model), None),), partial(_rotated_in, centred=norm.kind in _LAYER), memo),
        width=boundary.width,
        triangular=frozenset({q.name}),
        fields={f"{sublayer_prefix(index, kind)}pre": replace(norm, kind=NormKind.RMS) for kind in kinds},
    )


def _triangular_output(model: Model, index: int, o: Map, boundary: Boundary, memo: Memo, parallel: bool) -> Candidate:
    norm = _weightless(boundary)
    if parallel:
        raise Impossible("attention and MLP are parallel; only Q can become triangular")
    if o.linear.in_features != o.linear.out_features:
        raise Impossible(f"P is {o.linear.in_features}x{o.linear.out_features}; a triangular one is square")
    return Candidate(
        form=Form.TRIANGULAR,
        boundary=boundary,
        basis=Basis(((o.weight(model), None),), partial(_rotated_out, centred=norm.kind in _LAYER), memo),
        width=boundary.width,
        triangular=frozenset({o.name}),
        fields={f"{sublayer_prefix(index, 'mlp')}pre": replace(norm, kind=NormKind.RMS)},
    )


def _weightless(boundary: Boundary) -> Norm:
    """The norm before the readers, its gain folded."""
    if boundary.norm is None:
        raise Impossible("no norm stands there: the other forms save more")
    if boundary.norm.weight or boundary.norm.bias:
        raise Impossible("the norm has a gain or a bias that could not be folded")
    return boundary.norm


def _into(x: torch.Tensor, offset: torch.Tensor | None) -> Change:
    return Into(x, Factored.of(x), offset)


def _into_columns(x: torch.Tensor, offset: torch.Tensor | None, *, chosen: tuple[int, ...]) -> Change:
    columns = list(chosen)
    return _into(x[:, columns], None if offset is None else offset[columns])


def _out_of(x: torch.Tensor, origin: torch.Tensor | None, *, inverted: bool) -> Change:
    return OutOf(x, Factored.of(x) if inverted else None, origin)


def _rotated_in(x: torch.Tensor, offset: torch.Tensor | None, *, centred: bool) -> Change:
    return Rotated(torch.linalg.qr(x).Q, centred)


def _rotated_out(x: torch.Tensor, offset: torch.Tensor | None, *, centred: bool) -> Change:
    if centred:
        x = x - x.mean(1, keepdim=True)
    return Rotated(upper_first(x)[1].T, centred)


def _table(model: Model, candidate: Candidate, dtype: torch.dtype) -> Rewrite:
    """The embedding in the new basis, its scale and an offset in its rows; a tied head keeps the old table."""
    embedding, head = model.spec.embedding, model.spec.head
    basis, old = candidate.basis, model.weights["embedding.weight"]
    shape = (embedding.vocab_size, candidate.width)
    rows = partial(_new_rows, basis, embedding.scale, True)
    weights: dict[str, Weight] = {"embedding.weight": Computed(shape, dtype, rows, (old, *basis.sources))}
    if embedding.positions is not None:
        positions = (model.weights["embedding.position.weight"], *basis.sources)
        shape = (embedding.positions, candidate.width)
        weights["embedding.position.weight"] = Computed(shape, dtype, partial(_new_rows, basis, 1.0, False), positions)
    if head.tied:
        weights["head.weight"] = old
    fields = {"embedding": replace(embedding, size=candidate.width, scale=1.0), "head.tied": False}
    return Rewrite(fields, weights)


def _writer(model: Model, candidate: Candidate, writer: Map, dtype: torch.dtype, first: bool) -> Rewrite:
    if writer.name in candidate.gone:
        return Rewrite({writer.name: None}, {})
    basis, bias = candidate.basis, writer.bias(model)
    offset = first and basis.offsets
    linear = Linear(
        in_features=writer.linear.in_features,
        out_features=candidate.width,
        bias=bias is not None or offset,
        triangular=writer.name in candidate.triangular,
    )
    sources = (writer.weight(model), *basis.sources)
    weights = {f"{writer.name}.weight": _matrix(linear, dtype, partial(_new_writer, basis), sources)}
    if linear.bias:
        own = () if bias is None else (bias,)
        formula = partial(_new_writer_bias, basis, bool(own), offset)
        weights[f"{writer.name}.bias"] = Computed((candidate.width,), dtype, formula, (*own, *basis.sources))
    return Rewrite({writer.name: linear}, weights)


def _reader(model: Model, candidate: Candidate, reader: Map, dtype: torch.dtype) -> Rewrite:
    if reader.name in candidate.gone:
        return Rewrite({reader.name: None}, {})
    basis, bias = candidate.basis, reader.bias(model)
    linear = Linear(
        in_features=candidate.width,
        out_features=reader.linear.out_features,
        bias=bias is not None or basis.biased,
        triangular=reader.name in candidate.triangular,
    )
    matrix = reader.weight(model)
    weights = {f"{reader.name}.weight": _matrix(linear, dtype, partial(_new_reader, basis), (matrix, *basis.sources))}
    if bias is not None and not basis.biased:
        weights[f"{reader.name}.bias"] = bias
    elif linear.bias:
        own = () if bias is None else (bias,)
        formula = partial(_new_reader_bias, basis, bool(own))
        sources = (matrix, *own, *basis.sources)
        weights[f"{reader.name}.bias"] = Computed((linear.out_features,), dtype, formula, sources)
    return Rewrite({reader.name: linear}, weights)


def _rest(candidate: Candidate, dtype: torch.dtype) -> Rewrite:
    """The columns of [Q|K|V] that are computed from those the stream holds."""
    (name, rest), *_ = [(key, each) for key, each in candidate.fields.items() if key.endswith(".rest")]
    basis, chosen = candidate.basis, set(candidate.chosen)
    others = [column for column in range(len(candidate.columns or ())) if column not in chosen]
    weight = partial(_new_rest, basis, others)
    weights = {f"{name}.weight": Computed(rest.weight_shape, dtype, weight, basis.sources)}
    if rest.bias:
        bias = partial(_new_rest_bias, basis, others)
        weights[f"{name}.bias"] = Computed((rest.out_features,), dtype, bias, basis.sources)
    return Rewrite({}, weights)


def _matrix(
    linear: Linear, dtype: torch.dtype, formula: Callable[..., torch.Tensor], sources: tuple[Weight, ...]
) -> Weight:
    """The new matrix, [in, out] as `formula` gives it, as `linear` stores it."""
    stored = partial(_stored, linear.triangular, formula)
    return Computed(linear.weight_shape, dtype, stored, sources)


def _stored(triangular: bool, formula: Callable[..., torch.Tensor], *sources: torch.Tensor) -> torch.Tensor:
    matrix = formula(*sources)
    return packed(matrix) if triangular else matrix.T


def _new_rows(basis: Basis, scale: float, offset: bool, rows: torch.Tensor, *sources: torch.Tensor) -> torch.Tensor:
    change = basis.change(*sources)
    new = change.write(rows * scale)
    return new if not offset or change.offset is None else new + change.offset


def _new_writer(basis: Basis, matrix: torch.Tensor, *sources: torch.Tensor) -> torch.Tensor:
    return basis.change(*sources).write(matrix.T)


def _new_writer_bias(basis: Basis, own: bool, offset: bool, *sources: torch.Tensor) -> torch.Tensor:
    change = basis.change(*sources[own:])
    parts = [change.write(sources[0][None])[0]] if own else []
    if offset:
        assert change.offset is not None
        parts.append(change.offset)
    return torch.stack(parts).sum(0)


def _new_reader(basis: Basis, matrix: torch.Tensor, *sources: torch.Tensor) -> torch.Tensor:
    return basis.change(*sources).read(matrix.T)


def _new_reader_bias(basis: Basis, own: bool, matrix: torch.Tensor, *sources: torch.Tensor) -> torch.Tensor:
    origin = basis.change(*sources[own:]).origin
    assert origin is not None
    added = matrix @ origin
    return sources[0] + added if own else added


def _new_rest(basis: Basis, others: list[int], *sources: torch.Tensor) -> torch.Tensor:
    x, _ = basis.matrix(*sources)
    return basis.change(*sources).read(x[:, others]).T


def _new_rest_bias(basis: Basis, others: list[int], *sources: torch.Tensor) -> torch.Tensor:
    x, offset = basis.matrix(*sources)
    origin = basis.change(*sources).origin
    assert offset is not None and origin is not None
    return offset[others] + origin @ x[:, others]
