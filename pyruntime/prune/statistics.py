"""Sums over tokens from which scores are made: plain float64 numbers that a kill must not lose."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import torch

from pyruntime.errors import RunError, UsageError
from pyruntime.prune.identity import is_droppable
from pyruntime.prune.scores import RUN_METRICS, STATISTICS, Values
from pyruntime.prune.streams import Passage
from pyruntime.spec import ModelSpec

# below this a vector has no direction, as in torch.nn.functional.cosine_similarity
_EPS: Final = 1e-8


class Statistics:
    """Sums of the metrics by name and layer; `runs` are the lengths of runs of layers that are compared.

    Vectors are compared in the stream's dtype (float32, or float64), sums over tokens are float64. They are added up in
    the order of the sequences, so that they are the same bit for bit however often the work was interrupted.
    """

    def __init__(self, spec: ModelSpec, metrics: Iterable[str], runs: Iterable[int]) -> None:
        self._spec = spec
        self.metrics = tuple(metric for metric in STATISTICS if metric in tuple(metrics))
        self.runs = tuple(sorted(set(runs)))
        layers = len(spec.layers)
        if self.runs and not 1 <= self.runs[0] <= self.runs[-1] <= layers:
            raise UsageError("SCORES", f"runs of {list(self.runs)} layers; expected lengths of 1 to {layers}")
        self.num_seqs = 0
        self.num_tokens = 0
        names = [f"{kind} {metric}" for kind in ("attention", "mlp", "block") for metric in self.metrics]
        names += [f"run {n} {metric}" for n in self.runs for metric in RUN_METRICS if metric in self.metrics]
        self._sums = {name: [0.0] * layers for name in names}

    @property
    def window(self) -> int:
        """How many boundaries before the newest one are needed."""
        return max(self.runs, default=1)

    def observe(self, passage: Passage) -> None:
        """Add one chunk of rows. Raises RunError NUMERICS, naming the layer, for a score that is no number."""
        layer = passage.layer
        for each in passage.sublayers:
            self._add(layer, each.kind, each.x, each.x + each.added, each.added)
        entry, left = passage.boundaries[-2], passage.boundaries[-1]
        if entry.shape == left.shape:
            self._add(layer, "block", entry, left, left - entry)
        elif not bool(left.isfinite().all()):
            raise _not_finite(layer, "block", "output")
        for n in self.runs:
            if n < len(passage.boundaries) and passage.boundaries[-1 - n].shape == left.shape:
                self._add_run(layer + 1 - n, n, passage.boundaries[-1 - n], left, passage.ends)

    def _add(self, layer: int, kind: str, x: torch.Tensor, y: torch.Tensor, added: torch.Tensor) -> None:
        cosine = _cosine(x, y)
        found = {"cosine": cosine, "angular": _angle(cosine), "magnitude": _magnitude(added, y)}
        for metric in self.metrics:
            self._sum(layer, kind, metric, f"{kind} {metric}", found[metric])

    def _add_run(self, first: int, n: int, x: torch.Tensor, y: torch.Tensor, ends: bool) -> None:
        if "cosine" in self.metrics:
            self._sum(first, "run", "cosine", f"run {n} cosine", _cosine(x, y))
        if "angular" in self.metrics and ends:
            # Gromov et al. look at the last token, the only one that has seen all others
            self._sum(first, "run", "angular", f"run {n} angular", _angle(_cosine(x[-1:], y[-1:])))

    def _sum(self, layer: int, kind: str, metric: str, name: str, values: torch.Tensor) -> None:
        total = float(values.double().sum())
        if not math.isfinite(total):
            raise _not_finite(layer, kind, metric)
        self._sums[name][layer] += total

    def values(self) -> dict[str, dict[str, Values]]:
        """Scores by metric and kind; None where nothing can be dropped."""
        return {
            metric: {kind: self._of_kind(kind, metric) for kind in ("attention", "mlp", "block")}
            for metric in self.metrics
        }

    def _of_kind(self, kind: str, metric: str) -> Values:
        means = [_distance(metric, each / self.num_tokens) for each in self._sums[f"{kind} {metric}"]]
        return tuple(value if is_droppable(self._spec, kind, i) else None for i, value in enumerate(means))

    def run_values(self) -> dict[str, dict[int, Values]]:
        """Distances by metric, length of the run and first layer; None for runs that cannot be dropped."""
        blocks = [is_droppable(self._spec, "block", i) for i in range(len(self._spec.layers))]
        counts = {"cosine": self.num_tokens, "angular": self.num_seqs}
        return {
            metric: {
                n: tuple(
                    _distance(metric, self._sums[f"run {n} {metric}"][i] / counts[metric])
                    if all(blocks[i : i + n])
                    else None
                    for i in range(len(blocks) + 1 - n)
                )
                for n in self.runs
            }
            for metric in RUN_METRICS
            if metric in self.metrics and self.runs
        }

    def to_json(self) -> dict[str, Any]:
        """Everything, each number exactly."""
        sums = {name: [each.hex() for each in values] for name, values in self._sums.items()}
        return {"num_seqs": self.num_seqs, "num_tokens": self.num_tokens, "sums": sums}

    def restore(self, data: Mapping[str, Any], lengths: Sequence[int]) -> None:
        """Go on from what `to_json` gave, for sequences of `lengths` tokens.

        Raises ValueError, KeyError or TypeError for anything else.
        """
        sums: Mapping[str, Sequence[str]] = data["sums"]
        found = {name: [float.fromhex(each) for each in sums[name]] for name in self._sums}
        if any(len(found[name]) != len(values) for name, values in self._sums.items()):
            raise ValueError("another number of layers")
        if not all(math.isfinite(each) for values in found.values() for each in values):
            raise ValueError("a sum that is not finite")
        num_seqs, num_tokens = data["num_seqs"], data["num_tokens"]
        if type(num_seqs) is not int or not 0 <= num_seqs <= len(lengths) or num_tokens != sum(lengths[:num_seqs]):
            raise ValueError("sums of other sequences")
        self._sums = found
        self.num_seqs, self.num_tokens = num_seqs, sum(lengths[:num_seqs])


def _cosine(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cosine_similarity(x, y, dim=-1, eps=_EPS)


def _angle(cosine: torch.Tensor) -> torch.Tensor:
    # rounding may lead a little beyond 1, where there is no angle; NaN stays NaN
    return cosine.double().clamp(-1.0, 1.0).arccos() / math.pi


def _magnitude(added: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    share: torch.Tensor = added.norm(dim=-1) / y.norm(dim=-1).clamp(min=_EPS)
    return share


def _distance(metric: str, mean: float) -> float:
    return 1.0 - mean if metric == "cosine" else mean


def _not_finite(layer: int, kind: str, metric: str) -> RunError:
    return RunError(
        "NUMERICS",
        f"layer {layer} {kind}: its {metric} is not finite; check the weights (pyruntime verify), or score with "
        "--dtype float32",
    )
