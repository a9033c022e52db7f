"""The points of `pyruntime tradeoff` for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from pyruntime.evaluate.tradeoff import Point

_COLUMNS = ("dropped", "ppl", "change, %", "speed-up", "p20-p80", "bytes", "tok/s", "gamma")


def print_points(points: Sequence[Point], about: Mapping[str, Any]) -> None:
    """Print a table with a part for each target, and what its figures mean."""
    console = Console(highlight=False)
    with_tasks = any(each.accuracy is not None for each in points)
    lines = [
        f"{about['model']}, {about['dtype']} on {about['target']}; decode, batch {about['batch']}, context "
        f"{about['context']}, {about['repeats']} samples in turn with the dense model",
        f"text {about['text']}, {about['num_tokens']} tokens; scored on {about['scored_on']}",
    ]
    console.print("\n".join(lines), markup=False, soft_wrap=True)
    # eight figures fit 80 columns only without padding
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=0)
    for column in (*_COLUMNS[:3], "acc", *_COLUMNS[3:]) if with_tasks else _COLUMNS:
        # a figure is never cut, whatever the width
        table.add_column(column, justify="left" if column == "dropped" else "right", overflow="fold")
    for number, each in enumerate(points):
        last = number + 1 == len(points) or points[number + 1].target != each.target
        table.add_row(*_row(each, with_tasks), end_section=last)
    console.print(table)
    unit = "points of accuracy lost" if with_tasks else "% of perplexity added"
    words = f"gamma: {unit} for each % of speed-up, the less the better; bytes: the speed-up that they predict"
    console.print(words, markup=False, soft_wrap=True)


def _row(point: Point, with_tasks: bool) -> list[str]:
    error = point.perplexity_change_stderr
    change = ("+" if point.perplexity_change > 0 else "") + _short(100 * point.perplexity_change)
    accuracy = [] if not with_tasks else ["" if point.accuracy is None else f"{100 * point.accuracy:.1f}%"]
    gamma = point.gamma if with_tasks else point.gamma_perplexity
    return [
        f"{point.target} {point.num_dropped}" if point.plan else point.target,
        _short(point.perplexity),
        change if error is None else f"{change} ± {_short(100 * error)}",
        *accuracy,
        f"{point.speedup:.2f}x",
        f"{point.speedup_p20:.2f}-{point.speedup_p80:.2f}",
        f"{point.predicted:.2f}x",
        f"{point.tokens_per_second:.0f}" if point.tokens_per_second >= 100 else f"{point.tokens_per_second:.1f}",
        "" if gamma is None or not point.plan else _short(gamma),
    ]


def _short(value: float) -> str:
    """Three digits or so: what was dropped too far gives figures of any size."""
    if abs(value) >= 1000:
        return f"{value:.1e}"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.2f}"
