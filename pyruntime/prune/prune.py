"""One call from a checkpoint to a smaller one: score if needed, choose, write."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from pyruntime.checkpoint import Model, read_model, resolve_model
from pyruntime.checkpoint.folder import ReadOptions
from pyruntime.checkpoint.writer import Written, check_target, write_pruned
from pyruntime.engine.texts import default_text
from pyruntime.errors import UsageError
from pyruntime.prune.calibration import Calibration, CalibrationOptions, read_calibration
from pyruntime.prune.greedy import OnPick, select_for_speedup, select_iteratively
from pyruntime.prune.identity import KINDS
from pyruntime.prune.score import Progress, ScoreOptions, score
from pyruntime.prune.scores import PERPLEXITY, Scores
from pyruntime.prune.select import Selection, select
from pyruntime.prune.speed import Machine
from pyruntime.spec import DropPlan, drop_sublayers

_LOGGER: Final = logging.getLogger("pyruntime")
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

    Raises UsageError SCORES for scores of another model, where neither scores nor text are given, and for those that
    the choice does not look at.
    """
    _refuse_unused(selection, scores, calibration)
    if selection.method == "iterative":
        if calibration is None:
            raise UsageError("SCORES", "the iterative method scores anew after each drop; give it a text")
        plan = select_iteratively(model, calibration, selection, options, progress=progress, on_pick=on_pick)
        return plan, None
    if scores is not None:
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
    wait: bool = False,
    progress: Progress | None = None,
) -> Pruned:
    """Write the checkpoint `source` (a folder or a Hub id) without what `selection` chooses, or a plan names, as `out`.

    Scores are taken from `scores`, or measured on the file `text`, or on the text that comes with the package, which is
    logged. Raises the errors of `choose`, `read_calibration` and `write_pruned`, and UsageError DROP for a plan that
    drops nothing.
    """
    folder = resolve_model(source, revision)
    files = [each for each in (scores, text) if isinstance(each, Path)]
    check_target(out, [folder, *files], overwrite)
    model = read_model(folder, read)
    if isinstance(scores, Path):
        scores = Scores.load(scores)
    found = None
    if isinstance(selection, DropPlan):
        if scores is not None or text is not None:
            raise UsageError("DROP", "scores or a text beside a plan; expected one or the other")
        plan = selection
    else:
        if text is None and scores is None and selection.measures:
            text = default_text()
            _LOGGER.warning("scored on the text that comes with the package; give text for one of your own")
        sequences = None if text is None else read_calibration(text, folder, model.spec.max_position, calibration)
        plan, found = choose(
            model, selection, scores=scores, calibration=sequences, options=options, machine=machine, progress=progress
        )
    check_drops(model, plan)
    written = write_pruned(
        folder,
        plan,
        out,
        dialect=dialect,
        config_only=config_only,
        overwrite=overwrite,
        wait=wait,
        made=made_of(plan, found, None if isinstance(selection, DropPlan) else selection),
        read=read,
    )
    return Pruned(plan, found, written)


def check_drops(model: Model, plan: DropPlan) -> None:
    """Raise UsageError DROP for a plan that takes nothing from the model: it would be written as it is."""
    if drop_sublayers(model.spec, plan) == model.spec:
        what = "names only what is gone already" if plan else "is empty"
        raise UsageError("DROP", f"the plan {what}, so it drops nothing; name what the model still has")


def made_of(plan: DropPlan, scores: Scores | None, selection: Selection | None) -> Mapping[str, Any]:
    """What the manifest of a pruned checkpoint says of its making: the scores of what was dropped, and their text.

    The scores are of what `selection` chose: attentions and MLPs, or blocks, or a run of blocks.
    """
    if scores is None or selection is None:
        return {"chosen": plan.origin}
    whole = scores.to_json()
    gone = {"attention": plan.attention, "mlp": plan.mlp, "block": plan.attention}
    figures: dict[str, dict[str, dict[str, float | None]]] = {
        metric: {kind: {str(i): kinds[kind][i] for i in gone[kind]} for kind in selection.kinds if gone[kind]}
        for metric, kinds in scores.values.items()
        if all(kind in kinds for kind in selection.kinds)
    }
    if selection.method == "consecutive":
        first, length = min(plan.attention), len(plan.attention)
        for metric, runs in scores.runs.items():
            if length in runs:
                figures.setdefault(metric, {})[f"run of {length}"] = {str(first): runs[length][first]}
    about = ("text", "text_sha256", "tokens_sha256", "tokenizer_sha256", "seed", "num_seqs", "num_tokens", "dtype")
    return {"chosen": plan.origin, "scores": {**{name: whole[name] for name in about}, "of_dropped": figures}}


def _refuse_unused(selection: Selection, scores: Scores | None, calibration: Calibration | None) -> None:
    given = [name for name, each in (("scores", scores), ("a text", calibration)) if each is not None]
    if selection.method == "iterative" and scores is not None:
        raise UsageError("SCORES", "scores for the iterative method, which scores anew after each drop; give a text")
    if given and not selection.measures:
        raise UsageError("SCORES", f"{' and '.join(given)} for a rule, which looks at none; leave them out")
    if len(given) > 1:
        raise UsageError("SCORES", "both scores and a text were given; expected one of them")


def _needed(model: Model, selection: Selection, options: ScoreOptions) -> ScoreOptions:
    """What is measured for one choice: every statistic, as they come in one pass; perplexities only if asked for."""
    runs = options.runs
    if selection.method == "consecutive":
        runs = (selection.count(model.spec) or 1,)
    if selection.metric == PERPLEXITY:
        return replace(options, metrics=(PERPLEXITY,), kinds=tuple(k for k in KINDS if k in selection.kinds))
    return replace(options, runs=() if runs is None else runs)
