"""The README's tables of speeds and the ledger of all figures, all from the result files in benchmarks/results/.

python benchmarks/table.py            write README.md between its markers, and benchmarks/results/ledger.csv
python benchmarks/table.py --check    exit with 1 if one of them is not what this would write
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import re
import shlex
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from pyruntime import PyruntimeError
from pyruntime.bench import percentile
from pyruntime.checkpoint.atomic import write_text
from pyruntime.errors import UsageError

ROOT: Final = Path(__file__).resolve().parents[1]
BEGIN: Final = "<!-- results:begin -->"
END: Final = "<!-- results:end -->"
GPU_BEGIN: Final = "<!-- gpu:begin -->"
GPU_END: Final = "<!-- gpu:end -->"
NOT_MEASURED: Final = "Not yet measured."
# DATE-COMMIT-KIND, then what was measured, or a number
NAME: Final = re.compile(r"\d{4}-\d\d-\d\d-(?:[0-9a-f]+|unknown)-(?P<kind>[a-z_]+)(?:-.+)?")
COLUMNS: Final = (
    "date commit kind model dtype target case p50_seconds p20_seconds p80_seconds against against_p50_seconds ratio "
    "predicted fraction ceiling machine"
).split()


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One measured case: seconds of its samples, beside those of what it is compared with, where there is such."""

    model: str
    dtype: str
    target: str = ""
    case: str
    seconds: Sequence[float]
    against: str = ""
    against_seconds: Sequence[float] = ()
    predicted: float | None = None
    fraction: float | None = None
    ceiling: str = ""

    @property
    def ratio(self) -> float | None:
        """How many times as fast as what it is compared with: the median over neighbouring samples."""
        if not self.against_seconds:
            return None
        return statistics.median(slow / own for slow, own in zip(self.against_seconds, self.seconds, strict=True))


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One result file."""

    path: Path
    kind: str
    time: str
    commit: str
    command: Sequence[str]
    machine: Mapping[str, Any]
    figures: Sequence[Figure]
    tables: Sequence[Mapping[str, Any]] = ()
    state: Sequence[str] = ()

    def command_line(self) -> str:
        """What was typed, from the root of the checkout; folders outside it are called by their last name."""
        script = self.command[0].replace("\\", "/")
        script = script[script.find("benchmarks/") :] if "benchmarks/" in script else Path(script).name
        rest = [Path(each).name if each.startswith("/") else each for each in self.command[1:]]
        return f"python {shlex.join([script, *rest])}"

    def machine_line(self) -> str:
        """Processor, cores, memory and graphics cards."""
        memory = f"{self.machine['memory_bytes'] / 2**30:.0f} GiB"
        parts = [self.machine["cpu_info"], f"{self.machine['num_cores']} cores", memory, *self.machine["gpu_info"]]
        return ", ".join(parts)


def of_drops(row: Mapping[str, Any], command: Sequence[str]) -> Figure:
    """A row of models/bench_drops.py; its model stands in the command alone."""
    return Figure(
        model=Path(command[1]).name,
        dtype=row["dtype"],
        target=row.get("target", ""),
        case=f"{row['case']}, attention {row['pattern']} dropped",
        seconds=row["pruned_seconds"],
        against="dense",
        against_seconds=row["dense_seconds"],
        predicted=row["predicted"],
        # a prompt is not bound by reading
        fraction=row["fraction_of_read_bandwidth"] if row["case"].startswith("decode") else None,
        ceiling="read",
    )


def of_shapes(row: Mapping[str, Any], command: Sequence[str]) -> Figure:
    """A row of models/bench_shapes.py: a pruned model beside the dense one, or the dense one alone."""
    pruned = "pruned_seconds" in row
    return Figure(
        model=row["model"],
        dtype=row["dtype"],
        target=row.get("target", ""),
        case=f"{row['case']}, attention {row['pattern']} dropped" if pruned else row["case"],
        seconds=row["pruned_seconds" if pruned else "dense_seconds"],
        against="dense" if pruned else "",
        against_seconds=row["dense_seconds"] if pruned else (),
        predicted=row["predicted"] if pruned else None,
        fraction=row["fraction_of_ceiling"],
        ceiling="read" if row["case"].startswith("decode") else "multiply",
    )


def of_transformers(row: Mapping[str, Any], command: Sequence[str]) -> Figure:
    """A row of peers/bench_transformers.py."""
    multiply = "fractions_of_multiply_rate" in row
    dropped = ", ".join(map(str, row["drop_attn_list"]))
    return Figure(
        model=Path(row["model"]).name,
        dtype=row["dtype"],
        target=row.get("target", ""),
        case=f"{row['case']}, attention {dropped} dropped" if dropped else row["case"],
        seconds=row["pyruntime_seconds"],
        against="transformers",
        against_seconds=row["transformers_seconds"],
        fraction=row["fractions_of_multiply_rate" if multiply else "fractions_of_read_bandwidth"][0],
        ceiling="multiply" if multiply else "read",
    )


def of_sample(row: Mapping[str, Any], command: Sequence[str]) -> Figure:
    """A row of ops/bench_sample.py."""
    return Figure(
        model="sampler",
        dtype="float32",
        target="cpu",
        case=f"{row['case']}, {row['rows']} x {row['vocab']} logits",
        seconds=row["native_seconds"],
        against="reference",
        against_seconds=row["reference_seconds"],
    )


def of_skipless(row: Mapping[str, Any], command: Sequence[str]) -> Figure:
    """A row of models/bench_skipless.py."""
    return Figure(
        model=f"{row['shape']} without skips, {row['layers']} layers",
        dtype=row["dtype"],
        target="cpu",
        case=f"{row['case']}, {row['form']}",
        seconds=row["merged_seconds"],
        against="unmerged",
        against_seconds=row["unmerged_seconds"],
        predicted=row["predicted"],
        fraction=statistics.median(row["merged_fraction_of_read_bandwidth"]),
        ceiling="read",
    )


# kind -> title, what makes a figure of a row
KINDS: Final[Mapping[str, tuple[str, Callable[[Mapping[str, Any], Sequence[str]], Figure]]]] = {
    "transformers": ("pyruntime beside eager transformers, the same weights", of_transformers),
    "drops": ("A pruned model beside the dense one", of_drops),
    "shapes": ("Published shapes with random weights", of_shapes),
    "skipless": ("Q and P merged away, random weights", of_skipless),
    "sample": ("The choice of the next token, compiled beside torch", of_sample),
}


def read_run(path: Path) -> Run:
    """The run in one result file. Raises UsageError RESULTS that names the file, for whatever is wrong with it."""
    named = NAME.fullmatch(path.stem)
    if named is None or named["kind"] not in KINDS:
        what = "has no DATE-COMMIT-KIND name" if named is None else f"is of the unknown kind {named['kind']!r}"
        raise UsageError("RESULTS", f"{path.name} {what}; expected one of {', '.join(KINDS)}: rename or delete it")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        make = KINDS[named["kind"]][1]
        figures = [make(row, data["command"]) for row in data["rows"]]
        if not all(figure.seconds for figure in figures):
            raise ValueError("a row without samples")
        about = {name: data[name] for name in ("time", "commit", "command", "machine")}
        run = Run(path=path, kind=named["kind"], figures=figures, **about)
        run.machine_line()
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise UsageError(
            "RESULTS", f"{path.name} is no result file ({type(error).__name__}: {error}); measure again or delete it"
        ) from None
    return run


def read_runs(folder: Path) -> list[Run]:
    """All runs in the folder, oldest first."""
    return sorted(map(read_run, folder.glob("*.json")), key=lambda run: (run.time, run.path.name))


def read_gpu_runs(folder: Path) -> list[Run]:
    """All runs of gpu-check that were right, in the folders of `folder`, oldest first. Raises UsageError RESULTS.

    A run of the program on small shapes is no measurement, nor is one that was stopped before anything was timed.
    """
    found = [run for path in folder.glob("*/*.json") if (run := _read_gpu_run(path)) is not None]
    return sorted(found, key=lambda run: (run.time, run.path.name))


def _read_gpu_run(path: Path) -> Run | None:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["kind"] != "gpu":
            raise ValueError(f"its kind is {data['kind']!r}")
        if data["correct"] is not True or data["tiny"] or "tables" not in data:
            return None
        about = {name: data[name] for name in ("time", "commit", "command", "machine", "tables", "state")}
        figures = [_of_gpu(row, data) for name in ("decode", "long") for row in _rows(data, name)]
        run = Run(path=path, kind="gpu", figures=figures, **about)
        run.machine_line()
        gpu_table([run])
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise UsageError(
            "RESULTS",
            f"{path.parent.name}/{path.name} is no result file of gpu-check ({type(error).__name__}: {error}); "
            "measure again or delete it",
        ) from None
    return run


def _rows(data: Mapping[str, Any], section: str) -> Sequence[Mapping[str, Any]]:
    found: Sequence[Mapping[str, Any]] = data["sections"].get(section, {}).get("rows", ())
    return found


def _of_gpu(row: Mapping[str, Any], data: Mapping[str, Any]) -> Figure:
    """A decode step, beside the dense model's of the same section where it is another's."""
    cell = ("model", "batch", "context")
    same = [each for name in ("decode", "long") for each in _rows(data, name) if all(each[k] == row[k] for k in cell)]
    dense = [each for each in same if each["variant"] == "dense" and row["variant"] != "dense"]
    seconds, others = ([s for own in each["seconds"] for s in own] for each in (row, dense[0] if dense else row))
    return Figure(
        model=row["model"],
        dtype="bfloat16",
        target="cuda",
        case=f"decode, batch {row['batch']}, context {row['context']}, {row['variant']}",
        seconds=seconds,
        against="dense" if dense else "",
        against_seconds=others if dense else (),
        predicted=dense[0]["floor_seconds"] / row["floor_seconds"] if dense else None,
        fraction=row["floor_seconds"] / statistics.median(seconds),
        ceiling="copy",
    )


def gpu_table(runs: Sequence[Run]) -> str:
    """What stands between the GPU's markers: the newest run of each machine, or that there is none."""
    newest = {run.machine_line(): run for run in runs}
    parts = []
    for machine, run in sorted(newest.items()):
        versions = ", ".join(f"{name} {run.machine[name]}" for name in ("torch", "triton"))
        parts.append(f"**{machine}** ({versions}; commit {run.commit or 'unknown'}; {run.time[:10]}; `make gpu-check`)")
        for made in run.tables:
            if not made["detail"]:
                lines = [made["columns"], ["---"] * len(made["columns"]), *made["rows"]]
                parts.append("\n".join([made["title"], "", *(f"| {' | '.join(line)} |" for line in lines)]))
        parts += [f"Not all of it was done: {'; '.join(run.state)}."] if run.state else []
    return "\n\n".join(parts) or NOT_MEASURED


