"""`pyruntime fold`: the same model with less to read and compute, as a checkpoint of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from pyruntime.bench.summary import num_weights
from pyruntime.checkpoint import Model, read_model, resolve_model
from pyruntime.checkpoint.writer import Written, check_target, write_native
from pyruntime.cli import folding as f
from pyruntime.cli import options as o
from pyruntime.errors import UsageError
from pyruntime.passes.fold import FoldReport, fold_reports, identity_blocks, stored_as
from pyruntime.plan import DTYPES

_DTYPES: Final = ("float32", "bfloat16", "float16")

Out = Annotated[Path, typer.Argument(help="Folder for the rewritten checkpoint.", show_default=False)]
Norms = Annotated[bool, typer.Option("--norms", help="Gains, biases and means of norms into the maps around them.")]
Biases = Annotated[bool, typer.Option("--biases", help="Biases of values into the output, of keys away.")]
Zero = Annotated[bool, typer.Option("--zero", help="Drop sublayers that add zero.")]
MlpPrefix = Annotated[bool, typer.Option("--mlp-prefix", help="MLPs before the first attention into the embedding.")]
AllExact = Annotated[bool, typer.Option("--all-exact", help="--zero --mlp-prefix --norms --biases.")]
FirstLayer = Annotated[bool, typer.Option("--first-layer", help="A row of q, k, v for each token (more memory).")]
CancelNorms = Annotated[bool, typer.Option("--cancel-norms", help="Norms before normed q, k and v, if eps allows.")]
Slim = Annotated[str | None, typer.Option("--slim", help="Cache keys or inputs alone: keys, inputs.")]
Matshrink = Annotated[bool, typer.Option("--matshrink", help="An identity in the value map of each head.")]
Dtype = Annotated[str, typer.Option("--dtype", help="What to store: auto, float32, bfloat16 or float16.")]
Gate = Annotated[float, typer.Option("--gate", help="Largest NMSE of the logits with weights as stored.", min=0.0)]
Force = Annotated[bool, typer.Option("--force", help="Take what a gate refuses; the manifest says so.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Rewrite, check and show, write nothing.")]


def fold(
    model: o.Model,
    out: Out,
    all_exact: AllExact = False,
    zero: Zero = False,
    mlp_prefix: MlpPrefix = False,
    norms: Norms = False,
    biases: Biases = False,
    first_layer: FirstLayer = False,
    cancel_norms: CancelNorms = False,
    slim: Slim = None,
    matshrink: Matshrink = False,
    dtype: Dtype = "auto",
    gate: Gate = 5e-4,
    force: Force = False,
    dry_run: DryRun = False,
    overwrite: o.Overwrite = False,
    wait: o.Wait = False,
    revision: o.Revision = None,
    prefer: o.Prefer = None,
    ignore_config_keys: o.IgnoreConfigKeys = None,
    as_json: o.Json = False,
) -> None:
    """Rewrite a model without changing its logits, and write it in pyruntime's own format."""
    folder = resolve_model(model, revision)
    if not dry_run:
        check_target(out, [folder], overwrite)
    read = read_model(folder, o.read_options(prefer, ignore_config_keys))
    options = f.FoldOptions(
        zero=zero or all_exact,
        mlp_prefix=mlp_prefix or all_exact,
        cancel_norms=cancel_norms,
        first_layer=first_layer,
        norms=norms or all_exact,
        biases=biases or all_exact,
        slim=f.cached_of(slim),
        matshrink=matshrink,
        dtype=_dtype(read, dtype),
        force=force,
    )
    if options == f.FoldOptions(dtype=options.dtype, force=force):
        raise UsageError("FOLD", "no rewrite is named; expected --all-exact, --norms or others (see --help)")
    arithmetic = f.arithmetic(read, options.dtype)
    f.check_room(read, arithmetic)
    streams = f.attention_streams(read, arithmetic) if cancel_norms else {}
    rewritten = f.rewrite(stored_as(read, options.dtype), options, streams)
    _check_changed(read, rewritten)
    f.check_room(rewritten, arithmetic)
    facts = _facts(read, rewritten, options, f.check(read, rewritten, options, gate), gate)
    if not dry_run:
        written = _write(rewritten, read, options, out, facts, overwrite=overwrite, wait=wait)
        facts |= {"path": str(written.path), "num_tensors": written.num_tensors, "written_bytes": written.weight_bytes}
    print(json.dumps(facts)) if as_json else _show(facts, out)


