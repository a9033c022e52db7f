"""What a merge costs in accuracy, measured beforehand: the layer's own arithmetic in the dtype it will run in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch

from pyruntime.checkpoint import Model
from pyruntime.checkpoint.computed import exact
from pyruntime.passes.fold.cancel import largest_change
from pyruntime.passes.fold.draft import Draft
from pyruntime.passes.fold.gate import CHANGE_LIMITS
from pyruntime.passes.merge.basis import Change
from pyruntime.passes.merge.forms import Candidate
from pyruntime.passes.merge.options import MAX_COND, MAX_NMSE, Measured
from pyruntime.passes.merge.stream import Impossible, Map, attention_of
from pyruntime.spec import Norm, NormKind, sublayer_prefix

# rows of the sample, and of each large matrix the inputs or outputs that it looks at
NUM_ROWS: Final = 128
SIDE: Final = 512


@dataclass(frozen=True, slots=True)
class Precision:
    """Weights are rounded to `stored`, then weights and stream to `run`; float64 for either rounds nothing."""

    run: str
    stored: str

    def weight(self, x: torch.Tensor) -> torch.Tensor:
        """A weight as it is multiplied with."""
        return self.stream(x.to(getattr(torch, self.stored)))

    def stream(self, x: torch.Tensor) -> torch.Tensor:
        """Values of the stream, in the dtype that products of such operands are summed in."""
        return x.to(getattr(torch, self.run)).to(torch.float64 if self.run == "float64" else torch.float32)


EXACT: Final = Precision("float64", "float64")
# matrix and bias of a map; no matrix is the identity
_Affine = tuple[torch.Tensor | None, torch.Tensor | None]
_NOTHING: Final[_Affine] = (None, None)


@dataclass(frozen=True, slots=True)
class _Path:
    """Input to stream to what is compared."""

    writers: Sequence[_Affine]
    norm: Norm | None
    readers: Mapping[str, _Affine]

    def run(self, inputs: list[torch.Tensor], precision: Precision) -> dict[str, torch.Tensor]:
        """What each reader gives, float64 [rows, outputs]."""
        parts = [_apply(writer, precision.stream(x), precision) for x, writer in zip(inputs, self.writers, strict=True)]
        stream = precision.stream(torch.stack(parts).sum(0))
        stream = precision.stream(_normed(self.norm, stream))
        return {name: _apply(reader, stream, precision).double() for name, reader in self.readers.items()}


def _apply(affine: _Affine, x: torch.Tensor, precision: Precision) -> torch.Tensor:
    matrix, bias = affine
    y = x if matrix is None else x @ precision.weight(matrix)
    return y if bias is None else y + precision.weight(bias)


def measure(
    model: Model, candidate: Candidate, precision: Precision, index: int, streams: Mapping[int, torch.Tensor]
) -> Measured:
    """Condition number and errors of `candidate` of layer `index`, inputs of writers normal with unit variance.

    Where the embedding writes the stream, its own rows are the sample; `streams` are those of `MergeOptions`. Raises
    Impossible where a norm would be cancelled and none of them says what it reads.
    """
    drift = _drift(model, index, streams) if candidate.cancelled else None
    change = candidate.basis.change(*map(exact, candidate.basis.sources))
    cond = change.cond
    if cond is not None and not cond < float("inf"):
        return Measured(cond, float("nan"), float("nan"), drift)
    generator = torch.Generator().manual_seed(index)
    inputs, before = _before(model, candidate, generator)
    # what the inputs lose by rounding is no fault of the merge
    inputs = [precision.stream(x).double() for x in inputs]
    after = _after(candidate, change, before)
    expected = _compared(candidate, before.run(inputs, EXACT))
    found = _compared(candidate, _columns(candidate, after.run(inputs, precision)))
    baseline = _compared(candidate, before.run(inputs, precision))
    return Measured(cond, _worst_nmse(found, expected), _worst_nmse(baseline, expected), drift)


def passes(measured: Measured, precision: Precision) -> bool:
    """Whether the measured merge may be done; NaN never may."""
    conditioned = measured.cond is None or measured.cond <= MAX_COND[precision.run]
    undrifted = measured.drift is None or measured.drift <= CHANGE_LIMITS[precision.run]
    return conditioned and undrifted and measured.nmse <= MAX_NMSE


def invertible(measured: Measured) -> bool:
    """Whether the merge has values at all, so that it can be forced."""
    finite = measured.cond is None or measured.cond < 1 / torch.finfo(torch.float64).eps
    return finite and measured.nmse < float("inf")


def _before(model: Model, candidate: Candidate, generator: torch.Generator) -> tuple[list[torch.Tensor], _Path]:
    """A sample of what the writers read, and the path as it is; of large matrices a part, the same in both paths."""
    boundary = candidate.boundary
    readers = {each.name: _outputs(model, candidate, each, generator) for each in boundary.readers}
    if not boundary.writers:
        table = exact(model.weights["embedding.weight"]) * model.spec.embedding.scale
        rows = table[torch.randperm(len(table), generator=generator)[:NUM_ROWS]]
        if model.spec.embedding.positions is not None:
            places = exact(model.weights["embedding.position.weight"])
            rows = rows + places[torch.randint(len(places), (len(rows),), generator=generator)]
        return [torch.eye(len(rows), dtype=torch.float64)], _Path([(rows, None)], boundary.norm, readers)
    inputs = []
    writers: list[_Affine] = []
    for writer in boundary.writers:
        matrix, bias = exact(writer.weight(model)).T, writer.bias(model)
        if writer.name not in candidate.gone and len(matrix) > SIDE:
            matrix = matrix[torch.randperm(len(matrix), generator=generator)[:SIDE]]
        inputs.append(torch.randn(NUM_ROWS, len(matrix), dtype=torch.float64, generator=generator))
        writers.append((matrix, None if bias is None else exact(bias)))
    return inputs, _Path(writers, boundary.norm, readers)


def _outputs(model: Model, candidate: Candidate, reader: Map, generator: torch.Generator) -> _Affine:
    matrix, bias = exact(reader.weight(model)).T, reader.bias(model)
    offset = None if bias is None else exact(bias)
    whole = reader.name in candidate.gone | candidate.triangular or reader.name.endswith((".q", ".k", ".v"))
    if whole or matrix.shape[1] <= SIDE:
        return matrix, offset
    part = torch.randperm(matrix.shape[1], generator=generator)[:SIDE]
    return matrix[:, part], None if offset is None else offset[part]


def _after(candidate: Candidate, change: Change, before: _Path) -> _Path:
    gone, boundary = candidate.gone, candidate.boundary
    names = [each.name for each in boundary.writers] or ["embedding"]
    writers: list[_Affine] = []
    for name, (matrix, bias) in zip(names, before.writers, strict=True):
        # the bias of a map that is gone is the readers' business
        new = None if name in gone or bias is None else change.write(bias[None])[0]
        if not writers and change.offset is not None:
            new = change.offset if new is None else new + change.offset
        writers.append((None if name in gone else change.write(_present(matrix)), new))
    readers = {
        name: _NOTHING if name in gone else _reader(change, _present(matrix), bias)
        for name, (matrix, bias) in before.readers.items()
        if name not in gone or candidate.columns is None
    }
    if candidate.columns is not None:
        readers |= _rest(candidate, change, before)
    norm = boundary.norm
    if norm is not None:
        norm = (
            None if candidate.cancelled else Norm(kind=NormKind.RMS, size=candidate.width, eps=norm.eps, weight=False)
        )
    return _Path(writers, norm, readers)


def _reader(change: Change, matrix: torch.Tensor, bias: torch.Tensor | None) -> _Affine:
    if change.origin is None:
        return change.read(matrix), bias
    added = change.origin @ matrix
    return change.read(matrix), added if bias is None else bias + added


def _rest(candidate: Candidate, change: Change, before: _Path) -> dict[str, _Affine]:
    """The stream itself, and the columns that are computed from it."""
    parts = [(_present(matrix), bias) for name, (matrix, bias) in before.readers.items() if name in candidate.gone]
    x = torch.cat([matrix for matrix, _ in parts], dim=1)
    zero = torch.zeros(1, dtype=x.dtype)
    c = torch.cat([zero.expand(matrix.shape[1]) if bias is None else bias for matrix, bias in parts])
    chosen = set(candidate.chosen)
    others = [column for column in range(x.shape[1]) if column not in chosen]
    return {"stream": _NOTHING, "rest": _reader(change, x[:, others], c[others])}


def _columns(candidate: Candidate, found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Queries, keys and values by their own names again."""
    if candidate.columns is None:
        return found
    rest = found.pop("rest")
    values = torch.cat([found.pop("stream"), rest], dim=1)[:, list(candidate.columns)]
    sizes = {each.name: each.linear.out_features for each in candidate.boundary.readers if each.name in candidate.gone}
    parts = values.split(list(sizes.values()), dim=1)
    return dict(zip(sizes, parts, strict=True)) | found


