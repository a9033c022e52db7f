"""The picture of a trade-off: measured speed-up against quality, a curve for each kind of sublayer."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

from pyruntime.checkpoint.atomic import write_bytes
from pyruntime.errors import UsageError
from pyruntime.evaluate.tradeoff import Point

# Okabe and Ito's colours, told apart by the colour-blind; lightness, markers and dashes differ too, for grey print
_STYLES: Final = {
    "attn": ("attention", "#0072B2", "o", "-"),
    "mlp": ("MLP", "#D55E00", "s", "-"),
    "block": ("block", "#000000", "^", ":"),
    "joint": ("joint", "#56B4E9", "D", "--"),
}
# perplexities beyond this many times the dense one are named above the picture, not drawn: they would flatten the rest
_MOST: Final = 4.0
_TICKS: Final = (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8)


class _Panel(NamedTuple):
    """One measure of quality: its label, its value and error, and which way is better."""

    label: str
    value: Callable[[Point], float | None]
    error: Callable[[Point], float | None]


def check_plot() -> None:
    """Raise UsageError PLOT where matplotlib is missing: before minutes of measuring, not behind them."""
    try:
        # heavy, and an optional extra
        import matplotlib  # noqa: F401
    except ModuleNotFoundError:
        raise UsageError(
            "PLOT", "a picture needs matplotlib: pip install 'pyruntime-llm[plot]', or leave it out with --no-plot"
        ) from None


def save_tradeoff(points: Sequence[Point], folder: Path, *, title: str, speed: str) -> None:
    """Write tradeoff.svg and tradeoff.png: points to the right of the dense one are faster, lower ones better.

    `speed` says of which steps the speed-up is. Raises UsageError PLOT, RunError IO.
    """
    check_plot()
    # heavy, and an optional extra
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    panels = [_Panel("perplexity (lower is better)", lambda p: p.perplexity, _perplexity_error)]
    if any(each.accuracy is not None for each in points):
        panels.append(_Panel("accuracy in % (higher is better)", _percent, lambda p: None))
    drawn, left_out = _sensible(points)
    if left_out:
        title = f"{title}\nnot drawn, perplexity above {_MOST:g} times the dense one: {', '.join(left_out)}"
    # text stays text, and the same points give the same bytes
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "pyruntime", "font.size": 10}):
        figure = Figure(figsize=(7.2 * len(panels), 4.8), layout="constrained")
        for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            _draw(axes, drawn, panel, speed)
        _scale(figure.axes[0], drawn)
        figure.suptitle(title, fontsize=10)
        for kind, metadata in (("svg", {"Date": None}), ("png", {"Software": None})):
            picture = io.BytesIO()
            figure.savefig(picture, format=kind, dpi=150, metadata=metadata)
            write_bytes(folder / f"tradeoff.{kind}", picture.getvalue())


def x_limits(points: Sequence[Point]) -> tuple[float, float]:
    """The ends of the axis of speed-ups: those of the medians and of 1; a wide bar is cut, and squeezes nothing."""
    speeds = [1.0, *(each.speedup for each in points)]
    low, high = min(speeds), max(speeds)
    span = max(high - low, 0.05)
    # the labels at the ends of the curves stand to their right
    return low - 0.08 * span, high + 0.3 * span


def _sensible(points: Sequence[Point]) -> tuple[list[Point], list[str]]:
    """The points to draw, and the names of those whose perplexity is far from the dense one's."""
    dense = min(each.perplexity / (1 + each.perplexity_change) for each in points)
    drawn = [each for each in points if each.perplexity <= _MOST * dense]
    far: dict[str, list[int]] = {}
    for each in points:
        if each not in drawn:
            far.setdefault(_STYLES[each.target][0], []).append(each.num_dropped)
    return drawn, [f"{name} {', '.join(map(str, counts))}" for name, counts in far.items()]


def _scale(axes: Any, points: Sequence[Point]) -> None:
    """A scale of ratios with plain numbers, and space at the top and the bottom."""
    # heavy, and an optional extra
    from matplotlib.ticker import LogLocator, NullFormatter, NullLocator

    values = [each.perplexity for each in points]
    span = max(max(values) / min(values), 1.05)
    axes.set_yscale("log")
    axes.set_ylim(min(values) / span**0.12, max(values) * span**0.1)
    axes.yaxis.set_major_locator(LogLocator(subs=_TICKS, numticks=40))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


def _draw(axes: Any, points: Sequence[Point], panel: _Panel, speed: str) -> None:
    axes.set_xlim(x_limits(points))
    dense = next((each for each in points if not each.plan), None)
    for target, (name, colour, marker, dashes) in _STYLES.items():
        own = [each for each in points if each.target == target and panel.value(each) is not None]
        if own:
            if dense is not None:
                pair = (dense, own[0])
                ends = [each.speedup for each in pair], [panel.value(each) for each in pair]
                axes.plot(*ends, color=colour, linestyle=dashes, linewidth=1.6, alpha=0.95)
            _curve(axes, own, panel, colour, marker, dashes)
            _label(axes, own[-1], panel, f"{name} ", colour)
    if dense is not None:
        value = panel.value(dense)
        axes.axhline(value, color="0.6", linewidth=0.8, zorder=0)
        spread = [[dense.speedup - dense.speedup_p20], [dense.speedup_p80 - dense.speedup]]
        axes.errorbar(
            [dense.speedup], [value], xerr=spread, marker="*", markersize=15, color="0.25", elinewidth=0.7, zorder=5
        )
        axes.annotate("dense", (dense.speedup, value), (6, -13), textcoords="offset points", color="0.25")
    axes.axvline(1.0, color="0.6", linewidth=0.8, zorder=0)
    axes.set_xlabel(f"measured speed-up, {speed}")
    axes.set_ylabel(panel.label)
    axes.spines[["top", "right"]].set_visible(False)


def _curve(axes: Any, own: Sequence[Point], panel: _Panel, colour: str, marker: str, dashes: str) -> None:
    x, y = [each.speedup for each in own], [panel.value(each) for each in own]
    # a median lies between its percentiles
    spread = [[each.speedup - each.speedup_p20 for each in own], [each.speedup_p80 - each.speedup for each in own]]
    errors = [panel.error(each) or 0.0 for each in own]
    axes.errorbar(
        x,
        y,
        xerr=spread,
        yerr=errors if any(errors) else None,
        color=colour,
        marker=marker,
        linestyle=dashes,
        markersize=5,
        linewidth=1.6,
        elinewidth=0.7,
        alpha=0.95,
    )
    # how many are dropped, at every other point: all of them would hide each other
    for each in own[:-1:2]:
        axes.annotate(
            str(each.num_dropped),
            (each.speedup, panel.value(each)),
            (0, 6),
            textcoords="offset points",
            ha="center",
            fontsize=8,
            color=colour,
        )


def _label(axes: Any, last: Point, panel: _Panel, name: str, colour: str) -> None:
    axes.annotate(
        f"{name}{last.num_dropped}",
        # beside the bar, which may be long; blocks end where other curves do, and lie to their right
        (last.speedup, panel.value(last)),
        (7, -13 if last.target == "block" else 3),
        textcoords="offset points",
        color=colour,
        fontweight="bold",
    )


def _perplexity_error(point: Point) -> float | None:
    """The error of the change, not of the perplexity: all points share the text, and with it most of their error."""
    error = point.perplexity_change_stderr
    return None if error is None else point.perplexity / (1 + point.perplexity_change) * error


def _percent(point: Point) -> float | None:
    return None if point.accuracy is None else 100 * point.accuracy
