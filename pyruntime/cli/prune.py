"""`pyruntime prune`: choose what a model goes without, and write the smaller checkpoint."""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from rich.console import Console
from tqdm import tqdm

from pyruntime.bench import describe, summary
from pyruntime.checkpoint import Model, ReadOptions
from pyruntime.checkpoint.dialects.declared import layers_in_words
from pyruntime.checkpoint.writer import WRITE_DIALECTS, Written, write_pruned
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
    ScoreOptions,
    Scores,
    Selection,
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

Out = Annotated[Path, typer.Argument(help="Folder for the smaller checkpoint.", show_default=False)]
TargetLayer = Annotated[str, typer.Option("--target-layer", help=f"What to drop: {', '.join(TARGETS)}.")]
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
Batch = Annotated[int, typer.Option("--batch", help="Sequences that are decoded together.", min=1)]
Context = Annotated[
    int | None, typer.Option("--context", help="Tokens in the cache of each (default: 256, or what fits).", min=0)
]
ScoresFile = Annotated[Path | None, typer.Option("--scores", help="Scores that pyruntime score wrote.")]
Text = Annotated[Path | None, typer.Option("--text", help="Text to score on where there are no scores.")]
Dialect = Annotated[str, typer.Option("--dialect", help=f"How the drops are written: {', '.join(WRITE_DIALECTS)}.")]
ConfigOnly = Annotated[bool, typer.Option("--config-only", help="Write no weights: a drop plan for MODEL.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Take the place of a folder that is there.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Choose and show, write nothing.")]


def prune(
    model: o.Model,
    out: Out,
    target_layer: TargetLayer = "attn",
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
    overwrite: Overwrite = False,
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
    reading = o.read_options(prefer, ignore_config_keys)
    read = read_pruned(model, DropOptions(), revision, reading)
    named = o.drop_options(drop_attn, drop_mlp, drop_block, drop_plan)
    budget: dict[str, Any] = {
        "drop_n": drop_n,
        "drop_ratio": drop_ratio,
        "kv_bytes": _size(kv_bytes),
        "speedup": speedup,
    }
    work = _Work(itemsize=_itemsize(read, dtype), batch=batch, context=context, seed=seed or 0)
    if named == DropOptions():
        selection = Selection(target=target_layer, metric=metric, method=method, **budget, **dataclasses.asdict(work))
        cut = p.calibration_options(num_seqs, seq_len, separate, seed)
        how = ScoreOptions(dtype=dtype, target=target, device=device, layer_by_layer=layer_by_layer)
        plan, found = _chosen(read, selection, scores, text, cut, how)
    else:
        _refuse_budget(budget, scores, text)
        plan, found = _named(read, named), None
    facts = _facts(read, plan, found, work)
    if not dry_run:
        written = _write(read, plan, found, out, reading, dialect, config_only, overwrite)
        facts |= {"path": str(written.path), "num_tensors": written.num_tensors, "notes": list(written.notes)}
    print(json.dumps(facts)) if as_json else _show(drop(read, plan), facts, out)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Work:
    """What a choice and its report share."""

    itemsize: int
    batch: int
    context: int | None
    seed: int


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
) -> tuple[DropPlan, Scores | None]:
    """The plan, and the scores behind it."""
    found = None if scores is None else Scores.load(scores)
    calibration = None
    if text is not None:
        if found is not None and selection.needs_scores:
            raise UsageError("SCORES", "both --scores and --text were given; expected one of them")
        assert model.path is not None
        calibration = read_calibration(text, model.path, model.spec.max_position, cut)
    with p.token_bar("Scoring") as advance:
        return choose(model, selection, scores=found, calibration=calibration, options=how, progress=advance)


def _named(model: Model, named: DropOptions) -> DropPlan:
    plan = make_drop_plan(
        model.spec,
        drop_attn=named.drop_attn,
        drop_mlp=named.drop_mlp,
        drop_block=named.drop_block,
        drop_plan=named.drop_plan,
    )
    if not plan:
        raise UsageError("DROP", "the plan drops nothing; name what to drop")
    return plan


def _refuse_budget(budget: dict[str, Any], scores: Path | None, text: Path | None) -> None:
    """What is named is not chosen too."""
    said = [f"--{name.replace('_', '-')}" for name, value in budget.items() if value is not None]
    said += [name for name, value in (("--scores", scores), ("--text", text)) if value is not None]
    if said:
        raise UsageError("DROP", f"{' and '.join(said)} beside layers that are named; expected one or the other")


def _facts(model: Model, plan: DropPlan, scores: Scores | None, work: _Work) -> dict[str, Any]:
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
        "scores": None if scores is None else made_of(plan, scores)["scores"],
    }


def _write(
    model: Model,
    plan: DropPlan,
    scores: Scores | None,
    out: Path,
    read: ReadOptions,
    dialect: str,
    config_only: bool,
    overwrite: bool,
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
            made=made_of(plan, scores),
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
        f"wrote {facts['path']}: {facts['num_tensors']} tensors" if "path" in facts else f"nothing written to {out}",
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