def _compared(candidate: Candidate, found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Queries, keys and values behind their norms, where these cancel what is to be removed."""
    return {
        name: _normed_heads(candidate.cancelled[name[-1]], values) if candidate.cancelled else values
        for name, values in found.items()
    }


def _normed_heads(norm: Norm, values: torch.Tensor) -> torch.Tensor:
    heads = values.unflatten(1, (-1, norm.size))
    normed: torch.Tensor = heads * torch.rsqrt(heads.square().mean(-1, keepdim=True) + norm.eps)
    return normed.flatten(1)


def _drift(model: Model, index: int, streams: Mapping[int, torch.Tensor]) -> float:
    """Largest change of a normed value by the epsilon that a cancelled norm leaves behind."""
    if index not in streams:
        raise Impossible(
            "the norms of q, k and v undo the norm before them but for their epsilon, and without streams that the "
            "attention really reads (MergeOptions.streams) nothing is known of its effect"
        )
    attention = attention_of(model.spec.layers[index])
    return largest_change(Draft.of(model), sublayer_prefix(index, "attention"), attention, streams[index].double())


def _normed(norm: Norm | None, x: torch.Tensor) -> torch.Tensor:
    """A norm whose gain was folded."""
    if norm is None:
        return x
    if norm.kind in (NormKind.LAYER, NormKind.LAYER_ONE_PLUS):
        x = x - x.mean(-1, keepdim=True)
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.eps)


def _worst_nmse(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> float:
    # Python's max passes over a NaN
    return float(torch.tensor([_nmse(found[name], expected[name]) for name in expected], dtype=torch.float64).max())


def _nmse(found: torch.Tensor, expected: torch.Tensor) -> float:
    # a bias carries nothing: what differs from row to row does
    power = float((expected - expected.mean(0)).square().sum())
    error = float((found - expected).square().sum())
    # a map of zeros is met by zeros
    return 0.0 if error == power == 0.0 else error / power if power > 0.0 else float("inf")


def _present(matrix: torch.Tensor | None) -> torch.Tensor:
    assert matrix is not None
    return matrix
