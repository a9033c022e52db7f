"""Scoring: one pass over the calibration text for all statistics, and a pass for each sublayer for perplexity."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from pyruntime.checkpoint import Model
from pyruntime.checkpoint.atomic import DISK, check_writable, write_text
from pyruntime.checkpoint.files import io_error, is_there
from pyruntime.checkpoint.strict_json import read_object
from pyruntime.engine.memory import available_memory, check_memory
from pyruntime.errors import CheckpointError, UsageError
from pyruntime.graph import build, fuse
from pyruntime.passes import drop
from pyruntime.plan import DTYPES, TARGETS, Plan, lower
from pyruntime.plan.likelihood import negative_log_likelihood
from pyruntime.prune.calibration import Calibration
from pyruntime.prune.identity import KINDS, is_droppable, model_identity, not_droppable, plan_of
from pyruntime.prune.scores import MAX_BYTES, METRICS, PERPLEXITY, STATISTICS, Scores, Values
from pyruntime.prune.statistics import Statistics
from pyruntime.prune.streams import LayerByLayer, WholeModel
from pyruntime.spec import DropPlan

_LOGGER: Final = logging.getLogger("pyruntime")
_PARTIAL: Final = "pyruntime-scores-partial"
# of memory that is free, for the hidden states of a group of sequences
_SHARE: Final = 0.25

# tokens done, tokens in all
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreOptions:
    """What is measured and how; `kinds` limits what takes a pass each, the perplexities.

    `runs` are lengths of runs of layers whose distance is measured (None: every length; layer by layer: none, as their
    hidden states must be held). `layer_by_layer` holds one layer's weights at a time and runs on PyTorch;
    `state_bytes` is what its hidden states may take (None: a quarter of the memory that is free). `save_every`
    sequences the sums are saved.
    """

    metrics: tuple[str, ...] = STATISTICS
    runs: tuple[int, ...] | None = None
    kinds: tuple[str, ...] = KINDS
    dtype: str = "auto"
    target: str = "auto"
    device: str = "cpu"
    layer_by_layer: bool = False
    state_bytes: int | None = None
    save_every: int = 8

    def __post_init__(self) -> None:
        for name, found, known in (("metric", self.metrics, METRICS), ("kind", self.kinds, KINDS)):
            unknown = [each for each in found if each not in known]
            if unknown or not found:
                raise UsageError("SCORES", f"{name} {unknown or 'missing'}; expected some of {', '.join(known)}")
        if self.save_every < 1:
            raise UsageError("SCORES", f"save_every is {self.save_every}; expected at least one sequence")
        if self.layer_by_layer and PERPLEXITY in self.metrics:
            raise UsageError("SCORES", "perplexities need the whole model; score them without layer_by_layer")
        if self.layer_by_layer and self.target not in ("auto", "reference"):
            raise UsageError("SCORES", f"layer by layer runs on target reference; target is {self.target!r}")

    def lengths(self, num_layers: int) -> tuple[int, ...]:
        """The lengths of runs that are measured."""
        if self.runs is not None:
            return self.runs
        return () if self.layer_by_layer else tuple(range(1, num_layers + 1))


def score(
    model: Model,
    calibration: Calibration,
    options: ScoreOptions = ScoreOptions(),
    *,
    partial: Path | None = None,
    progress: Progress | None = None,
) -> Scores:
    """Score the attentions, MLPs and blocks of `model` over the calibration text.

    With `partial`, sums are saved in that file, and work that a kill interrupted is taken up where they end; the result
    is the same bit for bit. Whoever has saved the scores removes it (`forget`). Raises UsageError, RunError NUMERICS
    for a score that is no number, RunError MEMORY, and the errors of `lower`.
    """
    spec = model.spec
    calibration.check(spec.vocab_size, spec.max_position)
    work = _Work(model, calibration, options, partial, progress)
    work.take_up()
    if work.statistics.metrics:
        _layer_by_layer(work) if options.layer_by_layer else _whole(work)
    if PERPLEXITY in options.metrics:
        _perplexities(work)
    return work.result()


def forget(partial: Path) -> None:
    """Remove the partial file, if it is there. Raises RunError IO."""
    try:
        if is_there(partial):
            DISK.unlink(partial)
    except OSError as error:
        raise io_error(f"cannot remove {partial}", error) from None


class _Work:
    """What is done so far, and the file that it is saved in."""

    def __init__(
        self,
        model: Model,
        calibration: Calibration,
        options: ScoreOptions,
        partial: Path | None,
        progress: Progress | None,
    ) -> None:
        self.model = model
        self.calibration = calibration
        self.options = options
        self.statistics = Statistics(model.spec, options.metrics, options.lengths(len(model.spec.layers)))
        # nats per token, by what is dropped: nothing, or a kind and a layer
        self.losses: dict[str, float] = {}
        self.target = "reference" if options.layer_by_layer else options.target
        self._identity = model_identity(model)
        self._partial = partial
        self._progress = progress
        self._passes = bool(self.statistics.metrics) + (len(self.candidates()) if PERPLEXITY in options.metrics else 0)
        self._done = 0
        if partial is not None:
            check_writable(partial)

    def candidates(self) -> list[tuple[str, DropPlan]]:
        """What is dropped for a perplexity, by name; nothing first."""
        spec, kinds = self.model.spec, self.options.kinds
        places = [(kind, i) for kind in kinds for i in range(len(spec.layers)) if is_droppable(spec, kind, i)]
        return [("dense", DropPlan()), *((f"{kind} {i}", plan_of(kind, i)) for kind, i in places)]

    def todo(self) -> Sequence[Sequence[int]]:
        """The sequences that are not part of the sums yet."""
        return self.calibration.sequences[self.statistics.num_seqs :]

    def count(self, sequences: Sequence[Sequence[int]]) -> None:
        """`sequences` are part of the sums now."""
        self.statistics.num_seqs += len(sequences)
        self.statistics.num_tokens += sum(map(len, sequences))

    def advance(self, num_tokens: float) -> None:
        """Tell the user of tokens that were run."""
        self._done += round(num_tokens)
        if self._progress is not None:
            self._progress(self._done, self._passes * self.calibration.num_tokens)

    def take_up(self) -> None:
        """Go on from the partial file, if it is of the same work."""
        if self._partial is None or not is_there(self._partial):
            return
        try:
            data = read_object(self._partial, "SCORES", MAX_BYTES)
            same = data.get("format") == _PARTIAL and data.get("key") == self._key()
            if same:
                self._restore(data)
        except (CheckpointError, ValueError, KeyError, TypeError, AttributeError):
            same = False
        if not same:
            _LOGGER.warning("%s holds the start of other scores and is not used", self._partial)
            return
        self.advance(self.statistics.num_tokens + len(self.losses) * self.calibration.num_tokens)

    def _restore(self, data: Mapping[str, Any]) -> None:
        losses = {name: float.fromhex(text) for name, text in data["losses"].items()}
        if not losses.keys() <= {name for name, _ in self.candidates()} or not all(map(math.isfinite, losses.values())):
            raise ValueError("losses of something else")
        if data["target"] not in TARGETS:
            raise ValueError("another target")
        self.statistics.restore(data["statistics"], [len(each) for each in self.calibration.sequences])
        self.losses, self.target = losses, data["target"]

    def save(self) -> None:
        """Save what is done."""
        if self._partial is not None:
            losses = {name: value.hex() for name, value in self.losses.items()}
            done = {"statistics": self.statistics.to_json(), "losses": losses, "target": self.target}
            data = {"format": _PARTIAL, "key": self._key(), **done}
            write_text(self._partial, json.dumps(data) + "\n")

    def _key(self) -> str:
        how: dict[str, Any] = asdict(self.options)
        # neither changes a number
        del how["save_every"], how["state_bytes"]
        said = [self._identity, self.calibration.tokens_sha256, self.statistics.runs, how]
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()

    def result(self) -> Scores:
        """The scores of all that was done."""
        model, text = self.model, self.calibration
        values: dict[str, dict[str, Values]] = dict(self.statistics.values())
        if self.losses:
            values[PERPLEXITY] = {kind: self._lost(kind) for kind in self.options.kinds}
        return Scores(
            model=self._identity,
            family=model.spec.family,
            num_layers=len(model.spec.layers),
            values=values,
            runs=self.statistics.run_values(),
            dense_nll=self.losses.get("dense"),
            not_droppable=not_droppable(model.spec),
            text=text.source,
            text_sha256=text.text_sha256,
            tokens_sha256=text.tokens_sha256,
            tokenizer_sha256=text.tokenizer_sha256,
            seed=text.seed,
            num_seqs=len(text.sequences),
            num_tokens=text.num_tokens,
            dtype=model.dtype if self.options.dtype == "auto" else self.options.dtype,
            target=self.target,
            layer_by_layer=self.options.layer_by_layer,
        )

    def _lost(self, kind: str) -> Values:
        layers = range(len(self.model.spec.layers))
        found = [self.losses.get(f"{kind} {i}") for i in layers]
        return tuple(None if each is None else each - self.losses["dense"] for each in found)


def _whole(work: _Work) -> None:
    options = work.options
    stored = DTYPES.get(work.model.dtype if options.dtype == "auto" else options.dtype)
    if stored is not None:
        check_memory(work.model.num_values * stored.itemsize, "scoring (not layer by layer)")
    whole = WholeModel(work.model, dtype=options.dtype, target=options.target, device=options.device)
    work.target = whole.plan.target
    for sequence in work.todo():
        whole.run(sequence, work.statistics.window, work.statistics.observe)
        work.count([sequence])
        work.advance(len(sequence))
        if work.statistics.num_seqs % options.save_every == 0:
            work.save()


def _layer_by_layer(work: _Work) -> None:
    options, layers = work.options, len(work.model.spec.layers)
    runner = LayerByLayer(work.model, dtype=options.dtype, device=options.device)
    for group in _groups(work):
        for _ in runner.run(group, work.statistics.window, work.statistics.observe):
            work.advance(sum(map(len, group)) / layers)
        work.count(group)
        work.save()


def _groups(work: _Work) -> Iterator[list[Sequence[int]]]:
    """Runs of sequences whose hidden states fit; one sequence at least."""
    room = work.options.state_bytes
    if room is None:
        available = available_memory()
        room = None if available is None else int(available * _SHARE)
    # streams are kept in float32, or all in float64
    per_token = work.model.spec.embedding.size * 8 * (work.statistics.window + 1)
    group: list[Sequence[int]] = []
    for sequence in work.todo():
        if group and room is not None and (sum(map(len, group)) + len(sequence)) * per_token > room:
            yield group
            group = []
        group.append(sequence)
    if group:
        yield group


def _perplexities(work: _Work) -> None:
    options = work.options
    for name, plan in work.candidates():
        if name in work.losses:
            continue
        how = {"dtype": options.dtype, "target": options.target, "device": options.device}
        plan_without = lowered_without(work.model, plan, how)
        work.target = plan_without.target
        work.losses[name] = mean_loss(plan_without, work.calibration.sequences, work.advance)
        work.save()


def lowered_without(model: Model, gone: DropPlan, how: Mapping[str, Any]) -> Plan:
    """The plan of the model without what `gone` names; `how` are target, dtype and device of `lower`."""
    left = drop(model, gone) if gone else model
    return lower(fuse(build(left.spec)), left, **how)


def mean_loss(plan: Plan, sequences: Sequence[Sequence[int]], progress: Callable[[int], None] | None = None) -> float:
    """Nats per token. Raises RunError NUMERICS where they are no number."""
    nll, num_tokens = negative_log_likelihood(plan, sequences, progress)
    return nll / num_tokens