def _dtype(model: Model, asked: str) -> str:
    if asked not in ("auto", *_DTYPES):
        raise UsageError("DTYPE", f"dtype {asked!r} cannot be stored; expected auto, {', '.join(_DTYPES)}")
    return model.dtype if asked == "auto" else asked


def _check_changed(before: Model, after: Model) -> None:
    """Raise UsageError FOLD where what would be written is a copy."""
    if (after.spec, after.dtype, dict(after.weights)) != (before.spec, before.dtype, dict(before.weights)):
        return
    found = [f"{report.name}: {', '.join(report.notes) or 'nothing found'}" for report in fold_reports(after)]
    raise UsageError("FOLD", f"nothing is rewritten ({'; '.join(found)}); name other rewrites, or use the model as is")


def _facts(before: Model, after: Model, options: f.FoldOptions, check: f.Check, gate: float) -> dict[str, Any]:
    """What was rewritten and what came of it, JSON-ready; bytes as stored."""
    itemsize = DTYPES[options.dtype].itemsize
    forced = [f"{report.name}: {place}" for report in fold_reports(after) for place in report.forced]
    if not check.stored <= gate:
        forced.append(f"logits: NMSE {check.stored:.1e}, at most {gate:.0e}")
    return {
        "dtype": options.dtype,
        "forced": forced,
        "passes": [_report(report, itemsize) for report in fold_reports(after)],
        "num_weights_before": num_weights(before.spec),
        "num_weights": num_weights(after.spec),
        "identity_blocks_before": identity_blocks(before) if options.matshrink else {},
        "nmse_float64": check.exact,
        "nmse_stored": check.stored,
        "nmse_dtype": check.narrowed,
        "checked_in": check.dtype,
    }


def _report(report: FoldReport, itemsize: int) -> dict[str, Any]:
    return {
        "name": report.name,
        "rewritten": list(report.rewritten),
        "removed": list(report.removed),
        "forced": list(report.forced),
        "num_weights": report.num_weights,
        "weight_bytes": report.weight_bytes,
        "flops_per_token": report.flops_per_token,
        "kv_bytes_per_token": report.kv_values_per_token * itemsize,
        "notes": list(report.notes),
    }


def _write(
    rewritten: Model, read: Model, options: f.FoldOptions, out: Path, facts: dict[str, Any], **place: bool
) -> Written:
    names = ("dtype", "forced", "passes", "nmse_float64", "nmse_stored", "nmse_dtype")
    made = {"fold": {name: facts[name] for name in names}}
    # shown only on a terminal, and only when it takes longer than a moment
    with tqdm(desc="Writing", unit="B", unit_scale=True, disable=None, delay=1.0, leave=False) as bar:

        def advance(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        return write_native(
            rewritten,
            out,
            dtype=options.dtype,
            **place,
            made=made,
            progress=advance,
            files_from=read.path,
        )


def _show(facts: dict[str, Any], out: Path) -> None:
    table = Table("saved by", "changed", "weights", "bytes", "FLOPs/token", "KV bytes/token", box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for each in facts["passes"]:
        changed = len(each["rewritten"]) + len(each["removed"])
        saved = (each[name] for name in ("num_weights", "weight_bytes", "flops_per_token", "kv_bytes_per_token"))
        table.add_row(each["name"], str(changed), *(f"{count:,}" for count in saved))
    exact, narrowed = facts["nmse_float64"], facts["nmse_dtype"]
    console = Console(highlight=False)
    console.print(table)
    lines = [
        *(f"{each['name']}: {note}" for each in facts["passes"] for note in each["notes"]),
        *(f"identity blocks found in {name}: {count}" for name, count in facts["identity_blocks_before"].items()),
        f"weights             {facts['num_weights']:,} of {facts['num_weights_before']:,}",
        *(f"forced              {what}" for what in facts["forced"]),
        f"logits              NMSE {facts['nmse_stored']:.1e} with weights in {facts['dtype']}"
        + (f", computed in {facts['checked_in']}" if exact is None else f"; {exact:.1e} unrounded in float64"),
        *([f"{'':<20}NMSE {narrowed:.1e} by {facts['dtype']} alone, without any rewrite"] if narrowed else []),
        f"wrote {facts['path']}: {facts['num_tensors']} tensors" if "path" in facts else f"nothing written to {out}",
    ]
    console.print("\n".join(lines), markup=False, soft_wrap=True)
