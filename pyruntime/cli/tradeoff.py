"""`pyruntime tradeoff`: what each number of dropped sublayers costs in quality and gains in measured speed."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Final

import torch
import typer

from pyruntime.bench import Comparison, Samples, check_plan, commit, decode_case, interleaved, machine, steps_runner
from pyruntime.checkpoint import Model
from pyruntime.checkpoint.atomic import check_output, check_writable, make_folder
from pyruntime.cli import options as o
from pyruntime.cli.evaluate_options import (
    TextOptions,
    bars,
    byte_bar,
    command_line,
    reading_facts,
    refuse_unused,
    split_tasks,
)
from pyruntime.cli.pruning import token_bar
from pyruntime.cli.tradeoff_table import print_points
from pyruntime.engine.load import DropOptions, Loaded, load, read_pruned
from pyruntime.engine.texts import default_text
from pyruntime.errors import UsageError
from pyruntime.evaluate import Measures, compared, digest, mean_of, measure, model_sha256, plan_settings, read_items
from pyruntime.evaluate.plot import check_plot, save_tradeoff
from pyruntime.evaluate.tradeoff import FILES, Point, TradeoffReport
from pyruntime.passes import parse_layers
from pyruntime.plan import Plan
from pyruntime.prune import TARGETS, ScoreOptions, Scores, Selection, decode_context, read_calibration, score, select
from pyruntime.prune.select import candidates
from pyruntime.spec import DropPlan, ModelSpec

Output = Annotated[Path, typer.Option("-o", "--output", help="Folder of the report; a run that was killed goes on.")]
TargetLayer = Annotated[
    str, typer.Option("--target-layer", help="What is dropped, a curve each: attn, mlp, block, joint.")
]
Calib = Annotated[
    Path | None, typer.Option("--calib", help="Text to score on (default: that of --text).", dir_okay=False)
]
ScoresFile = Annotated[
    Path | None, typer.Option("--scores", help="Scores of pyruntime score, instead of scoring.", dir_okay=False)
]
Context = Annotated[
    int | None, typer.Option("--context", min=0, help="Tokens before the new one (default: 256, or all but one).")
]

Text = Annotated[
    Path | None,
    typer.Option("--text", help="Held-out text for the perplexity (default: one of 50 KB of its own).", dir_okay=False),
]
DropN = Annotated[
    str | None, typer.Option("--drop-n", help="How many to drop: 0-12 or 0,2,4 or 0-12+2 (default: 0-8).")
]

# of a sample, and of steps in it
_SAMPLE_SECONDS: Final = 0.02
_MAX_STEPS: Final = 64
# as far as the model has so many
_COUNTS: Final = range(9)
# what a speed depends on beside the model
_MACHINE: Final = ("pyruntime", "cpu_info", "num_cores", "gpu_info", "torch")


def tradeoff(
    model: o.Model,
    output: Output,
    text: Text = None,
    drop_n: DropN = None,
    target_layer: TargetLayer = "attn,mlp,block,joint",
    calib: Calib = None,
    scores: ScoresFile = None,
    metric: Annotated[str, typer.Option("--metric", help="cosine, or another of pyruntime score's.")] = "cosine",
    tasks: Annotated[str | None, typer.Option("--tasks", help="Multiple choice too: .jsonl files, a,b.")] = None,
    limit: o.Limit = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Of the decode steps that are timed.")] = 1,
    context: Context = None,
    repeats: Annotated[int, typer.Option("--repeats", min=3, help="Samples of each model, in turn.")] = 25,
    window: o.Window = None,
    stride: o.Stride = None,
    bos: o.Bos = None,
    max_chars: o.MaxChars = None,
    plot: Annotated[bool, typer.Option("--plot/--no-plot", help="Draw tradeoff.svg and tradeoff.png.")] = True,
    dtype: o.Dtype = "auto",
    target: o.Target = "auto",
    device: o.Device = "cpu",
    revision: o.Revision = None,
    prefer: o.Prefer = None,
    ignore_config_keys: o.IgnoreConfigKeys = None,
    check_weights: o.CheckWeights = None,
    as_json: o.Json = False,
) -> None:
    """Quality against measured tokens per second, for attentions, MLPs, blocks and both together."""
    refuse_unused("--tasks", tasks is not None, limit=limit)
    refuse_unused("scoring, as --scores gives the scores", scores is None, calib=calib)
    how: dict[str, Any] = {"dtype": dtype, "target": target, "device": device}
    how |= o.reading(revision, prefer, ignore_config_keys, check_weights)
    # reads headers only: what cannot be dropped is said before anything runs
    whole = read_pruned(model, DropOptions(), revision, how["options"], warn=False)
    wanted = _wanted(whole.spec, target_layer, drop_n)
    files = _files(tasks)
    _prepare(output, plot, (whole.path, text, calib, scores, *files.values()))
    text = _default_text() if text is None else text
    dense = load(model, **how)
    cut = TextOptions(window=window, stride=stride, bos=bos, max_chars=max_chars)
    measures = _measures(dense, cut, text, files, limit)
    speed = _speed_of(dense.plan, batch_size, decode_context(dense.model.spec, context), repeats)
    report = TradeoffReport(output, _about(dense, measures, speed, how, as_json))
    found = _scores(dense.model, scores, text if calib is None else calib, metric, how, as_json)
    report.describe(scored_on=found.text, scored_on_sha256=found.text_sha256)
    runner = _Runner(model, how, dense, measures, speed, as_json)
    for kind, count in wanted:
        selection = Selection(target=kind, metric=metric, drop_n=count) if count else None
        plan = DropPlan() if selection is None else select(dense.model.spec, found, selection)
        known = report.known(plan)
        place: dict[str, Any] = {"target": kind, "num_dropped": count}
        report.add(runner.point(plan, place) if known is None else dataclasses.replace(known, **place))
    report.finish()
    points = report.points
    print(json.dumps([each.to_json() for each in points])) if as_json else print_points(points, report.about)
    if plot:
        name = f"{Path(model).name}, {report.about['dtype']}, {report.about['machine']['cpu_info']}"
        save_tradeoff(points, output, title=name, speed=speed.words)


@dataclasses.dataclass(frozen=True, slots=True)
class _Speed:
    """The decode steps that are timed: several in a sample, as one may be shorter than what disturbs it."""

    batch: int
    context: int
    repeats: int
    num_steps: int

    @property
    def words(self) -> str:
        return f"decode, batch {self.batch}, context {self.context}"

    def compare(self, dense: Plan, pruned: Plan) -> Comparison:
        """Samples of both in turn."""
        case = decode_case(self.batch, self.context)
        before, after = dense.total_cost(case.work), pruned.total_cost(case.work)
        runs = [steps_runner(plan, [case.work] * self.num_steps) for plan in (dense, pruned)]
        slow, fast = interleaved(runs, self.repeats)
        ratio = before.num_bytes / after.num_bytes
        return Comparison(case=case, predicted=ratio, dense=slow, pruned=fast, dense_cost=before, pruned_cost=after)

    def tokens_per_second(self, samples: Samples) -> float:
        return self.batch * self.num_steps / samples.median


def _speed_of(dense: Plan, batch: int, context: int, repeats: int) -> _Speed:
    """As many steps in a sample as take some hundredths of a second."""
    (one,) = interleaved([steps_runner(dense, [decode_case(batch, context).work])], 5)
    return _Speed(batch, context, repeats, min(_MAX_STEPS, math.ceil(_SAMPLE_SECONDS / one.median)))


class _Runner:
    """Measures one pruned model after the other, each beside the dense one."""

    def __init__(
        self, name: str, how: dict[str, Any], dense: Loaded, measures: Measures, speed: _Speed, quiet: bool
    ) -> None:
        self._name = name
        self._how = how
        self._dense = dense
        self._measures = measures
        self._speed = speed
        self._bars = bars(quiet)
        if dense.plan.target == "cpu":
            # torch only checks the results here; its threads would go on spinning beside those that are timed
            torch.set_num_threads(1)
        self._gate = check_plan(dense.plan, dense.model)
        self._found = measure(dense, measures, self._bars, "dense")

    def point(self, plan: DropPlan, place: dict[str, Any]) -> Point:
        """Quality, then speed, of the model without what `plan` names."""
        loaded, found, gate = self._dense, self._found, self._gate
        if plan:
            drops = DropOptions(drop_plan=plan)
            loaded = load(self._name, drops=drops, **self._how, skip_tokenizer_init=True)
            loaded = dataclasses.replace(loaded, tokenizer=self._dense.tokenizer)
            found = measure(loaded, self._measures, self._bars, f"{place['target']} {place['num_dropped']}")
            gate = check_plan(loaded.plan, loaded.model)
        pair = self._speed.compare(self._dense.plan, loaded.plan)
        changes = compared(self._found, found)
        own = found.to_json()
        accuracies = {name: each["acc"] for name, each in own.get("tasks", {}).items()}
        lost = [each["acc_change"] for each in changes.get("tasks", {}).values()]
        return Point(
            **place,
            drop_attn_list=plan.attention,
            drop_mlp_list=plan.mlp,
            **{name: own[name] for name in ("perplexity", "perplexity_stderr", "bits_per_byte")},
            perplexity_change=changes["perplexity_change"],
            perplexity_change_stderr=changes["perplexity_change_stderr"],
            tasks=accuracies,
            accuracy=mean_of(list(accuracies.values())).mean if accuracies else None,
            accuracy_change=mean_of(lost).mean if lost else None,
            speedup=pair.measured,
            speedup_p20=pair.measured_percentile(20),
            speedup_p80=pair.measured_percentile(80),
            predicted=pair.predicted,
            tokens_per_second=self._speed.tokens_per_second(pair.pruned),
            dense_tokens_per_second=self._speed.tokens_per_second(pair.dense),
            gate_nmse=gate.nmse,
        )


def _prepare(output: Path, plot: bool, inputs: Sequence[Path | None]) -> None:
    """Say now, not behind minutes of measuring, what the report would fail at."""
    if plot:
        check_plot()
    for name in FILES:
        check_output(output / name, [each for each in inputs if each is not None])
    make_folder(output)
    check_writable(output / "tradeoff.json")


def _default_text() -> Path:
    text = default_text()
    typer.echo(f"no --text: {text.name} is taken, which comes with pyruntime", err=True)
    return text


def _files(tasks: str | None) -> dict[str, Path]:
    files, names = split_tasks(tasks)
    if names:
        raise UsageError("TASK", f"tasks {', '.join(names)} are lm-eval's; expected .jsonl files here")
    return files


def _measures(dense: Loaded, cut: TextOptions, text: Path, files: dict[str, Path], limit: int | None) -> Measures:
    assert dense.tokenizer is not None
    return Measures(
        text=cut.read(text, dense.tokenizer, dense.model.spec.max_position),
        tasks={name: read_items(path, limit) for name, path in files.items()},
    )


def _wanted(spec: ModelSpec, target_layer: str, drop_n: str | None) -> list[tuple[str, int]]:
    """(target, number) of each point, the dense model once; what a target does not have is left out, and said."""
    kinds = list(dict.fromkeys(part.strip() for part in target_layer.split(",")))
    if unknown := [kind for kind in kinds if kind not in TARGETS]:
        raise UsageError("SELECT", f"--target-layer has {unknown[0]!r}; expected some of {', '.join(TARGETS)}")
    there = {kind: len(candidates(spec, TARGETS[kind])) for kind in kinds}
    most = max(there.values())
    counts = range(min(len(_COUNTS), most + 1)) if drop_n is None else sorted(set(parse_layers(drop_n, [])))
    if above := [count for count in counts if count > most]:
        raise UsageError("SELECT", f"--drop-n has {above[0]}; at most {most} can be dropped of {', '.join(kinds)}")
    for kind in kinds:
        left = [str(count) for count in counts if count > there[kind]]
        if left and drop_n is not None:
            typer.echo(f"left out: {kind} {', '.join(left)} (it has {there[kind]})", err=True)
    dense = [("dense", 0)] if 0 in counts else []
    return dense + [(kind, count) for kind in kinds for count in counts if 0 < count <= there[kind]]


def _scores(model: Model, path: Path | None, text: Path, metric: str, how: dict[str, Any], quiet: bool) -> Scores:
    """The scores in the file, checked against the model, or new ones of the text."""
    if path is not None:
        found = Scores.load(path)
        found.check_model(model)
        return found
    assert model.path is not None
    calibration = read_calibration(text, model.path, model.spec.max_position)
    run = {name: how[name] for name in ("dtype", "target", "device")}
    with token_bar("Scoring") as advance:
        return score(model, calibration, ScoreOptions(metrics=(metric,), runs=(), **run), progress=advance)


def _about(dense: Loaded, measures: Measures, speed: _Speed, how: dict[str, Any], quiet: bool) -> dict[str, Any]:
    """What the points belong to; points with the same key are not measured again."""
    assert measures.text is not None
    facts = machine()
    with byte_bar("Hashing", quiet) as advance:
        sha256 = model_sha256(dense.model, advance)
    depends = {
        "model_sha256": sha256,
        **plan_settings(dense.plan),
        **measures.text.about(),
        "tasks_sha256": {name: digest([dataclasses.asdict(item) for item in i]) for name, i in measures.tasks.items()},
        "batch": speed.batch,
        "context": speed.context,
        "repeats": speed.repeats,
        **reading_facts(how["options"]),
        "num_threads": torch.get_num_threads() if dense.plan.program is None else dense.plan.program.num_threads,
        "machine": {name: facts[name] for name in _MACHINE},
    }
    assert dense.model.path is not None
    about = {"model": dense.model.path.resolve().name, "commit": commit(), "command": command_line()}
    return {"key": digest(depends), **about, **depends}
