"""Prove and measure everything on this GPU, in one go and within nine minutes.

make gpu-check
make gpu-check PYTHON=/path/to/python ARGS="--deadline 300 --only decode"
make gpu-check WRITE_CHOICES=1

Correctness comes first: where it fails no time is printed and the exit code is 1. Every section is written to
benchmarks/results/GPU/DATE-COMMIT.json as it goes; what the deadline did not allow is named there.
With TRITON_INTERPRET=1 `--device cpu --tiny` tries the program itself in Triton's interpreter.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import torch

from benchmarks.gpu import baselines, build, ceilings, correctness, decode, kernels, prefill, report
from benchmarks.gpu.background import ROOT
from benchmarks.gpu.bars import bars
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.facts import clocks, device_facts
from benchmarks.gpu.record import EVERYTHING, FAILED, WRONG, Deadline, Record, Section
from benchmarks.gpu.settings import full, tiny
from pyruntime import PyruntimeError
from pyruntime.bench import commit, machine
from pyruntime.checkpoint.atomic import make_folder, write_text
from pyruntime.errors import UsageError
from pyruntime.ops.gpu.choose import table_name

RESULTS: Final = ROOT / "benchmarks" / "results"
CHOICES: Final = ROOT / "pyruntime" / "ops" / "choices"
_SECONDS: Final = 540.0
# by which share of the time each must end; what one leaves is for those behind it
_SECTIONS: Final[tuple[tuple[str, float, Callable[[Bench, Section], None]], ...]] = (
    ("ceilings", 0.12, ceilings.measure),
    ("correctness", 0.40, correctness.check),
    ("kernels", 0.52, kernels.measure),
    ("decode", 0.80, decode.measure),
    ("baselines", 0.92, baselines.measure),
    ("prefill", 0.95, prefill.measure),
    ("tail", 0.98, prefill.measure_tail),
    ("long", 1.0, decode.measure_long),
)
_BUILT: Final = 0.30
# whose results the others need
_ALWAYS: Final = ("ceilings", "correctness")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it; the exit code."""
    options = parse(arguments)
    deadline = Deadline(options.deadline)
    try:
        _check_device(options.device)
        bench = Bench.of(torch.device(options.device), tiny() if options.tiny else full())
        facts = device_facts(bench.device)
        record = Record(
            options.out / table_name(facts["name"]), _stem(options), _about(options, facts, arguments), deadline
        )
    except PyruntimeError as error:
        print(error.one_line(), file=sys.stderr)
        return error.exit_code
    # kernels that are compiled here stay here, and the next run finds them
    os.environ.setdefault("TRITON_CACHE_DIR", str(build.LOGS / "triton"))
    building = None if options.no_build else build.start()
    try:
        return run(bench, record, building, options)
    finally:
        if building is not None:
            building.wait(0.0)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--deadline", type=float, default=_SECONDS, help=f"seconds for everything ({_SECONDS:.0f})")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of result files")
    parser.add_argument("--only", action="append", choices=[name for name, _, _ in _SECTIONS], help="may be repeated")
    parser.add_argument("--commit", help="what to call the sources where there is no git")
    parser.add_argument("--no-build", action="store_true", help="take the extensions as they are")
    parser.add_argument("--tiny", action="store_true", help="small shapes, to try the program itself")
    parser.add_argument(
        "--write-choices", action="store_true", help="write the fastest backends to pyruntime/ops/choices/GPU.json"
    )
    return parser.parse_args(arguments)


def _check_device(name: str) -> None:
    if torch.device(name).type == "cuda" and not torch.cuda.is_available():
        raise UsageError(
            "DEVICE",
            f"torch {torch.__version__} finds no GPU it can use; run this where there is one, with a torch for it",
        )


def run(bench: Bench, record: Record, building: Any, options: argparse.Namespace) -> int:
    """All sections in order; the exit code."""
    for name, share, measure in _SECTIONS:
        if options.only is not None and name not in (*_ALWAYS, *options.only):
            continue
        if name == "correctness":
            # the first that needs them
            record.data["build"] = build.finish(building, record.deadline.left(_BUILT))
            _say(record.data["build"]["note"])
            record.data["device"] = device_facts(bench.device)
        _say(f"{name} ...")
        status = record.section(name, share, functools.partial(_measured, bench, measure))
        _say(f"{name}: {status}, {record.deadline.elapsed():.0f} s since the start")
        nothing = name in _ALWAYS and (status == FAILED or record.data["sections"][name]["cut"] == [EVERYTHING])
        if status == WRONG or nothing:
            return _refused(record, name)
        if name == "correctness":
            record.data["correct"] = True
        if name == "kernels" and options.write_choices:
            # what is timed behind them runs by them
            _write_choices(record.data)
        if record.data["correct"]:
            _tell(record.data)
    return _ended(record, options)


def _measured(bench: Bench, measure: Callable[[Bench, Section], None], section: Section) -> None:
    # what the section before it held, even where it failed
    bench.tidy()
    measure(bench, section)


def _ended(record: Record, options: argparse.Namespace) -> int:
    data = record.data
    data["clocks_behind"] = clocks()
    record.flush()
    print(report.printed(data["tables"]))
    print("\n" + "\n".join(data["state"] or ["all sections were done"]))
    print(f"written to {_shown(record.path)}")
    return 1 if any(section["status"] == FAILED for section in data["sections"].values()) else 0


def _tell(data: dict[str, Any]) -> None:
    """Put into the file what is told of it: a run that is stopped later has said what it knew."""
    data["bars"] = bars(data)
    data["tables"] = report.tables(data)
    data["state"] = report.state(data)


def _refused(record: Record, name: str) -> int:
    data = record.data
    data["correct"] = False
    for told in ("bars", "tables", "state"):
        data.pop(told, None)
    record.flush()
    print(f"{name}: {data['sections'][name].get('error', 'there was no time for it')}", file=sys.stderr)
    print(f"no time is printed; what was found is in {_shown(record.path)}", file=sys.stderr)
    return 1


def _write_choices(data: dict[str, Any]) -> None:
    lines = kernels.choices(data["sections"].get("kernels", {}).get("rows", []))
    path = CHOICES / f"{table_name(data['device']['name'])}.json"
    make_folder(CHOICES)
    about = {"made_by": "make gpu-check WRITE_CHOICES=1", "commit": data["commit"], "time": data["time"]}
    write_text(path, json.dumps({**about, "choices": lines}, indent=1) + "\n")
    _say(f"{len(lines)} choices written to {_shown(path)}")


def _about(options: argparse.Namespace, facts: dict[str, Any], arguments: Sequence[str] | None) -> dict[str, Any]:
    given = sys.argv[1:] if arguments is None else list(arguments)
    # where a folder outside the checkout lies is nobody's business
    command = ["benchmarks/gpu/check.py", *(Path(each).name if each.startswith("/") else each for each in given)]
    return {
        "kind": "gpu",
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": options.commit or commit(),
        "command": command,
        "machine": machine(),
        "device": facts,
        "tiny": options.tiny,
        "deadline": options.deadline,
        "clocks_before": clocks(),
    }


def _stem(options: argparse.Namespace) -> str:
    today = datetime.datetime.now(datetime.UTC)
    return f"{today:%Y-%m-%d}-{options.commit or commit().removesuffix('-dirty') or 'unknown'}"


def _shown(path: Path) -> str:
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path.name)


def _say(text: str) -> None:
    if text:
        print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
