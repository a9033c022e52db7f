"""Everything that is asked of one model in one go, and the same beside the dense model's."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from pyruntime.engine.load import Loaded
from pyruntime.evaluate.choices import ChoiceResult, multiple_choice, pair_window
from pyruntime.evaluate.divergence import Divergence, divergence
from pyruntime.evaluate.identity import plan_settings
from pyruntime.evaluate.items import Item
from pyruntime.evaluate.long_context import (
    CopyLoss,
    CopyProbe,
    copies_json,
    copy_losses,
    losses_by_position,
    positions_json,
)
from pyruntime.evaluate.perplexity import TextQuality, change, text_quality
from pyruntime.evaluate.statistics import mean_of
from pyruntime.evaluate.texts import TokenizedText
from pyruntime.plan.likelihood import LogitRows, Progress

# a progress bar for (what, number of tokens)
Bars = Callable[[str, int], AbstractContextManager[Progress]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Measures:
    """What to measure; None or nothing leaves a measure out."""

    text: TokenizedText | None = None
    tasks: Mapping[str, tuple[Item, ...]] = dataclasses.field(default_factory=dict)
    copies: CopyProbe | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """What one plan gave, measure by measure."""

    settings: Mapping[str, Any]
    quality: TextQuality | None = None
    divergence: Divergence | None = None
    tasks: Mapping[str, ChoiceResult] = dataclasses.field(default_factory=dict)
    copies: tuple[CopyLoss, ...] | None = None

    def to_json(self) -> dict[str, Any]:
        """Every figure, JSON-ready; what was not measured is left out."""
        found: dict[str, Any] = dict(self.settings)
        if self.quality is not None:
            found |= self.quality.to_json()
            found["by_position"] = positions_json(losses_by_position(self.quality.text.windows, self.quality.losses))
        if self.divergence is not None:
            found["divergence"] = self.divergence.to_json()
        if self.tasks:
            found["tasks"] = {name: result.to_json() for name, result in self.tasks.items()}
        if self.copies is not None:
            found["copying"] = copies_json(self.copies)
        return found


def measure(
    loaded: Loaded, measures: Measures, bars: Bars, what: str, reference: Iterator[LogitRows] | None = None
) -> Findings:
    """Measure one model; with `reference` rows its divergence from them too. `what` is its name on the bars."""
    plan, text, quality, distance = loaded.plan, measures.text, None, None
    if text is not None:
        with bars(f"text, {what}", sum(len(window.token_ids) for window in text.windows)) as bar:
            if reference is None:
                quality = text_quality(plan, text, bar)
            else:
                distance = divergence(reference, plan, text.windows, text.units, bar)
                quality = TextQuality(text, distance.losses)
    tasks = {name: _choose(loaded, items, bars, f"{name}, {what}") for name, items in measures.tasks.items()}
    copies = None
    if (probe := measures.copies) is not None:
        with bars(f"copying, {what}", sum(len(window.token_ids) for window in probe.windows)) as bar:
            copies = copy_losses(plan, probe, bar)
    spec, path = loaded.model.spec, loaded.model.path
    settings = {
        # where it lies is nobody's business
        "model": None if path is None else path.resolve().name,
        **plan_settings(plan),
        "drop_attn_list": list(spec.dropped("attention")),
        "drop_mlp_list": list(spec.dropped("mlp")),
    }
    return Findings(settings=settings, quality=quality, divergence=distance, tasks=tasks, copies=copies)


def compared(dense: Findings, found: Findings) -> dict[str, Any]:
    """How `found` differs from `dense` on the same texts and items, with errors of pairs, JSON-ready.

    `perplexity_change` is relative; `acc_change` and its like are differences of accuracies; `copying` is the part of
    the dense model's gain that is left, None where the dense model gains nothing.
    """
    figures: dict[str, Any] = {}
    if dense.quality is not None and found.quality is not None:
        pair = change(dense.quality, found.quality)
        figures |= {"perplexity_change": pair.mean, "perplexity_change_stderr": pair.error}
    if found.tasks:
        figures["tasks"] = {name: _accuracies(dense.tasks[name], each) for name, each in found.tasks.items()}
    if dense.copies is not None and found.copies is not None:
        figures["copying"] = [
            {"distance": after.distance, "gain_kept": after.gain.mean / gain if (gain := _gained(before)) else None}
            for before, after in zip(dense.copies, found.copies, strict=True)
        ]
    return figures


def _choose(loaded: Loaded, items: tuple[Item, ...], bars: Bars, what: str) -> ChoiceResult:
    assert loaded.tokenizer is not None
    plan, tokenizer = loaded.plan, loaded.tokenizer
    windows = [pair_window(plan, tokenizer, *pair) for item in items for pair in item.pairs]
    with bars(what, sum(len(window.token_ids) for window in windows)) as bar:
        return multiple_choice(plan, items, windows, bar)


def _accuracies(dense: ChoiceResult, found: ChoiceResult) -> dict[str, float | None]:
    figures: dict[str, float | None] = {}
    for name in ("acc", "acc_norm", "acc_token"):
        pairs = zip(getattr(dense, name), getattr(found, name), strict=True)
        pair = mean_of([float(after) - float(before) for before, after in pairs])
        figures |= {f"{name}_change": pair.mean, f"{name}_change_stderr": pair.error}
    return figures


def _gained(dense: CopyLoss) -> float | None:
    """The dense model's gain where it is one: more than two standard errors above nothing."""
    gain = dense.gain
    return gain.mean if gain.mean > 2 * (gain.error or 0.0) else None
