"""`pyruntime merge`: projections of skipless models vanish into their neighbours, layer by layer, behind a gate."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Final

import torch
import typer
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from pyruntime.checkpoint import Model, read_model, resolve_model
from pyruntime.checkpoint.writer import Written, check_target, write_native
from pyruntime.cli import folding as f
from pyruntime.cli import options as o
from pyruntime.engine.memory import available_memory
from pyruntime.errors import UsageError
from pyruntime.passes.merge import (
    GateMode,
    LayerMerge,
    MergeKind,
    MergeOptions,
    MergeReport,
    budget_bytes,
)
from pyruntime.passes.merge import (
    merge as merge_model,
)
from pyruntime.plan import DTYPES

_STORED: Final = ("float32", "bfloat16", "float16")
_GIB: Final = 2**30

Out = Annotated[Path, typer.Argument(help="Folder for the merged checkpoint.", show_default=False)]
Kind = Annotated[MergeKind, typer.Option("--kind", help="What to merge away; auto takes what fits each layer.")]
Dtype = Annotated[str, typer.Option("--dtype", help="What the merged model will run in (default: as stored).")]
StoreDtype = Annotated[str, typer.Option("--store-dtype", help="What to store: auto, float32, bfloat16 or float16.")]
Gate = Annotated[
    GateMode | None,
    typer.Option("--gate", help="For layers that lose too much (default: fall-back for auto, else refuse)."),
]
MaxMemory = Annotated[
    float | None, typer.Option("--max-memory", help="GiB to use at most (default: what is available).", min=0.0)
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Measure and show, write nothing.")]


def merge(
    model: o.Model,
    out: Out,
    kind: Kind = MergeKind.Q_P,
    dtype: Dtype = "auto",
    store_dtype: StoreDtype = "auto",
    gate: Gate = None,
    max_memory: MaxMemory = None,
    dry_run: DryRun = False,
    overwrite: o.Overwrite = False,
    wait: o.Wait = False,
    revision: o.Revision = None,
    prefer: o.Prefer = None,
    ignore_config_keys: o.IgnoreConfigKeys = None,
    as_json: o.Json = False,
) -> None:
    """Merge projections of a skipless model away: the same logits from fewer weights."""
    folder = resolve_model(model, revision)
    if not dry_run:
        check_target(out, [folder], overwrite)
    read = read_model(folder, o.read_options(prefer, ignore_config_keys))
    stored = _known("--store-dtype", store_dtype, read.dtype, _STORED)
    options = MergeOptions(
        kind=kind,
        gate=gate,
        dtype=_known("--dtype", dtype, stored, tuple(DTYPES)),
        store_dtype=stored,
        max_memory=available_memory() if max_memory is None else int(max_memory * _GIB),
        streams=_streams(read, kind, stored),
    )
    console = Console(highlight=False)
    needed = budget_bytes(read.spec, DTYPES[stored])
    if not as_json:
        console.print(f"memory              {needed / _GIB:.2f} GiB at a time, one layer in float64", markup=False)
    with _bar("Merging", "layer") as bar:
        merged = merge_model(read, options, partial(_advance, bar))
    report = merged.reports[-1]
    assert isinstance(report, MergeReport)
    facts = _facts(report, options, needed)
    if not dry_run:
        written = _write(merged, read, out, facts, overwrite=overwrite, wait=wait)
        facts |= {"path": str(written.path), "num_tensors": written.num_tensors, "written_bytes": written.weight_bytes}
    if as_json:
        print(json.dumps(facts))
    else:
        _show(console, report, facts, out)


def _streams(model: Model, kind: MergeKind, dtype: str) -> Mapping[int, torch.Tensor]:
    """What attentions read whose norms of q, k and v may cancel the one before them."""
    normed = [each for _, each in model.spec.attentions() if each.pre is not None and not each.residual]
    if kind in (MergeKind.P, MergeKind.TRIANGULAR) or all(each.v_norm is None for each in normed):
        return {}
    arithmetic = f.arithmetic(model, dtype)
    f.check_room(model, arithmetic)
    return f.attention_streams(model, arithmetic)


def _known(option: str, asked: str, default: str, known: tuple[str, ...]) -> str:
    if asked not in ("auto", *known):
        raise UsageError("DTYPE", f"{option} {asked!r} is not known; expected auto, {', '.join(known)}")
    return default if asked == "auto" else asked


def _facts(report: MergeReport, options: MergeOptions, needed: int) -> dict[str, Any]:
    """What was merged and what that cost and saved, JSON-ready; bytes as stored."""
    return {
        "kind": options.kind.value,
        "gate": options.gate_mode.value,
        "dtype": options.dtype,
        "store_dtype": options.store_dtype,
        "memory_bytes": needed,
        "layers": [_layer(row) for row in report.layers],
        "num_weights_saved": report.num_weights,
        "weight_bytes_saved": report.weight_bytes,
        "weights_read_before": report.read_before,
        "weights_read": report.read_after,
        "predicted_speedup": report.read_before / report.read_after,
        "notes": list(report.notes),
    }


def _layer(row: LayerMerge) -> dict[str, Any]:
    found = dataclasses.asdict(row)
    for name in ("entry_measured", "output_measured"):
        # JSON has neither NaN nor infinity
        found[name] = found[name] and {
            key: value if value is None or math.isfinite(value) else None for key, value in found[name].items()
        }
    return found | {"notes": list(row.notes)}


def _write(merged: Model, read: Model, out: Path, facts: dict[str, Any], **place: bool) -> Written:
    names = ("kind", "gate", "dtype", "store_dtype", "layers", "notes")
    with _bar("Writing", "B") as bar:
        return write_native(
            merged,
            out,
            dtype=facts["store_dtype"],
            **place,
            made={"merge": {name: facts[name] for name in names}},
            progress=partial(_advance, bar),
            files_from=read.path,
        )


def _bar(what: str, unit: str) -> tqdm[Any]:
    """Shown only on a terminal, and only when it takes longer than a moment."""
    return tqdm(desc=what, unit=unit, unit_scale=True, disable=None, delay=1.0, leave=False)


def _advance(bar: tqdm[Any], done: int, total: int) -> None:
    bar.total = total
    bar.update(done - bar.n)


def _show(console: Console, report: MergeReport, facts: dict[str, Any], out: Path) -> None:
    table = Table("layer", "Q, K, V", "P", "cond", "NMSE", "unmerged", "weights saved")
    for column in table.columns[3:]:
        column.justify = "right"
    for row in report.layers:
        measured = [each for each in (row.entry_measured, row.output_measured) if each is not None]
        table.add_row(
            f"{row.index}{' (forced)' if row.forced else ''}",
            "kept" if row.entry is None else row.entry.value,
            "kept" if row.output is None else row.output.value,
            _largest([each.cond for each in measured], ".3g"),
            _largest([each.nmse for each in measured], ".1e"),
            _largest([each.unmerged for each in measured], ".1e"),
            f"{row.num_weights:,}",
        )
    console.print(table)
    lines = [
        *report.notes,
        f"weights             {facts['num_weights_saved']:,} fewer, {facts['weight_bytes_saved']:,} bytes",
        f"read for a token    {report.read_after:,} of {report.read_before:,} weights: "
        f"{facts['predicted_speedup']:.2f}x at batch 1, by bytes, without the cache",
        f"wrote {facts['path']}: {facts['num_tensors']} tensors" if "path" in facts else f"nothing written to {out}",
    ]
    console.print("\n".join(lines), markup=False, soft_wrap=True)


def _largest(values: list[float] | list[float | None], style: str) -> str:
    known = [value for value in values if value is not None]
    return format(max(known), style) if known else ""