def table(runs: Sequence[Run]) -> str:
    """What stands between the markers: for each kind, the newest run of each command."""
    newest = {run.command_line(): run for run in runs}
    parts = []
    for kind, (title, _) in KINDS.items():
        for run in sorted((each for each in newest.values() if each.kind == kind), key=Run.command_line):
            about = f"{run.machine_line()}; commit {run.commit or 'unknown'}; {run.time[:10]}"
            heading = f"**{title}** ({about})  \n`{run.command_line()}`"
            parts += [heading, "\n".join(_lines(run))]
    return "\n\n".join(parts)


def _lines(run: Run) -> Iterator[str]:
    against = next((figure.against for figure in run.figures if figure.against), "")
    predicted = any(figure.predicted is not None for figure in run.figures)
    names = ["model", "case", "ms p50 (p20-p80)"]
    names += [f"{against} ms", "ratio"] if against else []
    names += ["predicted"] if predicted else []
    limited = any(figure.fraction is not None for figure in run.figures)
    names += ["of ceiling"] if limited else []
    yield f"| {' | '.join(names)} |"
    yield f"|---|---|{'---:|' * (len(names) - 2)}"
    for figure in run.figures:
        cells = [f"{figure.model} {figure.dtype} {figure.target}".rstrip(), figure.case, _times(figure.seconds)]
        if against:
            ratio = figure.ratio
            cells += [_times(figure.against_seconds), "" if ratio is None else f"{ratio:.2f}x"]
        if predicted:
            cells.append("" if figure.predicted is None else f"{figure.predicted:.2f}x")
        if limited:
            cells.append("" if figure.fraction is None else f"{figure.fraction:.0%} {figure.ceiling}")
        yield f"| {' | '.join(cells)} |"


