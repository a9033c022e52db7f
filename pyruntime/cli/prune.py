"""`pyruntime prune`: choose what a model goes without, and write the smaller checkpoint."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from rich.console import Console
from tqdm import tqdm

from pyruntime.bench import describe, summary
from pyruntime.checkpoint import Model, ReadOptions
from pyruntime.checkpoint.dialects.declared import layers_in_words
from pyruntime.checkpoint.writer import WRITE_DIALECTS, Written, check_target, write_pruned
from pyruntime.cli import options as o
from pyruntime.cli import pruning as p
from pyruntime.engine.load import DropOptions, read_pruned
from pyruntime.errors import UsageError
from pyruntime.passes import drop, make_drop_plan
from pyruntime.plan import DTYPES
from pyruntime.prune import (
    METHODS,
    METRICS,
    RULES,
    TARGETS,
    CalibrationOptions,
    Pick,
    ScoreOptions,
    Scores,
    Selection,
    check_drops,
    choose,
    decode_context,
    decode_cost,
    made_of,
    read_calibration,
)
from pyruntime.prune import kv_bytes as kv_cache_bytes
from pyruntime.spec import DropPlan

_UNITS: Final = {"": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "KB": 10**3, "MB": 10**6, "GB": 10**9}
_SIZE: Final = re.compile(r"(\d{1,15})(?:\.(\d{1,3}))? ?([KMG]i?B)?", re.ASCII)
# what only matters where something is chosen, and where something is measured
_CHOOSING: Final = ("target_layer", "metric", "method", "drop_n", "drop_ratio", "kv_bytes", "speedup", "scores")
_MEASURING: Final = ("text", "num_seqs", "seq_len", "separate", "layer_by_layer", "target", "device")

Out = Annotated[Path, typer.Argument(help="Folder for the smaller checkpoint.", show_default=False)]
TargetLayer = Annotated[
    str | None,
    typer.Option("--target-layer", help=f"What to drop: {', '.join(TARGETS)} (default: attn; joint with --speedup)."),
]
Metric = Annotated[str, typer.Option("--metric", help=f"{', '.join((*METRICS, *RULES))}.")]
Method = Annotated[str, typer.Option("--method", help=f"{', '.join(METHODS)}.")]
DropN = Annotated[int | None, typer.Option("--drop-n", help="How many sublayers (or blocks) to drop.")]
DropRatio = Annotated[float | None, typer.Option("--drop-ratio", help="Which part of them to drop: 0.25.")]
KvBytes = Annotated[
    str | None, typer.Option("--kv-bytes", help="Largest cache for --batch and --context, such as 2GiB.")
]
Speedup = Annotated[
    float | None, typer.Option("--speedup", help="Decode speed, as a multiple of now, at --batch and --context.")
]
Batch = Annotated[int, typer.Option("--batch", help="Sequences that are decoded together.", min=1, max=1 << 20)]
Context = Annotated[
    int | None, typer.Option("--context", help="Tokens in the cache of each (default: 256, or what fits).", min=0)
]
ScoresFile = Annotated[Path | None, typer.Option("--scores", help="Scores that pyruntime score wrote.")]
Text = Annotated[Path | None, typer.Option("--text", help="Text to score on (default: a built-in one).")]
Dialect = Annotated[str, typer.Option("--dialect", help=f"How the drops are written: {', '.join(WRITE_DIALECTS)}.")]
ConfigOnly = Annotated[bool, typer.Option("--config-only", help="Write no weights: a drop plan for MODEL.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Choose and show, write nothing.")]


def prune(
    ctx: typer.Context,
    model: o.Model,
    out: Out,
    target_layer: TargetLayer = None,
    drop_n: DropN = None,
    drop_ratio: DropRatio = None,
    kv_bytes: KvBytes = None,
    speedup: Speedup = None,
    batch: Batch = 1,
    context: Context = None,
    scores: ScoresFile = None,
    text: Text = None,
    metric: Metric = "cosine",
    method: Method = "one-shot",
    num_seqs: p.NumSeqs = p.NUM_SEQS,
    seq_len: p.SeqLen = None,
    separate: p.Separate = False,
    seed: p.Seed = None,
    layer_by_layer: p.LayerByLayer = False,
    drop_attn: o.DropAttn = None,
    drop_mlp: o.DropMlp = None,
    drop_block: o.DropBlock = None,
    drop_plan: o.DropPlanFile = None,
    dialect: Dialect = "hf",
    config_only: ConfigOnly = False,
    overwrite: o.Overwrite = False,
    wait: o.Wait = False,
    dry_run: DryRun = False,
    dtype: o.Dtype = "auto",
    target: o.Target = "auto",
    device: o.Device = "cpu",
    revision: o.Revision = None,
    prefer: o.Prefer = None,
    ignore_config_keys: o.IgnoreConfigKeys = None,
    as_json: o.Json = False,
) -> None:
    """Drop what is needed least, or what is named, and write what is left as a checkpoint of its own."""
    read = read_pruned(model, DropOptions(), revision, reading := o.read_options(prefer, ignore_config_keys))
    if not dry_run:
        _check_out(out, [read.path, scores, text], overwrite)
    work = _Work(itemsize=_itemsize(read, dtype), batch=batch, context=context, seed=seed or 0)
    named = o.drop_options(drop_attn, drop_mlp, drop_block, drop_plan)
    if named == DropOptions():
        kinds = target_layer or ("attn" if speedup is None else "joint")
        size, sizes = _size(kv_bytes), dataclasses.asdict(work)
        budget: dict[str, Any] = {"drop_n": drop_n, "drop_ratio": drop_ratio, "kv_bytes": size, "speedup": speedup}
        selection = Selection(target=kinds, metric=metric, method=method, **budget, **sizes)
        _refuse_unused(ctx, selection, scores)
        how = ScoreOptions(dtype=dtype, target=target, device=device, layer_by_layer=layer_by_layer)
        cut = p.calibration_options(num_seqs, seq_len, separate, seed)
        plan, found = _chosen(read, selection, scores, text, cut, how, as_json)
        made = made_of(plan, found, selection)
    else:
        _refuse_unused(ctx, None, scores)
        made = made_of(plan := _named(read, named), None, None)
    facts = _facts(read, plan, made, work)
    if not dry_run:
        facts |= _written(_write(read, plan, made, out, reading, dialect, config_only, overwrite, wait))
    print(json.dumps(facts)) if as_json else _show(drop(read, plan), facts, out)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Work:
    """What a choice and its report share."""

    itemsize: int
    batch: int
    context: int | None
    seed: int


def _check_out(out: Path, sources: Sequence[Path | None], overwrite: bool) -> None:
    check_target(out, [each for each in sources if each is not None], overwrite)


def _written(written: Written) -> dict[str, Any]:
    return {
        "path": str(written.path),
        "num_tensors": written.num_tensors,
        "written_bytes": written.weight_bytes,
        "notes": list(written.notes),
    }


def _itemsize(model: Model, dtype: str) -> int:
    name = model.dtype if dtype == "auto" else dtype
    if name not in DTYPES:
        raise UsageError("DTYPE", f"dtype {dtype!r} is not known; expected auto, {', '.join(DTYPES)}")
    return DTYPES[name].itemsize


def _chosen(
    model: Model,
    selection: Selection,
    scores: Path | None,
    text: Path | None,
    cut: CalibrationOptions,
    how: ScoreOptions,
    quiet: bool,
) -> tuple[DropPlan, Scores | None]:
    """The plan, and the scores behind it; unless `quiet`, each choice of a search is shown when it is made."""
    found = None if scores is None else Scores.load(scores)
    calibration = None
    if selection.measures and found is None:
        assert model.path is not None
        calibration = read_calibration(p.text_or_default(text), model.path, model.spec.max_position, cut)
    with p.token_bar("Scoring") as advance:
        return choose(
            model,
            selection,
            scores=found,
            calibration=calibration,
            options=how,
            progress=advance,
            on_pick=None if quiet else _show_pick,
        )


def _show_pick(pick: Pick) -> None:
    # above the bar, if there is one
    tqdm.write(f"{'dropped':<20}{pick}, {pick.score:.4f}")


def _named(model: Model, named: DropOptions) -> DropPlan:
    plan = make_drop_plan(
        model.spec,
        drop_attn=named.drop_attn,
        drop_mlp=named.drop_mlp,
        drop_block=named.drop_block,
        drop_plan=named.drop_plan,
    )
    check_drops(model, plan)
    return plan


def _refuse_unused(ctx: typer.Context, selection: Selection | None, scores: Path | None) -> None:
    """Raise UsageError SELECT for options that change nothing beside what else was said."""
    unused: tuple[str, ...] = ()
    if selection is None:
        unused, beside = (*_CHOOSING, *_MEASURING, "seed"), "layers that are named"
    elif selection.method in ("last", "keep-last"):
        unused, beside = ("metric", "scores", *_MEASURING, "seed"), f"--method {selection.method}"
    elif selection.metric in RULES:
        seed = () if selection.metric == "random" else ("seed",)
        unused, beside = ("scores", *_MEASURING, *seed), f"--metric {selection.metric}"
    elif selection.method == "iterative":
        unused, beside = ("scores",), "--method iterative, which scores anew after each drop"
    elif scores is not None:
        unused, beside = (*_MEASURING, "seed"), "--scores"
    if said := p.said(ctx, unused):
        raise UsageError("SELECT", f"{' and '.join(said)} beside {beside}; expected one or the other")


def _facts(model: Model, plan: DropPlan, made: Mapping[str, Any], work: _Work) -> dict[str, Any]:
    """What is dropped and what that saves, JSON-ready; nothing was measured but the scores."""
    context, batch, itemsize = decode_context(model.spec, work.context), work.batch, work.itemsize
    left = drop(model, plan)
    before, after = (decode_cost(each.spec, batch, context, itemsize).num_bytes for each in (model, left))
    return {
        **summary(left, itemsize, batch, context),
        "dropped": {"attention": list(plan.attention), "mlp": list(plan.mlp)},
        "origin": plan.origin,
        "kv_bytes": kv_cache_bytes(left.spec, batch, context, itemsize),
        "kv_bytes_before": kv_cache_bytes(model.spec, batch, context, itemsize),
        "predicted_speedup_of_input": before / after,
        "scores": made.get("scores"),
        # what the files of the input hold besides is not written
        "unread_bytes": 0,
    }


def _write(
    model: Model,
    plan: DropPlan,
    made: Mapping[str, Any],
    out: Path,
    read: ReadOptions,
    dialect: str,
    config_only: bool,
    overwrite: bool,
    wait: bool,
) -> Written:
    assert model.path is not None
    # shown only on a terminal, and only when it takes longer than a moment
    with tqdm(desc="Writing", unit="B", unit_scale=True, disable=None, delay=1.0, leave=False) as bar:

        def advance(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        return write_pruned(
            model.path,
            plan,
            out,
            dialect=dialect,
            config_only=config_only,
            overwrite=overwrite,
            wait=wait,
            made=made,
            read=read,
            progress=advance,
        )


def _show(left: Model, facts: dict[str, Any], out: Path) -> None:
    where = f"(batch {facts['batch_size']}, context {facts['context']})"
    gone = DropPlan(tuple(facts["dropped"]["attention"]), tuple(facts["dropped"]["mlp"]))
    lines = [
        f"dropped             {layers_in_words(gone)}",
        f"chosen by           {facts['origin']}",
        *_score_lines(facts["scores"]),
        f"KV cache            {facts['kv_bytes']} of {facts['kv_bytes_before']} bytes {where}",
        f"predicted speed-up  {facts['predicted_speedup_of_input']:.3f}x of the model as it was, by bytes {where}",
        "",
        *describe(left, facts),
        "",
        f"wrote {facts['path']}: {facts['num_tensors']} tensors, {facts['written_bytes']} bytes"
        if "path" in facts
        else f"nothing written to {out}",
    ]
    Console(highlight=False).print("\n".join(lines), markup=False, soft_wrap=True)


def _score_lines(scores: dict[str, Any] | None) -> list[str]:
    """The scores of what was dropped, a line for each metric and kind."""
    if scores is None:
        return []
    return [
        f"{metric:<20}{kind}: " + ", ".join(f"{i} {'-' if v is None else format(v, '.4f')}" for i, v in values.items())
        for metric, kinds in scores["of_dropped"].items()
        for kind, values in kinds.items()
    ]


def _size(text: str | None) -> int | None:
    """Bytes in "2GiB", "1.5 GB" or "1000". Raises UsageError SELECT."""
    if text is None:
        return None
    match = _SIZE.fullmatch(text.strip())
    if match is None or (match[3] or "") not in _UNITS:
        raise UsageError("SELECT", f"--kv-bytes is {text!r}; expected bytes, such as 1000000 or 2GiB")
    return int(float(f"{match[1]}.{match[2] or 0}") * _UNITS[match[3] or ""])
