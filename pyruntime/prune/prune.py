"""One call from a checkpoint to a smaller one: score if needed, choose, write."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from pyruntime.checkpoint import Model, read_model, resolve_model
from pyruntime.checkpoint.folder import ReadOptions
from pyruntime.checkpoint.writer import Written, write_pruned
from pyruntime.errors import UsageError
from pyruntime.prune.calibration import Calibration, CalibrationOptions, read_calibration
from pyruntime.prune.greedy import OnPick, select_for_speedup, select_iteratively
from pyruntime.prune.identity import KINDS
from pyruntime.prune.score import Progress, ScoreOptions, score
from pyruntime.prune.scores import PERPLEXITY, Scores
from pyruntime.prune.select import Selection, select
from pyruntime.prune.speed import Machine
from pyruntime.spec import DropPlan

_CALIBRATION: Final = CalibrationOptions()
_OPTIONS: Final = ScoreOptions()
_BYTES_ALONE: Final = Machine()


@dataclass(frozen=True, slots=True)
class Pruned:
    """What was dropped, the scores it was chosen by (None for rules and iterative choices), and what was written."""

    plan: DropPlan
    scores: Scores | None
    written: Written


def choose(
    model: Model,
    selection: Selection,
    *,
    scores: Scores | None = None,
    calibration: Calibration | None = None,
    options: ScoreOptions = _OPTIONS,
    machine: Machine = _BYTES_ALONE,
    progress: Progress | None = None,
    on_pick: OnPick | None = None,
) -> tuple[DropPlan, Scores | None]:
    """The plan that `selection` asks for and the scores behind it, measured on `calibration` where they are needed.

    Raises UsageError SCORES for scores of another model, and where neither scores nor text are given.
    """
    if selection.method == "iterative":
        if calibration is None:
            raise UsageError("SCORES", "the iterative method scores anew after each drop; give it a text")
        plan = select_iteratively(model, calibration, selection, options, progress=progress, on_pick=on_pick)
        return plan, None
    if not selection.needs_scores:
        scores = None
    elif scores is not None:
        scores.check_model(model)
    elif calibration is not None:
        scores = score(model, calibration, _needed(model, selection, options), progress=progress)
    if selection.speedup is not None:
        return select_for_speedup(model.spec, scores, selection, machine), scores
    return select(model.spec, scores, selection), scores


def prune(
    source: str | Path,
    out: Path,
    selection: Selection | DropPlan,
    *,
    scores: Scores | Path | None = None,
    text: Path | None = None,
    calibration: CalibrationOptions = _CALIBRATION,
    options: ScoreOptions = _OPTIONS,
    machine: Machine = _BYTES_ALONE,
    revision: str | None = None,
    read: ReadOptions = ReadOptions(),
    dialect: str = "hf",
    config_only: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Pruned:
    """Write the checkpoint `source` (a folder or a Hub id) without what `selection` chooses, or a plan names, as `out`.

    Scores are taken from `scores`, or measured on the file `text`. Raises the errors of `choose`, `read_calibration`
    and `write_pruned`.
    """
    folder = resolve_model(source, revision)
    model = read_model(folder, read)
    if isinstance(scores, Path):
        scores = Scores.load(scores)
    if isinstance(selection, DropPlan):
        plan, found = selection, None
    else:
        sequences = None
        if text is not None and (scores is None or not selection.needs_scores):
            sequences = read_calibration(text, folder, model.spec.max_position, calibration)
        plan, found = choose(
            model,
            selection,
            scores=scores,
            calibration=sequences,
            options=options,
            machine=machine,
            progress=progress,
        )
    written = write_pruned(
        folder,
        plan,
        out,
        dialect=dialect,
        config_only=config_only,
        overwrite=overwrite,
        made=made_of(plan, found),
        read=read,
    )
    return Pruned(plan, found, written)


def made_of(plan: DropPlan, scores: Scores | None) -> Mapping[str, Any]:
    """What the manifest of a pruned checkpoint says of its making: the scores of what was dropped, and their text."""
    if scores is None:
        return {"chosen": plan.origin}
    whole = scores.to_json()
    figures = {
        metric: {kind: {str(i): kinds[kind][i] for i in gone if i < len(kinds[kind])} for kind, gone in _gone(plan)}
        for metric, kinds in scores.values.items()
        if all(kind in kinds for kind, _ in _gone(plan))
    }
    about = ("text", "text_sha256", "tokens_sha256", "tokenizer_sha256", "seed", "num_seqs", "num_tokens", "dtype")
    return {"chosen": plan.origin, "scores": {**{name: whole[name] for name in about}, "of_dropped": figures}}


def _gone(plan: DropPlan) -> list[tuple[str, tuple[int, ...]]]:
    return [(kind, gone) for kind, gone in (("attention", plan.attention), ("mlp", plan.mlp)) if gone]


def _needed(model: Model, selection: Selection, options: ScoreOptions) -> ScoreOptions:
    """What is measured for one choice: every statistic, as they come in one pass; perplexities only if asked for."""
    runs = options.runs
    if selection.method == "consecutive":
        runs = (selection.count(model.spec) or 1,)
    if selection.metric == PERPLEXITY:
        return replace(options, metrics=(PERPLEXITY,), kinds=tuple(k for k in KINDS if k in selection.kinds))
    return replace(options, runs=() if runs is None else runs)
