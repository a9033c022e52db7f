"""The lock files: what every kernel needs on each architecture, and what is worse than what they say."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from tests.kernels.facts import Facts

FOLDER: Final = Path(__file__).parent / "locks"
# the most shared memory of one block, in bytes
SHARED_LIMITS: Final = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
# registers and shared memory may grow by this much before the lock has to be made anew
TOLERANCE: Final = 1.1
_PTXAS: Final = "ptxas uses fewer registers than there are; values stored in front of the loops and read behind them"
# (lock file, what a kernel's description starts with): the bytes that it may spill, and why; nothing else may spill
KNOWN_SPILLS: Final[Mapping[tuple[str, str], tuple[int, str]]] = {
    (
        "sm_80",
        "attention_prefill_kernel GROUP=4 SPLIT=1 MIN_CHUNK=256 WINDOW=None SOFTCAP=None ALIBI=0 SHAPED=0 "
        "HEAD_DIM=64 DIMS=64 PAGE=16 TILE=16 ROWS=16 PARTS=4 BLOCK=64 warps=4 stages=5",
    ): (16, _PTXAS),
    (
        "sm_80",
        "attention_prefill_kernel GROUP=7 SPLIT=1 MIN_CHUNK=256 WINDOW=None SOFTCAP=None ALIBI=0 SHAPED=0 "
        "HEAD_DIM=64 DIMS=64 PAGE=16 TILE=16 ROWS=16 PARTS=4 BLOCK=64 warps=4 stages=5",
    ): (16, _PTXAS),
    (
        "sm_90",
        "attention_prefill_kernel GROUP=4 SPLIT=1 MIN_CHUNK=256 WINDOW=None SOFTCAP=None ALIBI=0 SHAPED=0 "
        "HEAD_DIM=64 DIMS=64 PAGE=16 TILE=16 ROWS=16 PARTS=4 BLOCK=32 warps=8 stages=3",
    ): (8, _PTXAS),
    (
        "sm_100",
        "qkv_rope_kernel HAS_PRE_NORM=1 HAS_PRE_GAIN=1 HAS_BIAS=0 Q_PROJECTED=0 K_PROJECTED=0 "
        "V_PROJECTED=0 Q_MERGED=32 K_MERGED=0 V_MERGED=0 Q_NORM=0 K_NORM=0 V_NORM=0 KV_HEADS=0 HEAD_DIM=128 "
        "HALF=64 PAGE_SIZE=16 DIMS=128 PAIRS=64 BLOCK_LANES=64 BLOCK_INPUTS=64 "
        "BLOCK_ROWS=16 SPLITS=11 MERGED_TILE=8 warps=4 stages=3",
    ): (8, _PTXAS),
}


@dataclass(frozen=True, slots=True)
class Lock:
    """Facts of kernels by what tells them apart, as `compiler` made them."""

    compiler: str
    kernels: Mapping[str, Facts]


def read(name: str) -> Lock:
    """The lock file called `name`; an empty lock where there is none."""
    path = FOLDER / f"{name}.json"
    if not path.exists():
        return Lock("", {})
    data: dict[str, Any] = json.loads(path.read_text())
    kernels = {
        key: Facts(fields["registers"], fields["shared"], fields.get("spilled", 0), tuple(fields["instructions"]))
        for key, fields in data["kernels"].items()
    }
    return Lock(data["compiler"], kernels)


def write(name: str, lock: Lock) -> None:
    """Write a lock file, a line for each kernel."""
    lines = [f"    {json.dumps(key)}: {_line(facts)}" for key, facts in sorted(lock.kernels.items())]
    text = ",\n".join(lines)
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / f"{name}.json").write_text(
        f'{{\n  "compiler": {json.dumps(lock.compiler)},\n  "kernels": {{\n{text}\n  }}\n}}\n'
    )


def _line(facts: Facts) -> str:
    spilled = {"spilled": facts.spilled} if facts.spilled else {}
    return json.dumps(
        {"registers": facts.registers, "shared": facts.shared, **spilled, "instructions": facts.instructions}
    )


def broken(
    found: Mapping[str, Facts | str], name: str, capability: int, waiting: Collection[str] = frozenset()
) -> dict[str, str]:
    """What is wrong with any compiler: kernels that do not compile, spill, or need more shared memory than there is.

    `name` is that of their lock file. Those in `waiting` start before the kernel in front has ended, so they must have
    the instruction that waits for it.
    """
    reasons: dict[str, str] = {}
    for key, facts in found.items():
        if isinstance(facts, str):
            reasons[key] = facts
            continue
        allowed = _allowed(name, key)
        if facts.spilled > allowed:
            reasons[key] = f"spills {facts.spilled} bytes with {facts.registers} registers; expected {allowed}"
        elif key in waiting and "ACQBULK" not in facts.instructions:
            reasons[key] = "starts early and does not wait for the kernel in front; call wait_for_inputs"
        elif facts.shared > SHARED_LIMITS[capability]:
            reasons[key] = (
                f"needs {facts.shared} bytes of shared memory; sm_{capability} has {SHARED_LIMITS[capability]}"
            )
    return reasons


def _allowed(name: str, key: str) -> int:
    known = (
        spilled for (where, start), (spilled, _) in KNOWN_SPILLS.items() if where == name and key.startswith(start)
    )
    return max(known, default=0)


def unneeded(found: Mapping[str, Facts | str], name: str) -> dict[str, str]:
    """Known spills that are gone, or smaller."""
    reasons = {}
    for (where, start), (allowed, _) in KNOWN_SPILLS.items():
        known = [each.spilled for key, each in found.items() if isinstance(each, Facts) and key.startswith(start)]
        if where == name and max(known, default=0) < allowed:
            reasons[start] = f"may spill {allowed} bytes and does not; lower or remove its line in KNOWN_SPILLS"
    return reasons


def worse(found: Mapping[str, Facts], locked: Mapping[str, Facts]) -> dict[str, str]:
    """Kernels that are worse than the lock says, that it lacks, and that it has and nobody launches."""
    reasons = dict.fromkeys(locked.keys() - found.keys(), "is in the lock file and is not launched any more")
    for key, facts in found.items():
        if key not in locked:
            reasons[key] = "is not in the lock file"
        elif why := _worse(facts, locked[key]):
            reasons[key] = why
    return reasons


def _worse(found: Facts, locked: Facts) -> str:
    lost = [kind for kind in locked.instructions if kind not in found.instructions]
    grown = [
        f"{name} grew from {before} to {now}"
        for name, before, now in (
            ("registers", locked.registers, found.registers),
            ("shared memory", locked.shared, found.shared),
        )
        if now > TOLERANCE * before
    ]
    return "; ".join([*grown, *([f"lost {' and '.join(lost)}"] if lost else [])])
