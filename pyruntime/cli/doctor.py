"""`pyruntime doctor`: what this machine has, and whether every kernel gives the reference's results on it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pyruntime.bench import machine
from pyruntime.bench.selfcheck import (
    Backend,
    OpCheck,
    Refusal,
    Verdict,
    backends,
    check_gpu_and_remember,
    check_target,
    refusals,
)
from pyruntime.cli import options as o

_MARKS = {
    Verdict.PASSED: "[green]✓[/]",
    Verdict.FAILED: "[red]✗[/]",
    Verdict.REFUSED: "reference",
    Verdict.UNCHECKED: "not checked",
}


def doctor(as_json: o.Json = False) -> None:
    """Show the backends of this machine and check every kernel against the reference; exit 1 where one fails.

    A kernel of a GPU that fails is disabled for this user, with this driver and these versions, until a later check
    passes.
    """
    console = Console(stderr=as_json)
    found = backends()
    checks: list[tuple[str, OpCheck]] = []
    # on a terminal only
    with console.status("Checking") as status:
        for backend, device in ((each, device) for each in found for device in each.devices):
            checks.extend((str(device), each) for each in _checked(backend, device, status.update))
    left = [each for backend in found if backend.devices for each in refusals(backend.target)]
    if as_json:
        print(json.dumps(_as_json(found, checks, left)))
    else:
        for table in (_backend_table(found), _check_table(checks), _refusal_table(left)):
            console.print(table)
    if any(each.verdict is Verdict.FAILED for _, each in checks):
        raise typer.Exit(1)


def _checked(backend: Backend, device: torch.device, progress: Any) -> tuple[OpCheck, ...]:
    match backend.target:
        case "cpu":
            return check_target("cpu", device, progress)
        case "cuda":
            return check_gpu_and_remember(device, progress)
        case _:
            # what the others are held against
            return ()


def _as_json(
    found: Sequence[Backend], checks: Sequence[tuple[str, OpCheck]], left: Sequence[Refusal]
) -> dict[str, Any]:
    return {
        "machine": machine(),
        "backends": [
            {"target": b.target, "devices": list(map(str, b.devices)), "missing": b.missing, **b.facts} for b in found
        ],
        "checks": [{"device": device, **asdict(each)} for device, each in checks],
        "left_to_the_reference": [asdict(each) for each in left],
    }


def _backend_table(found: Sequence[Backend]) -> Table:
    table = Table(title="Backends", title_justify="left", box=None)
    for column in ("target", "", "what it has"):
        table.add_column(column, overflow="fold")
    for each in found:
        facts = "\n".join(f"{name}: {_shown(value)}" for name, value in each.facts.items())
        mark = _MARKS[Verdict.FAILED if each.missing else Verdict.PASSED]
        table.add_row(each.target, mark, escape("\n".join(filter(None, (each.missing, facts)))))
    return table


def _check_table(checks: Sequence[tuple[str, OpCheck]]) -> Table:
    dtypes = list(dict.fromkeys(each.dtype for _, each in checks))
    table = Table(title="Kernels against the reference (NMSE)", title_justify="left", box=None)
    for column in ("op", "target", "device", *dtypes, "why"):
        table.add_column(column, overflow="fold")
    rows = dict.fromkeys((each.op, each.target, device) for device, each in checks)
    for op, target, device in rows:
        mine = {each.dtype: each for where, each in checks if (each.op, each.target, where) == (op, target, device)}
        why = dict.fromkeys(each.reason for each in mine.values() if each.reason)
        cells = [_cell(mine[dtype]) if dtype in mine else "" for dtype in dtypes]
        table.add_row(op, target, device, *cells, escape("; ".join(why)))
    return table


def _refusal_table(left: Sequence[Refusal]) -> Table:
    table = Table(title="Left to the reference", title_justify="left", box=None)
    for column in ("target", "dtypes", "ops", "why"):
        table.add_column(column, overflow="fold")
    ops: dict[tuple[str, str, str], list[str]] = {}
    for each in left:
        ops.setdefault((each.target, ", ".join(each.dtypes), each.reason), []).append(each.op)
    for (target, dtypes, reason), names in ops.items():
        table.add_row(target, dtypes, ", ".join(names), escape(reason))
    return table


def _cell(check: OpCheck) -> str:
    mark = _MARKS[check.verdict]
    # samplers give tokens, which are the same or not
    return mark if check.nmse is None or (check.limit == 0.0 and check.nmse == 0.0) else f"{mark} {check.nmse:.0e}"


def _shown(value: object) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else str(value)
