"""Whether everything computes what it should on this device. Nothing is timed unless all of it does."""

from __future__ import annotations

import re
import shutil
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import torch

from benchmarks.gpu import gate
from benchmarks.gpu.background import Background
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.kernels import CONTEXT, Group, attention_group, groups
from benchmarks.gpu.nodes import distinct_runs
from benchmarks.gpu.record import Section
from benchmarks.gpu.runner import Decoder
from benchmarks.gpu.settings import tiny_spec, variant
from pyruntime.errors import RunError
from pyruntime.plan import Plan

# what compute-sanitizer exits with where it found something
_FOUND: Final = 99
_SANITIZERS: Final = ("memcheck", "racecheck")
_OUTCOME: Final = re.compile(r"\b(PASSED|FAILED|ERROR|SKIPPED)\b")
# what compiles the kernels of a model into the cache, for this process to find them there
_AHEAD: Final = "compile ahead: "
_AHEAD_SECONDS: Final = 90.0
# beyond the checks that run meanwhile
_SANITIZER_SECONDS: Final = 60.0
_ROOM: Final = 16
# of attention: the last ones are for timing alone
_CHECKED_CASES: Final = 3
_FEW_LINES: Final = 8
_MANY_LINES: Final = 300


def check(bench: Bench, section: Section) -> None:
    """Raise RunError NUMERICS at the first thing that is wrong.

    The tests of the kernels run in processes of their own meanwhile, as do the sanitizers and what compiles kernels
    ahead of their use.
    """
    with tempfile.TemporaryDirectory() as folder:
        running: dict[str, Background] = {}
        try:
            running |= _start(bench, Path(folder))
            for name, each in running.items():
                if name.startswith(_AHEAD):
                    section.add({"check": name, "exit_code": each.wait(min(section.left(), _AHEAD_SECONDS))})
            _check_plans(bench, section)
            _check_kernels(bench, section)
            section.add({"check": "tests", **outcome(running["tests"], section.left())})
            for tool in _SANITIZERS:
                section.add({"check": tool, **sanitized(running.get(tool), min(section.left(), _SANITIZER_SECONDS))})
        finally:
            for each in running.values():
                each.wait(0.0)
    judge(section)


def _start(bench: Bench, folder: Path) -> dict[str, Background]:
    settings = bench.settings
    python = [sys.executable, "-u", "-m"]
    tests = [*python, "pytest", "-v", "-p", "no:cacheprovider", "--maxfail=20", "--tb=short", *settings.tests]
    if settings.num_test_processes and find_spec("xdist") is not None:
        tests += ["-n", str(settings.num_test_processes)]
    commands = {"tests": tests}
    tool = shutil.which("compute-sanitizer")
    if settings.sanitize and tool is not None:
        for name in _SANITIZERS:
            checked = [tool, "--tool", name, "--error-exitcode", str(_FOUND), *python, "benchmarks.gpu.one_step"]
            commands[name] = [*checked, "--tiny"]
    if settings.warm_up_compiler:
        for name in settings.models:
            commands[f"{_AHEAD}{name}"] = [*python, "benchmarks.gpu.one_step", "--model", name]
    # with memory of its own for every tensor, a sanitizer sees where each ends
    apart = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return {
        name: Background.start(command, folder / f"{name}.log", apart if name in _SANITIZERS else None)
        for name, command in commands.items()
    }


def _check_plans(bench: Bench, section: Section) -> None:
    """Whole small models: every variant and dtype against float64, and replays against single launches."""
    for qkv_bias in (False, True):
        spec = tiny_spec(tied=qkv_bias, qkv_bias=qkv_bias)
        for name, dtype in bench.settings.small_plans:
            model = bench.model(variant(spec, name))
            plan = bench.plan(model, dtype)
            what = f"a small {'tied ' if qkv_bias else ''}{name} model in {dtype}"
            nmse = gate.check_plan(what, plan, model, bench.settings.gate_lengths, torch.float64)
            section.add({"check": what, "nmse": nmse, **check_replays(what, plan, bench.settings.replayed_steps)})


