"""`pyruntime score`: how much a model needs each of its sublayers, measured on a text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from pyruntime.checkpoint.atomic import check_output, check_writable
from pyruntime.cli import options as o
from pyruntime.cli import pruning as p
from pyruntime.engine.load import DropOptions, read_pruned
from pyruntime.prune import METRICS, ScoreOptions, Scores, check_plot, forget, read_calibration, save_plot
from pyruntime.prune import score as score_model
from pyruntime.prune.scores import STATISTICS

Text = Annotated[
    Path | None, typer.Option("--text", help='Text to score on, or .jsonl of {"text": ...} (default: a built-in one).')
]
Output = Annotated[Path, typer.Option("-o", "--output", help="File for the scores (JSON).", show_default=False)]
Metric = Annotated[
    list[str] | None,
    typer.Option("--metric", help=f"Any of {', '.join(METRICS)}; repeatable (default: all but perplexity)."),
]
Runs = Annotated[
    str | None,
    typer.Option("--runs", help="Lengths of runs of layers to compare: 4,8 (default: all; layer by layer none)."),
]
Plot = Annotated[Path | None, typer.Option("--plot", help="Also draw the scores: a .svg or .png file.")]


def score(
    model: o.Model,
    output: Output,
    text: Text = None,
    metric: Metric = None,
    runs: Runs = None,
    num_seqs: p.NumSeqs = p.NUM_SEQS,
    seq_len: p.SeqLen = None,
    separate: p.Separate = False,
    seed: p.Seed = None,
    layer_by_layer: p.LayerByLayer = False,
    plot: Plot = None,
    dtype: o.Dtype = "auto",
    target: o.Target = "auto",
    device: o.Device = "cpu",
    revision: o.Revision = None,
    prefer: o.Prefer = None,
    ignore_config_keys: o.IgnoreConfigKeys = None,
    as_json: o.Json = False,
) -> None:
    """Measure what each attention, MLP and layer changes; go on where an interrupted run of this command ended."""
    options = ScoreOptions(
        metrics=tuple(dict.fromkeys(metric)) if metric else STATISTICS,
        runs=p.numbers("--runs", runs),
        dtype=dtype,
        target=target,
        device=device,
        layer_by_layer=layer_by_layer,
    )
    cut = p.calibration_options(num_seqs, seq_len, separate, seed)
    read = read_pruned(model, DropOptions(), revision, o.read_options(prefer, ignore_config_keys))
    assert read.path is not None
    partial = output.with_name(f"{output.name}.partial")
    _check_outputs([output, partial, *([] if plot is None else [plot])], [read.path, *([] if text is None else [text])])
    if plot is not None:
        check_plot(plot)
    calibration = read_calibration(p.text_or_default(text), read.path, read.spec.max_position, cut)
    with p.token_bar("Scoring") as advance:
        scores = score_model(read, calibration, options, partial=partial, progress=advance)
    scores.save(output)
    forget(partial)
    if plot is not None:
        save_plot(scores, plot)
    if as_json:
        print(json.dumps(scores.to_json()))
    else:
        _show(scores)


def _check_outputs(outputs: Sequence[Path], inputs: Sequence[Path]) -> None:
    """What is written neither takes the place of what is read nor of one another."""
    for place, output in enumerate(outputs):
        check_output(output, [*inputs, *outputs[:place]])
        check_writable(output)


def _show(scores: Scores) -> None:
    console = Console(highlight=False)
    about = f"{scores.num_seqs} sequences, {scores.num_tokens} tokens of {scores.text}; the lower, the sooner dropped"
    for metric, kinds in scores.values.items():
        console.print(f"{metric}: {about}", markup=False, soft_wrap=True)
        console.print(p.score_table(scores, metric))
        for kind, values in kinds.items():
            console.print(f"{kind:<9} {p.in_order(values)}", markup=False, soft_wrap=True)
        console.print()
    if scores.not_droppable:
        console.print(f"cannot be dropped: {', '.join(scores.not_droppable)}", markup=False, soft_wrap=True)
