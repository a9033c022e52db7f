"""A picture of scores: attentions, MLPs and blocks as curves over the layers."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any, Final

from pyruntime.checkpoint.atomic import check_writable, write_bytes
from pyruntime.errors import UsageError
from pyruntime.prune.scores import Scores

FORMATS: Final = (".svg", ".png")
_NAMES: Final = {
    "cosine": "1 - cosine of input and output",
    "angular": "angle of input and output / pi",
    "magnitude": "|added| / |output|",
    "perplexity": "nats per token lost without it",
}
# colours that the colour-blind tell apart (Okabe and Ito), and shapes for print
_CURVES: Final = {
    "attention": ("#0072B2", "o", "attention"),
    "mlp": ("#D55E00", "s", "MLP"),
    "block": ("#666666", "^", "whole layer"),
}
# where the largest is so many times the smallest, the axis is logarithmic and has two labels or more
_LOG_FROM: Final = 5


def check_plot(path: Path) -> None:
    """Raise UsageError PLOT, or RunError IO, unless `save_plot` could write `path`."""
    if path.suffix not in FORMATS:
        raise UsageError("PLOT", f"{path.name} is no picture; expected a name that ends in {' or '.join(FORMATS)}")
    _matplotlib()
    check_writable(path)


def save_plot(scores: Scores, path: Path) -> None:
    """Draw each metric of `scores` by layer into `path`, .svg or .png. Raises UsageError PLOT, RunError IO."""
    check_plot(path)
    matplotlib = _matplotlib()
    metrics = list(scores.values)
    columns = min(3, len(metrics))
    rows = math.ceil(len(metrics) / columns)
    # a figure without a window and without global state
    figure = matplotlib.figure.Figure(figsize=(4.4 * columns, 3.4 * rows), layout="constrained")
    for place, metric in enumerate(metrics):
        _draw(figure.add_subplot(rows, columns, place + 1), scores, metric)
    tokens = f"{scores.num_tokens} tokens of {scores.text}" if scores.text else f"{scores.num_tokens} tokens"
    figure.suptitle(
        f"{scores.family}, {scores.num_layers} layers, {tokens}: the lower, the sooner dropped", fontsize=10
    )
    picture = io.BytesIO()
    # the same scores give the same bytes
    with matplotlib.rc_context({"svg.hashsalt": "pyruntime"}):
        metadata = {"Date": None} if path.suffix == ".svg" else {}
        figure.savefig(picture, format=path.suffix[1:], dpi=150, metadata=metadata)
    write_bytes(path, picture.getvalue())


def _draw(axes: Any, scores: Scores, metric: str) -> None:
    for kind, values in scores.values[metric].items():
        colour, marker, label = _CURVES[kind]
        points = [(layer, value) for layer, value in enumerate(values) if value is not None]
        if points:
            axes.plot(*zip(*points, strict=True), color=colour, marker=marker, markersize=4, label=label, linewidth=1.4)
    axes.set_title(metric, fontsize=10)
    axes.set_xlabel("layer")
    axes.set_ylabel(_NAMES[metric], fontsize=8)
    axes.set_xlim(-0.5, scores.num_layers - 0.5)
    axes.xaxis.get_major_locator().set_params(integer=True)
    shown = [value for kind in scores.values[metric].values() for value in kind if value is not None]
    # the first layers often stand far above the others
    if shown and 0 < _LOG_FROM * min(shown) <= max(shown):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(_matplotlib().ticker.LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.2g}")
        # labels between these would lie one on the other
        axes.yaxis.set_minor_formatter(_matplotlib().ticker.NullFormatter())
    axes.tick_params(axis="y", labelsize=7)
    axes.grid(True, which="major", alpha=0.3)
    axes.legend(fontsize=8)


def _matplotlib() -> Any:
    # heavy and optional: only those who draw need it
    try:
        import matplotlib
        import matplotlib.figure
        import matplotlib.ticker
    except ImportError as error:
        raise UsageError("PLOT", f"matplotlib is missing ({error}); pip install 'pyruntime-llm[plot]'") from None
    return matplotlib
