"""Choices that take several steps: scoring anew after each drop, and dropping for a wanted speed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from pyruntime.checkpoint import Model
from pyruntime.errors import UsageError
from pyruntime.passes import drop
from pyruntime.prune.calibration import Calibration
from pyruntime.prune.identity import plan_of
from pyruntime.prune.score import Progress, ScoreOptions, lowered_without, mean_loss, score
from pyruntime.prune.scores import PERPLEXITY, Scores
from pyruntime.prune.select import (
    Pick,
    Selection,
    candidates,
    check_met,
    plan_for,
    ranking,
    said_by,
    without,
)
from pyruntime.prune.speed import Machine, decode_seconds
from pyruntime.spec import DropPlan, ModelSpec

# shown each pick when it is made
OnPick = Callable[[Pick], None]
_OPTIONS: Final = ScoreOptions()
_BYTES_ALONE: Final = Machine()
_ROUNDING: Final = 1e-12


def select_iteratively(
    model: Model,
    calibration: Calibration,
    selection: Selection,
    options: ScoreOptions = _OPTIONS,
    *,
    progress: Progress | None = None,
    on_pick: OnPick | None = None,
) -> DropPlan:
    """Drop the lowest, score what is left anew, and so on until the budget is met.

    What was dropped is absent while the rest is scored, and nothing else is: the other sublayer of its layer runs. By
    perplexity this is the greedy search of SLEB (arXiv 2402.09025, blocks) and BlockPruner (arXiv 2406.10594, joint).
    Raises the errors of `select` and `score`.
    """
    if selection.speedup is not None:
        raise UsageError("SELECT", "iterative with speedup; a speed is chosen for by one-shot scores")
    # runs are not looked at; what cannot be measured so is refused here
    options = replace(options, metrics=(selection.metric,), runs=())
    spec, picks = model.spec, list[Pick]()
    total, met = len(candidates(spec, selection.kinds)), selection.met(model.spec)
    while len(picks) < total and not met(picks):
        pick = _next(model, picks, calibration, selection, options, progress)
        picks.append(pick)
        if on_pick is not None:
            on_pick(pick)
    check_met(spec, picks, selection)
    order = ", ".join(map(str, picks))
    text = f"{calibration.num_tokens} tokens of {calibration.source or 'text'} (sha256 {calibration.text_sha256[:12]})"
    return plan_for(picks, f"{said_by(selection, None)}, {text}: {order}")


def _next(
    model: Model,
    picks: Sequence[Pick],
    calibration: Calibration,
    selection: Selection,
    options: ScoreOptions,
    progress: Progress | None,
) -> Pick:
    """The sublayer that is missed least where `picks` are gone."""
    gone = plan_for(picks, "")
    left = drop(model, gone) if picks else model
    if selection.metric == PERPLEXITY:
        return _least_loss(left, calibration, selection, options, progress)
    scores = score(left, calibration, options, progress=progress)
    return ranking(left.spec, scores, selection)[0]


def _least_loss(
    model: Model, calibration: Calibration, selection: Selection, options: ScoreOptions, progress: Progress | None
) -> Pick:
    places = candidates(model.spec, selection.kinds)
    how: dict[str, Any] = {"dtype": options.dtype, "target": options.target, "device": options.device}
    found = []
    for number, (kind, i) in enumerate(places, 1):
        plan = lowered_without(model, plan_of(kind, i), how)
        found.append(Pick(kind, i, mean_loss(plan, calibration.sequences)))
        if progress is not None:
            progress(number * calibration.num_tokens, len(places) * calibration.num_tokens)
    # the first of equals
    return min(found, key=lambda pick: pick.score)


def select_for_speedup(
    spec: ModelSpec, scores: Scores | None, selection: Selection, machine: Machine = _BYTES_ALONE
) -> DropPlan:
    """Drop what costs least score per second saved, until a decode step is `speedup` times as fast as now.

    What costs nothing, or helps by being gone (a score of 0 or less), is dropped before, whatever the speed. At the end
    take back what the last picks made superfluous, and put smaller ones in their place where that loses less.
    Raises UsageError SELECT, naming the best that can be reached.
    """
    if selection.speedup is None:
        raise UsageError("SELECT", "select_for_speedup without speedup; give one")
    context = selection.context_of(spec)

    def seconds(picks: Sequence[Pick]) -> float:
        return decode_seconds(without(spec, picks), selection.batch, context, selection.itemsize, machine)

    now = seconds([])
    limit = now / selection.speedup * (1 + _ROUNDING)
    ranked = ranking(spec, scores, selection)
    saved = {pick: now - seconds([pick]) for pick in ranked}
    free = [pick for pick in ranked if saved[pick] > 0 and pick.score <= 0]
    rest = [pick for pick in ranked if saved[pick] > 0 and pick.score > 0]
    useful = free + sorted(rest, key=lambda pick: pick.score / saved[pick])
    fastest = seconds(useful)
    if fastest > limit:
        raise UsageError(
            "SELECT",
            f"speedup {selection.speedup} at batch {selection.batch}, context {context} is out of reach for target "
            f"{selection.target}: {now / fastest:.3f} without all of it",
        )
    if now <= limit:
        raise UsageError("SELECT", f"speedup is {selection.speedup}; expected more than 1")
    picks = free + _enough(useful[len(free) :], saved, now - limit - sum(saved[pick] for pick in free))
    # savings add up but for the seams of fused nodes
    while seconds(picks) > limit:
        picks.append(next(pick for pick in useful if pick not in picks))
    origin = f"{said_by(selection, scores)}, context {context}, predicted {now / seconds(picks):.3f}"
    return plan_for(picks, origin)


def _enough(useful: Sequence[Pick], saved: Mapping[Pick, float], needed: float) -> list[Pick]:
    """The first of `useful` that save `needed` seconds; then fewer, or others of lower score, that do so too."""
    picks: list[Pick] = []
    total = 0.0
    for pick in useful:
        if total >= needed:
            break
        picks.append(pick)
        total += saved[pick]
    for pick in sorted(picks, key=lambda pick: pick.score, reverse=True):
        if total - saved[pick] >= needed:
            picks.remove(pick)
            total -= saved[pick]
    for pick in sorted(picks, key=lambda pick: pick.score, reverse=True):
        others = sorted((each for each in useful if each not in picks), key=lambda each: each.score)
        cheaper = (each for each in others if each.score < pick.score)
        better = next((each for each in cheaper if total - saved[pick] + saved[each] >= needed), None)
        if better is not None:
            picks[picks.index(pick)] = better
            total += saved[better] - saved[pick]
    return picks
