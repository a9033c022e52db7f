"""Every op of a target on this machine against the reference, and what each implementation leaves to it."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

import torch

from pyruntime.bench.selfcheck.judge import Found, limit_of
from pyruntime.bench.selfcheck.models import graphs, model_of, slim_spec
from pyruntime.bench.selfcheck.sampling import check_sampler
from pyruntime.bench.selfcheck.walk import check_plan, reason_of
from pyruntime.checkpoint.atomic import make_folder, write_text
from pyruntime.errors import RunError
from pyruntime.graph import build
from pyruntime.ops.gpu import trust
from pyruntime.ops.gpu.device import GpuInfo, gpu_info
from pyruntime.ops.table import OPS, Implementation
from pyruntime.plan import DTYPES, lower

# of each target, what its kernels compute in
_DTYPES: Final = {
    "cpu": (torch.float32, torch.bfloat16),
    "cuda": (torch.bfloat16, torch.float16, torch.float32),
}
# the interpreter takes half a minute each
_INTERPRETED_DTYPES: Final = (torch.float32, torch.bfloat16)
_SAMPLE: Final = "sample"
_LOGGER: Final = logging.getLogger("pyruntime")


class Verdict(StrEnum):
    """What became of one op in one dtype."""

    PASSED = "passed"
    FAILED = "failed"
    # the reference runs it, whatever its attributes are
    REFUSED = "refused"
    # no model of the check has it
    UNCHECKED = "unchecked"


@dataclass(frozen=True, slots=True)
class OpCheck:
    """One op of one target in one dtype: its largest NMSE and the limit, or why it failed or was not run."""

    op: str
    target: str
    dtype: str
    verdict: Verdict
    nmse: float | None = None
    limit: float | None = None
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Refusal:
    """What an implementation leaves to the reference, and why; `dtypes` of those that refuse nothing else."""

    op: str
    target: str
    dtypes: tuple[str, ...]
    reason: str


def check_target(
    target: str, device: torch.device, progress: Callable[[str], None] | None = None
) -> tuple[OpCheck, ...]:
    """Run every op of `target` on `device` and compare; `progress` is told what comes next.

    Raises UsageError where the target cannot run at all.
    """
    interpreted = target == "cuda" and device.type == "cpu"
    checks: list[OpCheck] = []
    for dtype in _INTERPRETED_DTYPES if interpreted else _DTYPES[target]:
        if progress is not None:
            progress(f"{target} on {device}, {_name(dtype)}")
        checks.extend(_check_dtype(target, device, dtype))
    return tuple(checks)


def check_gpu_and_remember(device: torch.device, progress: Callable[[str], None] | None = None) -> tuple[OpCheck, ...]:
    """`check_target` for a GPU, whose failures plans read from then on (ops/gpu/trust.py).

    One warning says so where they cannot be kept.
    """
    info = gpu_info(device)
    # what failed the last time must be lowered again to be checked again
    _remember(info, {})
    checks = check_target("cuda", device, progress)
    _remember(info, failures(checks))
    return checks


def _remember(info: GpuInfo, failed: Mapping[str, str]) -> None:
    path = trust.file_of(info)
    if info.interpreted or (path is None and not failed):
        return
    try:
        if path is None:
            raise RunError("IO", "there is no home folder")
        make_folder(path.parent)
        write_text(path, trust.as_text(info, failed))
    except RunError as error:
        _LOGGER.warning("what the self-check finds is not remembered: %s", error)


def failures(checks: Sequence[OpCheck]) -> dict[str, str]:
    """Failed ops and the first reason of each."""
    found: dict[str, str] = {}
    for each in checks:
        if each.verdict is Verdict.FAILED:
            found.setdefault(each.op, f"{each.dtype}: {each.reason}")
    return found


def refusals(target: str) -> tuple[Refusal, ...]:
    """What implementations of `target` refuse: of the models of the check, of one with slim attention, of dtypes."""
    nodes = [node for _, graph in graphs() for node in graph.nodes] + list(build(slim_spec()).nodes)
    dtypes: dict[tuple[str, str], list[str]] = {}
    for node in nodes:
        for implementation in OPS[node.op]:
            for name, dtype in DTYPES.items() if implementation.target == target else ():
                reason = _refusal(implementation, node.attrs, dtype)
                if reason is not None and name not in dtypes.setdefault((node.op, reason), []):
                    dtypes[node.op, reason].append(name)
    missing = [op for op, found in OPS.items() if all(each.target != target for each in found)]
    return (
        *(Refusal(op, target, tuple(names), reason) for (op, reason), names in dtypes.items()),
        *(Refusal(op, target, tuple(DTYPES), f"target {target} has no {op}") for op in missing),
    )


def _refusal(implementation: Implementation, attrs: Any, dtype: torch.dtype) -> str | None:
    try:
        return implementation.refuses(attrs, dtype)
    # kernels that cannot even be loaded
    except Exception as error:
        return reason_of(error)


def _check_dtype(target: str, device: torch.device, dtype: torch.dtype) -> list[OpCheck]:
    found, refused = Found(), {}
    for spec, graph in graphs():
        model = model_of(spec, dtype)
        try:
            plan = lower(graph, model, target=target, device=str(device))
            refused.update({step.node.op: step.reason for step in plan.steps if step.implementation.target != target})
            check_plan(plan, graph, model, found)
        # kernels that cannot even be loaded, a device that is lost: whatever it may raise is a result of the check
        except Exception as error:
            for node in graph.nodes:
                found.fail(node.op, reason_of(error))
            continue
        if _SAMPLE not in (*found.nmse, *found.wrong):
            check_sampler(plan, found)
    ops = [op for op, each in OPS.items() if any(one.target == target for one in each)]
    return [_verdict(op, target, dtype, found, refused) for op in (*ops, _SAMPLE)]


def _verdict(op: str, target: str, dtype: torch.dtype, found: Found, refused: dict[str, str]) -> OpCheck:
    name, nmse = _name(dtype), found.nmse.get(op)
    limit = 0.0 if op == _SAMPLE else limit_of(op, dtype)
    if op in found.wrong:
        # infinite where something was not written: no number that JSON has
        known = nmse if nmse is not None and math.isfinite(nmse) else None
        return OpCheck(op, target, name, Verdict.FAILED, known, limit, found.wrong[op])
    if nmse is not None:
        return OpCheck(op, target, name, Verdict.PASSED, nmse, limit)
    if op in refused:
        return OpCheck(op, target, name, Verdict.REFUSED, reason=refused[op])
    return OpCheck(op, target, name, Verdict.UNCHECKED, reason="no model of the check has it")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
