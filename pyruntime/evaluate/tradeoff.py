"""Quality against measured speed, point by point: what a report of the trade-off holds, and its tables."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Final

from pyruntime.checkpoint.atomic import write_text
from pyruntime.checkpoint.files import is_there
from pyruntime.checkpoint.strict_json import read_object
from pyruntime.errors import CheckpointError, UsageError
from pyruntime.spec import DropPlan

_FORMAT: Final = "pyruntime-tradeoff"
_VERSION: Final = 1
_MAX_BYTES: Final = 64 * 2**20
_ADVICE: Final = "choose another folder, or remove it"
FILES: Final = ("tradeoff.json", "tradeoff.csv", "tradeoff.svg", "tradeoff.png")


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One pruned model: what is dropped, its quality, and its speed over the dense one in decode steps.

    `target` is what was dropped, or "dense" where nothing was: the dense model beside itself.

    `perplexity_change` is relative, `accuracy` the mean over the tasks from 0 to 1, or None. `speedup` is the median of
    the ratios of neighbouring samples, with the 20th and 80th percentile; `predicted` is the ratio of the bytes.
    """

    target: str
    num_dropped: int
    drop_attn_list: tuple[int, ...]
    drop_mlp_list: tuple[int, ...]
    perplexity: float
    perplexity_stderr: float | None
    perplexity_change: float
    perplexity_change_stderr: float | None
    bits_per_byte: float | None
    accuracy: float | None
    accuracy_change: float | None
    tasks: Mapping[str, float]
    speedup: float
    speedup_p20: float
    speedup_p80: float
    predicted: float
    tokens_per_second: float
    dense_tokens_per_second: float
    gate_nmse: float

    @property
    def plan(self) -> DropPlan:
        """What is dropped."""
        return DropPlan(self.drop_attn_list, self.drop_mlp_list)

    @property
    def gamma(self) -> float | None:
        """Points of accuracy lost for each percent of speed-up; None without tasks, and where nothing is gained."""
        return None if self.accuracy_change is None else gamma(100 * -self.accuracy_change, self.speedup)

    @property
    def gamma_perplexity(self) -> float | None:
        """Percent of perplexity added for each percent of speed-up; None where nothing is gained."""
        return gamma(100 * self.perplexity_change, self.speedup)

    def to_json(self) -> dict[str, Any]:
        """Everything, JSON-ready, the gammas too."""
        return {**asdict(self), "gamma": self.gamma, "gamma_perplexity": self.gamma_perplexity}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Point:
        """The point that `to_json` gave. Raises TypeError or KeyError for anything else."""
        values = {each.name: data[each.name] for each in fields(cls)}
        for each in fields(cls):
            if not _is_a(str(each.type), values[each.name]):
                raise TypeError(f"{each.name} is {str(values[each.name])[:40]!r}; expected {each.type}")
        return cls(**values | {name: tuple(values[name]) for name in ("drop_attn_list", "drop_mlp_list")})


def _is_a(kind: str, value: Any) -> bool:
    """Whether a value of JSON is one of a field that is declared as `kind`."""
    match kind:
        case "str":
            return isinstance(value, str)
        case "int":
            return type(value) is int and value >= 0
        case "tuple[int, ...]":
            return isinstance(value, list) and all(_is_a("int", each) for each in value)
        case "Mapping[str, float]":
            return isinstance(value, dict) and all(_is_a("float", each) for each in value.values())
        case "float | None":
            return value is None or _is_a("float", value)
    return type(value) in (int, float) and math.isfinite(value)


def gamma(lost: float, speedup: float) -> float | None:
    """Quality lost for each percent of speed-up: lost / (100 (speedup - 1)); None where nothing is gained.

    He et al. (2024), arXiv 2406.15786, tables 1-3, with `lost` in points of accuracy.
    """
    return lost / (100 * (speedup - 1)) if speedup > 1 else None


class TradeoffReport:
    """The points of one trade-off in `folder`/tradeoff.json, saved one by one, so that a run that was killed goes on.

    `about` is what the points belong to; its "key" decides whether the file goes on. Raises UsageError OUTPUT for a
    folder with a report of something else, or with another file in the place of one that is written.
    """

    def __init__(self, folder: Path, about: Mapping[str, Any]) -> None:
        self._path = folder / "tradeoff.json"
        self._folder = folder
        self.about = dict(about)
        self.points: list[Point] = []
        self._earlier = {(each.drop_attn_list, each.drop_mlp_list): each for each in self._read()}

    def describe(self, **facts: Any) -> None:
        """Add to what the report says of itself, beside the key."""
        self.about |= facts

    def known(self, plan: DropPlan) -> Point | None:
        """A point with the same sublayers dropped, of this run or an earlier one with the same key."""
        return self._earlier.get((plan.attention, plan.mlp))

    def add(self, point: Point) -> None:
        """Add the next point and save all. Raises RunError IO."""
        self.points.append(point)
        self._earlier.setdefault((point.drop_attn_list, point.drop_mlp_list), point)
        # points of an earlier run that this one has not reached are not lost if it is killed too
        there = {(each.drop_attn_list, each.drop_mlp_list) for each in self.points}
        rest = [each for key, each in self._earlier.items() if key not in there]
        self._save([*self.points, *rest])

    def finish(self) -> None:
        """Save the points of this run alone, and the same as tradeoff.csv. Raises RunError IO."""
        self._save(self.points)
        write_text(self._folder / "tradeoff.csv", as_csv(self.points))

    def _save(self, points: Sequence[Point]) -> None:
        whole = {"format": _FORMAT, "version": _VERSION, **self.about, "points": [each.to_json() for each in points]}
        write_text(self._path, json.dumps(whole, indent=1) + "\n")

    def _read(self) -> list[Point]:
        if not is_there(self._path):
            if there := [name for name in FILES if is_there(self._folder / name)]:
                raise UsageError("OUTPUT", f"{self._folder} holds {there[0]} and no tradeoff.json; {_ADVICE}")
            return []
        try:
            data = read_object(self._path, "TRADEOFF", _MAX_BYTES)
            if (data["format"], data["version"]) != (_FORMAT, _VERSION):
                raise TypeError(f"its format is {str(data['format'])[:40]!r}")
            if data["key"] == self.about["key"]:
                return [Point.from_json(each) for each in data["points"]]
        except (CheckpointError, TypeError, KeyError) as error:
            raise UsageError(
                "OUTPUT", f"{self._path} is no report of pyruntime tradeoff ({error}); {_ADVICE}"
            ) from None
        raise UsageError("OUTPUT", f"{self._path} holds a report of another model, text or setting; {_ADVICE}")


def as_csv(points: Sequence[Point]) -> str:
    """A line for each point under the names of its fields; lists between blanks, tasks in columns of their own."""
    tasks = list(dict.fromkeys(name for each in points for name in each.tasks))
    rows = []
    for each in points:
        row = {name: value for name, value in each.to_json().items() if name != "tasks"}
        row |= {name: " ".join(map(str, row[name])) for name in ("drop_attn_list", "drop_mlp_list")}
        rows.append(row | {f"acc_{name}": each.tasks.get(name) for name in tasks})
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