def check_replays(what: str, plan: Plan, num_steps: int) -> dict[str, Any]:
    """Raise RunError NUMERICS unless captured decode steps leave the same bits as steps that are launched one by one.

    Compared are the logits and every key and value, after steps that fed their tokens back.
    """
    batch = 3
    replayed = Decoder(plan, batch, CONTEXT, _ROOM)
    replayed.start()
    for _ in range(num_steps):
        replayed.step()
    logits = replayed.logits().clone()
    # another cache: the graphs of the first are forgotten, and none is captured
    launched = Decoder(plan, batch, CONTEXT, _ROOM, capture=False)
    launched.start()
    for _ in range(num_steps):
        launched.step()
    pairs = [(logits, launched.logits())]
    for slot in range(launched.cache.num_slots):
        pairs += zip(replayed.cache.pools(slot), launched.cache.pools(slot), strict=True)
    # the spare page, last, is written by padding
    if not all(torch.equal(a, b) for a, b in [pairs[0], *((a[:-1], b[:-1]) for a, b in pairs[1:])]):
        raise RunError("NUMERICS", f"{what}: {num_steps} replayed steps differ from the same steps launched one by one")
    return {"replays": num_steps, "captured": replayed.captured}


def _check_kernels(bench: Bench, section: Section) -> None:
    """Nodes of real shapes by every backend: against float64, and the same bits every time."""
    repeats = bench.settings.bitwise_repeats
    for batch, context in bench.settings.attention_cases[:_CHECKED_CASES]:
        if section.fits(f"attention, {batch} x {context}"):
            group = attention_group(bench, batch, context)
            _check_node(section, f"attention, {batch} x {context}", group, batch, context, repeats)
    for name in bench.settings.kernel_models:
        for group in groups(bench, name):
            for rows in bench.settings.kernel_rows:
                what = f"{name} {group.label}, {rows} rows"
                if section.fits(what):
                    _check_node(section, what, group, rows, CONTEXT, repeats)


def _check_node(section: Section, what: str, group: Group, rows: int, context: int, repeats: int) -> None:
    for node in distinct_runs(group.plan, group.steps[:1], rows, context):
        name = f"{what}, {node.backend}"
        with torch.inference_mode():
            nmse = node.check(name, group.model)
            node.check_repeats(name, repeats)
        section.add({"check": name, "nmse": nmse, "repeats": repeats})


def outcome(running: Background, seconds: float) -> dict[str, Any]:
    """How the tests of the kernels did; None for an exit code where their time was over."""
    code, text = running.wait(seconds), running.text()
    counts = {name.lower(): 0 for name in ("PASSED", "FAILED", "ERROR", "SKIPPED")}
    for line in text.splitlines():
        if (found := _OUTCOME.search(line)) is not None and "::" in line:
            counts[found[1].lower()] += 1
    # where something failed the file holds what there is to know: the machine may be gone when it is read
    count = _FEW_LINES if code in (0, None) and not counts["failed"] else _MANY_LINES
    return {"exit_code": code, **counts, "said": text.splitlines()[-count:]}


def sanitized(running: Background | None, seconds: float) -> dict[str, Any]:
    """What a sanitizer found; one that cannot run, or is not there, finds nothing."""
    if running is None:
        return {"exit_code": None, "found": False, "why": "compute-sanitizer is not there, or was not asked for"}
    code = running.wait(seconds)
    count = _MANY_LINES if code == _FOUND else _FEW_LINES
    return {"exit_code": code, "found": code == _FOUND, "said": running.text().splitlines()[-count:]}


def judge(section: Section) -> None:
    """Raise RunError NUMERICS for what the processes found; tests that did not end are noted as cut."""
    for row in section.data["rows"]:
        if row["check"] == "tests" and (row["failed"] or row["error"] or row["exit_code"] not in (0, None)):
            raise RunError("NUMERICS", f"the tests of the kernels failed: {' | '.join(row['said'][-4:])}")
        if row["check"] == "tests" and not row["passed"]:
            raise RunError("NUMERICS", "no test of the kernels passed in the time there was; nothing is proven")
        if row["check"] == "tests" and row["exit_code"] is None:
            section.data["cut"].append(f"tests of the kernels behind the first {row['passed']}")
        if row.get("found"):
            raise RunError("NUMERICS", f"compute-sanitizer {row['check']}: {' | '.join(row['said'][-3:])}")
