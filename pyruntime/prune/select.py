"""From scores, or a rule, to a DropPlan. Ties go to the lower layer, and to the attention before the MLP."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from pyruntime.errors import UsageError
from pyruntime.passes import parse_layers
from pyruntime.prune.identity import is_droppable, plan_of
from pyruntime.prune.scores import METRICS, RUN_METRICS, Scores
from pyruntime.prune.speed import kv_bytes
from pyruntime.spec import DropPlan, ModelSpec, drop_sublayers

# kinds of sublayers by the names that LLM-Drop's users know
TARGETS: Final[dict[str, tuple[str, ...]]] = {
    "attn": ("attention",),
    "mlp": ("mlp",),
    "block": ("block",),
    "joint": ("attention", "mlp"),
}
METHODS: Final = ("one-shot", "iterative", "consecutive", "last", "keep-last")
# orders that need no text
RULES: Final = ("reverse", "random")
_BUDGETS: Final = ("drop_n", "drop_ratio", "kv_bytes", "speedup")
_CONTEXT: Final = 256


@dataclass(frozen=True, slots=True)
class Pick:
    """One sublayer, or one block, and what it scored."""

    kind: str
    index: int
    score: float

    def __str__(self) -> str:
        return f"{self.kind} {self.index}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """What is to be dropped, how it is chosen, and one budget.

    `drop_n` sublayers (or blocks), a `drop_ratio` of those of the target, rounded down; or as many as it takes for a
    cache of at most `kv_bytes` bytes, or a decode step `speedup` times as fast as now: both for `batch` sequences of
    `context` tokens (None: 256, or what a shorter model holds) at `itemsize` bytes a value. `seed` is that of the
    random order. Raises UsageError SELECT for contradictions.
    """

    target: str = "attn"
    metric: str = "cosine"
    method: str = "one-shot"
    drop_n: int | None = None
    drop_ratio: float | None = None
    kv_bytes: int | None = None
    speedup: float | None = None
    batch: int = 1
    context: int | None = None
    itemsize: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value, known in (
            ("target", self.target, tuple(TARGETS)),
            ("metric", self.metric, (*METRICS, *RULES)),
            ("method", self.method, METHODS),
        ):
            if value not in known:
                raise UsageError("SELECT", f"{name} is {value!r}; expected one of {', '.join(known)}")
        said = [name for name in _BUDGETS if getattr(self, name) is not None]
        if len(said) != 1:
            raise UsageError("SELECT", f"{' and '.join(said) or 'no budget'} given; expected one of {_names(_BUDGETS)}")
        _check_number("drop_n", self.drop_n, 1, math.inf, whole=True)
        _check_number("drop_ratio", self.drop_ratio, 0, 1)
        _check_number("kv_bytes", self.kv_bytes, 0, math.inf, whole=True)
        _check_number("speedup", self.speedup, 1, math.inf)
        _check_number("batch", self.batch, 1, math.inf, whole=True)
        _check_number("context", self.context, 0, math.inf, whole=True)
        if self.kv_bytes is not None and self.target not in ("attn", "block"):
            raise UsageError("SELECT", f"kv_bytes with target {self.target}; only attn and block free cache")
        self._check_method()

    def _check_method(self) -> None:
        if self.speedup is not None and self.method != "one-shot":
            raise UsageError("SELECT", f"speedup with method {self.method}; a speed is chosen for by one-shot scores")
        if self.method == "consecutive" and (self.target != "block" or self.metric not in RUN_METRICS):
            raise UsageError(
                "SELECT", f"consecutive {self.target} by {self.metric}; runs are of blocks, by {_names(RUN_METRICS)}"
            )
        if self.method in ("last", "keep-last") and self.target == "joint":
            raise UsageError("SELECT", f"method {self.method} with target joint; say attn, mlp or block")
        if self.method == "iterative" and self.metric in RULES:
            raise UsageError("SELECT", f"iterative {self.metric}; scoring anew changes nothing there: use one-shot")

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of sublayers of the target."""
        return TARGETS[self.target]

    @property
    def needs_scores(self) -> bool:
        """Whether the choice looks at a file of scores: rules and iterative choices do not."""
        return self.metric not in RULES and self.method in ("one-shot", "consecutive")

    @property
    def measures(self) -> bool:
        """Whether the choice rests on something measured: rules do not."""
        return self.needs_scores or self.method == "iterative"

    def context_of(self, spec: ModelSpec) -> int:
        """Tokens before the new one. Raises UsageError CONTEXT for more than the model holds."""
        return decode_context(spec, self.context)

    def count(self, spec: ModelSpec) -> int | None:
        """How many are dropped, where a number or a ratio says so. Raises UsageError SELECT for more than there are."""
        there = len(candidates(spec, self.kinds))
        if self.drop_ratio is not None:
            count = math.floor(self.drop_ratio * there + 1e-9)
            if count == 0:
                raise UsageError("SELECT", f"drop_ratio {self.drop_ratio} of {there} is none; raise it")
            return count
        if self.drop_n is not None and self.drop_n > there:
            raise UsageError("SELECT", f"drop_n is {self.drop_n}; {there} of target {self.target} can be dropped")
        return self.drop_n

    def met(self, spec: ModelSpec) -> Callable[[Sequence[Pick]], bool]:
        """A function that says whether `spec` without some picks keeps to the budget, a speed-up excepted."""
        count = self.count(spec)
        if count is not None:
            return lambda picks: len(picks) >= count
        context, limit = self.context_of(spec), self.kv_bytes
        assert limit is not None
        return lambda picks: kv_bytes(without(spec, picks), self.batch, context, self.itemsize) <= limit


