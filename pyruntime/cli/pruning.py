"""What `score` and `prune` share: how a text is cut, where scores are measured, and how they are shown."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Final

import typer
from rich import box
from rich.table import Table
from tqdm import tqdm

from pyruntime.engine.texts import default_text
from pyruntime.errors import UsageError
from pyruntime.prune import CalibrationOptions, Scores
from pyruntime.prune.identity import KINDS

NumSeqs = Annotated[int, typer.Option("--num-seqs", help="Sequences of the text to score on, at most.", min=1)]
SeqLen = Annotated[
    int | None, typer.Option("--seq-len", help="Tokens of a sequence (default: 2048, or the model's context).", min=2)
]
Separate = Annotated[
    bool, typer.Option("--separate", help="Each line, or record of a .jsonl file, is a sequence, cut at its end.")
]
Seed = Annotated[int | None, typer.Option("--seed", help="Draw the sequences instead of taking the first.")]
LayerByLayer = Annotated[
    bool, typer.Option("--layer-by-layer", help="One layer's weights in memory at a time, on PyTorch.")
]

NUM_SEQS: Final = CalibrationOptions().num_seqs


def calibration_options(num_seqs: int, seq_len: int | None, separate: bool, seed: int | None) -> CalibrationOptions:
    """How the text is cut, from the options that say so."""
    return CalibrationOptions(num_seqs=num_seqs, seq_len=seq_len, separate=separate, seed=seed)


def said(ctx: typer.Context, names: Iterable[str]) -> list[str]:
    """Those of the options, by their parameters' names, that stand on the command line, as "--num-seqs"."""
    sources = {name: ctx.get_parameter_source(name) for name in names}
    return [f"--{name.replace('_', '-')}" for name, each in sources.items() if each and each.name == "COMMANDLINE"]


def text_or_default(text: Path | None) -> Path:
    """The file `text`, or the one that comes with the package, which is said."""
    if text is None:
        typer.echo("scored on the built-in text; --text FILE for your own", err=True)
    return default_text() if text is None else text


def numbers(option: str, text: str | None) -> tuple[int, ...] | None:
    """The whole numbers in "4,8". Raises UsageError SCORES."""
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and len(part) < 6 for part in parts):
        raise UsageError("SCORES", f"{option} is {text!r}; expected whole numbers, such as 4 or 4,8")
    return tuple(map(int, parts))


@contextmanager
def token_bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """A function to call with (tokens done, tokens in all), which moves a bar on a terminal."""
    with tqdm(desc=what, unit=" tokens", unit_scale=True, disable=None, delay=1.0, leave=False) as bar:

        def advance(done: int, total: int) -> None:
            if done < bar.n:
                # a search begins anew behind each choice
                bar.reset()
            bar.total = total
            bar.update(done - bar.n)

        yield advance


def score_table(scores: Scores, metric: str) -> Table:
    """One metric by layer: attention, MLP and block; - where nothing can be dropped."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("layer", "attention", "MLP", "block"):
        table.add_column(column, justify="right")
    columns = [scores.values[metric].get(kind, (None,) * scores.num_layers) for kind in KINDS]
    for layer, row in enumerate(zip(*columns, strict=True)):
        table.add_row(str(layer), *("-" if value is None else f"{value:.4f}" for value in row))
    return table


def in_order(values: Sequence[float | None]) -> str:
    """Layers by their score, the lowest first."""
    kept = [(value, layer) for layer, value in enumerate(values) if value is not None]
    return ", ".join(str(layer) for _, layer in sorted(kept)) or "none"
