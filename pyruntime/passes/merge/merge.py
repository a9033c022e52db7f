"""Merging projections of skipless models away: the pass, layer by layer, behind a gate."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

import torch

from pyruntime.checkpoint import Model
from pyruntime.errors import RunError, UsageError
from pyruntime.passes.fold import fold_norms
from pyruntime.passes.fold.gate import CHANGE_LIMITS
from pyruntime.passes.merge.basis import Memo
from pyruntime.passes.merge.budget import check_budget, num_changes
from pyruntime.passes.merge.forms import Candidate, entry, output, rewrite
from pyruntime.passes.merge.gate import Precision, invertible, measure, passes
from pyruntime.passes.merge.options import (
    MAX_COND,
    MAX_NMSE,
    Form,
    GateMode,
    LayerMerge,
    Measured,
    MergeKind,
    MergeOptions,
    MergeReport,
)
from pyruntime.passes.merge.stream import Impossible, Singular, apply
from pyruntime.spec import EXPERT_MAPS, ModelSpec, MoE, weight_shapes

_DTYPES: Final = tuple(MAX_COND)
_ENTRIES: Final[dict[MergeKind, tuple[Form, ...]]] = {
    MergeKind.Q_P: (Form.Q,),
    MergeKind.K_P: (Form.K,),
    MergeKind.V_P: (Form.V,),
    MergeKind.Q: (Form.Q,),
    MergeKind.P: (),
    MergeKind.PIVOTED: (Form.PIVOTED,),
    MergeKind.TRIANGULAR: (Form.TRIANGULAR,),
    MergeKind.AUTO: (Form.Q, Form.PIVOTED, Form.K, Form.V, Form.TRIANGULAR),
}
_OUTPUTS: Final[dict[MergeKind, tuple[Form, ...]]] = {
    MergeKind.Q: (),
    MergeKind.TRIANGULAR: (Form.TRIANGULAR,),
    MergeKind.AUTO: (Form.P, Form.TRIANGULAR),
}
# tried in this order where the form asked for does not pass
_FALL_BACK: Final = (Form.PIVOTED, Form.K, Form.V)
_NO_INVERSE: Final = Measured(float("inf"), float("nan"), float("nan"))
_SQUARE: Final = (MergeKind.K_P, MergeKind.V_P)
_BEHIND_NORMS: Final = (MergeKind.TRIANGULAR, MergeKind.AUTO)
_NAMES: Final = {Form.Q: "Q", Form.K: "K", Form.V: "V", Form.P: "P", Form.PIVOTED: "the chosen columns of [Q|K|V]"}


# ratio of errors up to which auto takes Q, whose columns need no map
_ABOUT_AS_ACCURATE: Final = 2.0
_DEFAULT: Final = MergeOptions()


def merge(model: Model, options: MergeOptions = _DEFAULT, progress: Callable[[int, int], None] | None = None) -> Model:
    """`model` with projections merged into their neighbours: the same function, fewer weights. Its last report tells.

    Exact for layers without residuals (Graef, "Transformer tricks: Removing weights for skipless transformers", arXiv
    2404.12362), also behind RMSNorm in the triangular form. Weights are read here for each form that the gate measures,
    and again, layer by layer, when the result is read. `progress` is called with (layers done, layers in all).

    Raises UsageError MERGE where nothing can be merged, or no K or V that was asked for, RunError MERGE_ILL_CONDITIONED
    where the gate refuses, RunError MEMORY where a layer needs more than `max_memory`.
    """
    merger = _Merger.of(model, options)
    check_budget(model.spec, merger.dtype, options.max_memory)
    # the triangular form and cancelled norms need the gains out of the way
    foldable = merger.kind in _BEHIND_NORMS or any(each.v_norm is not None for _, each in model.spec.attentions())
    merged = fold_norms(model) if foldable and _has_gains(model.spec) else model
    rows = []
    for index in range(len(model.spec.layers)):
        merged, row = merger.layer(merged, index)
        rows.append(row)
        if progress is not None:
            progress(len(rows), len(model.spec.layers))
    # who asks for K or V must be told, though P went
    square = options.kind in _SQUARE
    if all(row.entry is None and (square or row.output is None) for row in rows):
        raise UsageError("MERGE", f"nothing can be merged: {_why(model.spec, options.kind, rows)}")
    return replace(
        merged, dtype=merger.precision.stored, reports=(*model.reports, _report(model, merged, options, rows))
    )


@dataclass(frozen=True, slots=True)
class _Tried:
    """What a form makes of the model, and what the gate says of it."""

    form: Form
    merged: Model
    measured: Measured
    complaint: str
    passed: bool


def _preferred(pivoted: _Tried, q: _Tried) -> bool:
    """Whether the pivoted form saves as much and Q costs far more accuracy."""
    saves = read_per_token(pivoted.merged.spec) <= read_per_token(q.merged.spec)
    return pivoted.passed and saves and q.measured.nmse > _ABOUT_AS_ACCURATE * pivoted.measured.nmse


@dataclass(frozen=True, slots=True)
class _Merger:
    """What one call of `merge` goes by."""

    kind: MergeKind
    gate: GateMode
    precision: Precision
    memo: Memo
    streams: Mapping[int, torch.Tensor]

    @classmethod
    def of(cls, model: Model, options: MergeOptions) -> _Merger:
        stored = options.store_dtype or model.dtype
        run = options.dtype or stored
        for name in (stored, run):
            if name not in _DTYPES:
                raise UsageError("DTYPE", f"dtype {name!r} is not known; expected one of {', '.join(_DTYPES)}")
        memo = Memo(num_changes(model.spec))
        return cls(options.kind, options.gate_mode, Precision(run, stored), memo, options.streams)

    @property
    def dtype(self) -> torch.dtype:
        found = getattr(torch, self.precision.stored)
        assert isinstance(found, torch.dtype)
        return found

    def layer(self, model: Model, index: int) -> tuple[Model, LayerMerge]:
        """The model with layer `index` merged as far as possible, and what was done."""
        row = LayerMerge(index)
        before = read_per_token(model.spec)
        for place in (entry, output):
            model, row = self._place(model, row, place is output)
        return model, replace(row, num_weights=before - read_per_token(model.spec))

    def _place(self, model: Model, row: LayerMerge, at_output: bool) -> tuple[Model, LayerMerge]:
        """The first form that fits and passes, at the entry or at the output of a layer."""
        # reason -> the forms that it stands against
        against: dict[str, list[str]] = {}
        refused = False
        for form in self._forms(at_output):
            # a form that does not fit has its reason; only after a refusal is another one a fall-back
            if form not in self._asked(at_output) and not refused:
                continue
            label = _label(form, at_output)
            try:
                tried = self._try(model, row.index, form, at_output)
            except Impossible as reason:
                against.setdefault(str(reason), []).append(label)
                continue
            if tried.passed or (self.gate is GateMode.FORCE and invertible(tried.measured)):
                return self._taken(model, row, tried, at_output, _lines(against) if refused else [])
            if self.gate is not GateMode.FALL_BACK:
                advice = _advice(self.gate, tried.measured)
                raise RunError("MERGE_ILL_CONDITIONED", f"layer {row.index}: {label}: {tried.complaint}; {advice}")
            against.setdefault(tried.complaint, []).append(label)
            refused = True
        return model, replace(row, notes=(*row.notes, *_lines(against)))

    def _try(self, model: Model, index: int, form: Form, at_output: bool) -> _Tried:
        """One form, measured. Raises Impossible."""
        try:
            candidate = self._candidate(model, index, form, at_output)
            merged = self._worth(model, candidate)
            measured = measure(model, candidate, self.precision, index, self.streams)
        except Singular as reason:
            return _Tried(form, model, _NO_INVERSE, str(reason), False)
        complaint = _complaint(form, measured, self.precision)
        return _Tried(form, merged, measured, complaint, passes(measured, self.precision))

    def _taken(
        self, model: Model, row: LayerMerge, tried: _Tried, at_output: bool, notes: Sequence[str]
    ) -> tuple[Model, LayerMerge]:
        if self.kind is MergeKind.AUTO and tried.form is Form.Q and tried.passed:
            with contextlib.suppress(Impossible):
                other = self._try(model, row.index, Form.PIVOTED, at_output)
                tried = other if _preferred(other, tried) else tried
        return tried.merged, _done(row, tried.form, tried.measured, at_output, not tried.passed, notes)

    def _candidate(self, model: Model, index: int, form: Form, at_output: bool) -> Candidate:
        if not at_output:
            return entry(model, index, form, self.memo)
        layer = model.spec.layers[index]
        if layer.parallel and layer.mlp is not None and self._asked(False):
            raise Impossible("attention and MLP are parallel: one change of basis removes Q or P, not both (--kind p)")
        return output(model, index, form, self.memo)

    def _asked(self, at_output: bool) -> tuple[Form, ...]:
        return _OUTPUTS.get(self.kind, (Form.P,)) if at_output else _ENTRIES[self.kind]

    def _forms(self, at_output: bool) -> tuple[Form, ...]:
        asked = self._asked(at_output)
        fall_back = self.gate is GateMode.FALL_BACK and bool(asked) and not at_output
        return tuple(dict.fromkeys((*asked, *_FALL_BACK))) if fall_back else asked

    def _worth(self, model: Model, candidate: Candidate) -> Model:
        """The model so rewritten. Raises Impossible where a token would read no fewer weights."""
        merged = apply(model, rewrite(model, candidate, self.dtype))
        saved = read_per_token(model.spec) - read_per_token(merged.spec)
        if saved <= 0:
            raise Impossible(f"a token would read {-saved} weights more")
        return merged


def read_per_token(spec: ModelSpec) -> int:
    """Weights that decoding one token reads: not the tables that it looks one row up in, nor experts it passes by."""
    looked_up = {"embedding.position.weight"} if spec.head.tied else {"embedding.weight", "embedding.position.weight"}
    found = sum(
        math.prod(shape)
        for name, shape in weight_shapes(spec).items()
        if name not in looked_up and not name.endswith(".table.weight")
    )
    for layer in spec.layers:
        if isinstance(layer.mlp, MoE):
            maps = [getattr(layer.mlp, name) for name in EXPERT_MAPS]
            expert = sum(math.prod(each.weight_shape) + each.bias * each.out_features for each in maps)
            found -= (layer.mlp.num_experts - layer.mlp.top_k) * expert
    return found


def _has_gains(spec: ModelSpec) -> bool:
    norms = [each.pre for layer in spec.layers for _, each in layer.sublayers() if not each.residual]
    return any(norm is not None and (norm.weight or norm.bias) for norm in norms)


def _lines(against: dict[str, list[str]]) -> list[str]:
    return [f"{', '.join(forms)}: {reason}" for reason, forms in against.items()]


def _label(form: Form, at_output: bool) -> str:
    if form is Form.TRIANGULAR:
        return "triangular P" if at_output else "triangular Q"
    return "pivoted Q" if form is Form.PIVOTED else form.value.upper()


def _done(
    row: LayerMerge, form: Form, measured: Measured, at_output: bool, forced: bool, notes: Sequence[str]
) -> LayerMerge:
    row = replace(row, notes=(*row.notes, *notes), forced=row.forced or forced)
    if at_output:
        return replace(row, output=form, output_measured=measured)
    return replace(row, entry=form, entry_measured=measured)


def _complaint(form: Form, measured: Measured, precision: Precision) -> str:
    """What the gate found, with its limits."""
    parts = [f"NMSE {measured.nmse:.2g} (at most {MAX_NMSE:.0e}, unmerged {measured.unmerged:.2g})"]
    if measured.cond is not None:
        limit = MAX_COND[precision.run]
        parts.insert(0, f"condition number {measured.cond:.3g} of {_NAMES[form]} (at most {limit:.0e})")
    if measured.drift is not None:
        parts.append(f"change by the norm's epsilon {measured.drift:.2g} (at most {CHANGE_LIMITS[precision.run]:.0e})")
    return f"{', '.join(parts)} in {precision.run}"


def _advice(gate: GateMode, measured: Measured) -> str:
    if measured.cond is None:
        return "nothing is inverted here, so this is an overflow or NaN in the weights: choose a wider --store-dtype"
    if gate is GateMode.FORCE:
        return "what has no inverse cannot be forced: merge P alone (--kind p) or choose --gate fall-back"
    return "choose --kind pivoted, --gate fall-back, a wider --dtype, or --gate force"


def _report(model: Model, merged: Model, options: MergeOptions, rows: Sequence[LayerMerge]) -> MergeReport:
    itemsize = getattr(torch, options.store_dtype or model.dtype).itemsize
    before, after = (sum(math.prod(shape) for shape in weight_shapes(each.spec).values()) for each in (model, merged))
    return MergeReport(
        name=f"merge ({options.kind.value})",
        removed=tuple(_removed(rows)),
        num_weights=before - after,
        weight_bytes=(before - after) * itemsize,
        kv_values_per_token=0,
        notes=tuple(_notes(model, merged, rows)),
        layers=tuple(rows),
        read_before=read_per_token(model.spec),
        read_after=read_per_token(merged.spec),
    )


def _why(spec: ModelSpec, kind: MergeKind, rows: Sequence[LayerMerge]) -> str:
    reason = next((f"layer {row.index}: {note}" for row in rows for note in row.notes), "there is no attention")
    if kind in _SQUARE and any(each.kv_size < each.in_size and not each.residual for _, each in spec.attentions()):
        return f"{reason}; with fewer key-value heads than query heads only Q can be merged (--kind q+p or pivoted)"
    if kind is not MergeKind.AUTO and any(not each.residual for _, each in spec.attentions()):
        return f"{reason}; choose --kind auto, which takes what fits each layer"
    return (
        f"{reason}. Merging is exact only in models without residuals (skipless); `pyruntime fold` has the exact "
        "rewrites for all others"
    )


def _removed(rows: Sequence[LayerMerge]) -> Iterator[str]:
    for row in rows:
        if row.entry is not None:
            yield f"{_label(row.entry, False)} of layer {row.index}"
        if row.output is not None:
            yield f"{_label(row.output, True)} of layer {row.index}"


def _notes(model: Model, merged: Model, rows: Sequence[LayerMerge]) -> Iterator[str]:
    if model.spec.head.tied and not merged.spec.head.tied:
        count = math.prod(merged.weights["head.weight"].shape)
        yield f"the head is no longer tied to the embedding: {count} weights more are stored, and none more is read"
    if _has_gains(model.spec) and not _has_gains(merged.spec):
        yield "gains and biases of norms were folded first (pyruntime fold)"
    for row in rows:
        yield from (f"layer {row.index}: {note}" for note in row.notes)
        if row.forced:
            yield f"layer {row.index}: forced through the gate"
