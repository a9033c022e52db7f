"""`pyruntime inspect`: what a checkpoint is, what is gone, and what that saves; no weight is read."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.console import Console

from pyruntime.bench import describe, summary
from pyruntime.checkpoint.writer import about
from pyruntime.cli import options as o
from pyruntime.engine.load import read_pruned
from pyruntime.errors import UsageError
from pyruntime.graph import build, fuse
from pyruntime.plan import DTYPES


def inspect(
    model: o.Model,
    drop_attn: o.DropAttn = None,
    drop_mlp: o.DropMlp = None,
    drop_block: o.DropBlock = None,
    drop_plan: o.DropPlanFile = None,
    dtype: o.Dtype = "auto",
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="For the predicted speed-up.")] = 1,
    context: Annotated[
        int | None,
        typer.Option(
            "--context",
            min=0,
            help="For the predicted speed-up: tokens in the cache (256, or all but one that a shorter model holds).",
        ),
    ] = None,
    graph: Annotated[bool, typer.Option("--graph", help="Also list every node of the graph.")] = False,
    revision: o.Revision = None,
    prefer: o.Prefer = None,
    ignore_config_keys: o.IgnoreConfigKeys = None,
    as_json: o.Json = False,
) -> None:
    """Show what is kept, what is gone and which key says so, and what that saves. Reads headers only."""
    drops = o.drop_options(drop_attn, drop_mlp, drop_block, drop_plan)
    pruned = read_pruned(model, drops, revision, o.read_options(prefer, ignore_config_keys), warn=False)
    if dtype != "auto" and dtype not in DTYPES:
        raise UsageError("DTYPE", f"dtype {dtype!r} is not known; expected auto, {', '.join(DTYPES)}")
    itemsize = DTYPES[pruned.dtype if dtype == "auto" else dtype].itemsize
    longest = pruned.spec.max_position - 1
    if context is not None and context > longest:
        raise UsageError("CONTEXT", f"context is {context}; before a new token the model holds at most {longest}")
    facts = summary(pruned, itemsize, batch_size, min(256, longest) if context is None else context)
    written = [] if pruned.path is None else list(about(pruned.path))
    if as_json:
        print(json.dumps(facts | {"written": written}))
        return
    console = Console(highlight=False)
    console.print("\n".join([*describe(pruned, facts), *written]), markup=False, soft_wrap=True)
    if graph:
        console.print(f"\n{fuse(build(pruned.spec))}", markup=False, soft_wrap=True)