def decode_context(spec: ModelSpec, context: int | None) -> int:
    """`context`, or 256 or what a shorter model holds. Raises UsageError CONTEXT for more than the model holds."""
    longest = spec.max_position - 1
    if context is not None and context > longest:
        raise UsageError("CONTEXT", f"context is {context}; before a new token the model holds at most {longest}")
    return min(_CONTEXT, longest) if context is None else context


def select(spec: ModelSpec, scores: Scores | None, selection: Selection) -> DropPlan:
    """Choose once, by `scores` or a rule; `select_for_speedup` and `select_iteratively` are the other ways.

    Joint: one sort over all attentions and all MLPs, nothing normalised (He et al. 2024, arXiv 2406.15786, section 7).
    Raises UsageError SELECT or SCORES.
    """
    if selection.speedup is not None or selection.method == "iterative":
        raise UsageError("SELECT", "a speed-up and the iterative method need select_for_speedup, select_iteratively")
    if selection.method == "consecutive":
        picks = _run(spec, scores, selection)
    else:
        picks = within_budget(spec, ranking(spec, scores, selection), selection)
    return plan_for(picks, said_by(selection, scores))


def candidates(spec: ModelSpec, kinds: Iterable[str]) -> list[tuple[str, int]]:
    """What can be dropped: all of the first kind in order, then all of the next."""
    return [(kind, i) for kind in kinds for i in range(len(spec.layers)) if is_droppable(spec, kind, i)]


def ranking(spec: ModelSpec, scores: Scores | None, selection: Selection) -> list[Pick]:
    """All candidates, the one to drop first in front. Raises UsageError SCORES for one without a score."""
    places = candidates(spec, selection.kinds)
    if selection.method in ("last", "keep-last"):
        return _by_rule(places, selection)
    if selection.metric == "reverse":
        picks = [Pick(kind, i, float(len(spec.layers) - 1 - i)) for kind, i in places]
    elif selection.metric == "random":
        draw = random.Random(selection.seed)
        picks = [Pick(kind, i, draw.random()) for kind, i in places]
    else:
        picks = [Pick(kind, i, _score(spec, scores, selection.metric, kind, i)) for kind, i in places]
    # sorting keeps the order of equals
    return sorted(picks, key=lambda pick: pick.score)


def within_budget(spec: ModelSpec, ranked: Sequence[Pick], selection: Selection) -> list[Pick]:
    """The first picks that meet the budget. Raises UsageError SELECT where all of them do not."""
    picks: list[Pick] = []
    met = selection.met(spec)
    for pick in ranked:
        if met(picks):
            break
        picks.append(pick)
    check_met(spec, picks, selection)
    return picks


def check_met(spec: ModelSpec, picks: Sequence[Pick], selection: Selection) -> None:
    """Raise UsageError SELECT unless `picks` are some, and enough."""
    if not selection.met(spec)(picks):
        context = selection.context_of(spec)
        least = kv_bytes(without(spec, picks), selection.batch, context, selection.itemsize)
        raise UsageError(
            "SELECT",
            f"no choice gives {selection.kv_bytes} bytes of cache at batch {selection.batch}, context {context}; the "
            f"least is {least}",
        )
    if not picks:
        raise UsageError("SELECT", f"the model keeps to kv_bytes {selection.kv_bytes} as it is; nothing is to drop")