def _times(seconds: Sequence[float]) -> str:
    if not seconds:
        return ""
    low, middle, high = (_milliseconds(percentile(seconds, percent)) for percent in (20, 50, 80))
    return f"{middle} ({low}-{high})"


def _milliseconds(seconds: float) -> str:
    value = seconds * 1e3
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def ledger(runs: Sequence[Run]) -> str:
    """Every figure of every run as CSV, oldest first."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    for run in runs:
        for figure in run.figures:
            times = [f"{percentile(figure.seconds, percent):.6g}" for percent in (50, 20, 80)]
            against = f"{statistics.median(figure.against_seconds):.6g}" if figure.against_seconds else ""
            numbers = ["" if value is None else f"{value:.4g}" for value in (figure.ratio, figure.predicted)]
            fraction = "" if figure.fraction is None else f"{figure.fraction:.4g}"
            what = [run.time[:10], run.commit, run.kind, figure.model, figure.dtype, figure.target, figure.case]
            compared = [figure.against, against, *numbers]
            writer.writerow([*what, *times, *compared, fraction, figure.ceiling, run.machine_line()])
    return out.getvalue()


def with_table(readme: str, text: str, markers: tuple[str, str] = (BEGIN, END)) -> str:
    """`readme` with `text` between its markers. Raises UsageError README where they are not there once, in order."""
    before, begin, rest = readme.partition(markers[0])
    _, end, after = rest.partition(markers[1])
    if not begin or not end or markers[0] in rest or markers[1] in after:
        raise UsageError(
            "README", f"README.md does not have {' and then '.join(markers)}, once each; add the two lines"
        )
    return f"{before}{markers[0]}\n\n{text}\n\n{markers[1]}{after}"


def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> int:
    """Write or check; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if something would change")
    check = parser.parse_args(arguments).check
    results = root / "benchmarks" / "results"
    readme = root / "README.md"
    try:
        runs, on_gpu = read_runs(results), read_gpu_runs(results)
        text = with_table(readme.read_text(encoding="utf-8"), table(runs))
        every = sorted([*runs, *on_gpu], key=lambda run: (run.time, run.path.name))
        wanted = {
            readme: with_table(text, gpu_table(on_gpu), (GPU_BEGIN, GPU_END)),
            results / "ledger.csv": ledger(every),
        }
        stale = [path for path, text in wanted.items() if _text(path) != text]
        for path in stale:
            name = path.relative_to(root)
            if check:
                print(f"{name} is not up to date; run python benchmarks/table.py", file=sys.stderr)
            else:
                write_text(path, wanted[path])
                print(f"written to {name}")
    except PyruntimeError as error:
        print(error.one_line(), file=sys.stderr)
        return error.exit_code
    return 1 if check and stale else 0


def _text(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.exists() else None


if __name__ == "__main__":
    sys.exit(main())