def without(spec: ModelSpec, picks: Iterable[Pick]) -> ModelSpec:
    """`spec` without `picks`."""
    return drop_sublayers(spec, plan_for(picks, ""))


def plan_for(picks: Iterable[Pick], origin: str) -> DropPlan:
    """The plan that drops `picks`."""
    plans = [plan_of(pick.kind, pick.index) for pick in picks]
    return DropPlan(
        tuple(index for plan in plans for index in plan.attention),
        tuple(index for plan in plans for index in plan.mlp),
        origin,
    )


def said_by(selection: Selection, scores: Scores | None) -> str:
    """The sentence that a plan carries: how it was chosen, and on what text."""
    budget = next(f"{name} {getattr(selection, name)}" for name in _BUDGETS if getattr(selection, name) is not None)
    words = [f"{selection.method} {selection.target} by {selection.metric}"]
    if selection.method in ("last", "keep-last"):
        words = [f"{selection.method} {selection.target}"]
    elif selection.metric == "random":
        words.append(f"seed {selection.seed}")
    words.append(budget)
    if selection.kv_bytes is not None or selection.speedup is not None:
        words.append(f"batch {selection.batch}")
    if scores is not None and selection.needs_scores:
        words.append(f"{scores.num_tokens} tokens of {scores.text or 'text'} (sha256 {scores.text_sha256[:12]})")
    return ", ".join(words)


def _score(spec: ModelSpec, scores: Scores | None, metric: str, kind: str, index: int) -> float:
    found = _checked(spec, scores).of(metric, kind)[index]
    if found is None:
        raise UsageError("SCORES", f"the scores have no {metric} of {kind} {index}; score the model as it is now")
    return found


def _checked(spec: ModelSpec, scores: Scores | None) -> Scores:
    if scores is None:
        raise UsageError("SCORES", "this choice needs scores; give a text to score on, or a file of scores")
    if scores.num_layers != len(spec.layers):
        raise UsageError("SCORES", f"the scores are of {scores.num_layers} layers; the model has {len(spec.layers)}")
    return scores


def _by_rule(places: Sequence[tuple[str, int]], selection: Selection) -> list[Pick]:
    """The deepest first; keep-last leaves the very last one out."""
    if selection.drop_n is not None:
        # the rule says itself what it refuses
        tail = ":keep-last" if selection.method == "keep-last" else ""
        parse_layers(f"last:{selection.drop_n}{tail}", [i for _, i in places])
    kept = places[:-1] if selection.method == "keep-last" else places
    return [Pick(kind, i, float(len(places) - place)) for place, (kind, i) in reversed(list(enumerate(kept, 1)))]


def _run(spec: ModelSpec, scores: Scores | None, selection: Selection) -> list[Pick]:
    """The run of n layers whose input and output are nearest: h_l and h_(l+n), not h_(l+n+1)."""
    length = selection.count(spec)
    if length is None:
        raise UsageError("SELECT", "consecutive blocks need drop_n or drop_ratio")
    distances = _checked(spec, scores).run(selection.metric, length)
    open_runs = [
        (distance, first)
        for first, distance in enumerate(distances)
        if distance is not None and all(is_droppable(spec, "block", first + i) for i in range(length))
    ]
    if not open_runs:
        raise UsageError("SELECT", f"no run of {length} layers can be dropped; take fewer")
    distance, first = min(open_runs)
    return [Pick("block", first + i, distance) for i in range(length)]


def _check_number(name: str, value: float | None, low: float, high: float, *, whole: bool = False) -> None:
    if value is None:
        return
    number = isinstance(value, int) or (isinstance(value, float) and not whole)
    if isinstance(value, bool) or not number or not low <= value <= high or value == math.inf:
        kind = "an integer" if whole else "a number"
        bounds = f"from {low}" if high == math.inf else f"from {low} to {high}"
        raise UsageError("SELECT", f"{name} is {value!r}; expected {kind} {bounds}")


def _names(names: Iterable[str]) -> str:
    return ", ".join(names)
