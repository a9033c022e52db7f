"""Which kernels run a node, by number of rows: from a table of measurements, or by a rule that says it is one."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

from pyruntime.errors import PyruntimeError
from pyruntime.ops.gpu.device import GpuInfo

_FOLDER: Final = Path(__file__).parents[1] / "choices"


class Backend(StrEnum):
    """Who computes: our Triton kernels, our CUDA C++ kernels, or the vendor's library through torch."""

    TRITON = "triton"
    CUDA = "cuda"
    VENDOR = "vendor"


@dataclass(frozen=True, slots=True)
class Choice:
    """`backend` runs steps of up to `max_rows` rows (None: any number), for the `reason` that explain() prints."""

    max_rows: int | None
    backend: Backend
    reason: str


@dataclass(frozen=True, slots=True)
class Choices:
    """Choices in ascending order of rows; the last one has no bound."""

    ranges: tuple[Choice, ...]

    def at(self, num_rows: int) -> Choice:
        """The choice for a step of `num_rows` rows."""
        return next(each for each in self.ranges if each.max_rows is None or num_rows <= each.max_rows)

    def uses(self, backend: Backend) -> bool:
        """Whether some number of rows is the backend's."""
        return any(each.backend is backend for each in self.ranges)

    def without_cuda(self, reason: str) -> Choices:
        """The same with Triton's kernels in place of CUDA C++, because the latter refuse."""
        ranges = tuple(
            Choice(each.max_rows, Backend.TRITON, f"cuda refused: {reason}") if each.backend is Backend.CUDA else each
            for each in self.ranges
        )
        return Choices(ranges)

    def __str__(self) -> str:
        """Ranges of rows, what runs each, and why."""
        parts = [
            f"{each.backend} {'beyond' if each.max_rows is None else f'to {each.max_rows} rows'}"
            for each in self.ranges
        ]
        reasons = dict.fromkeys(each.reason for each in self.ranges)
        return f"{', '.join(parts)} ({'; '.join(reasons)})"


# rows that one program holds beside its tile of weights
SKINNY_ROWS: Final = 16
_NOT_MEASURED: Final = "not measured on this device"
DEFAULT: Final = Choices(
    (Choice(SKINNY_ROWS, Backend.TRITON, _NOT_MEASURED), Choice(None, Backend.VENDOR, _NOT_MEASURED))
)
# the vendor's attention knows neither pages nor what was merged away
_OURS: Final = Choices((Choice(None, Backend.TRITON, _NOT_MEASURED),))
# ops that more than one backend runs
_DEFAULTS: Final = {**dict.fromkeys(("qkv_rope", "linear", "mlp", "mlp_chain", "head"), DEFAULT), "attention": _OURS}


@dataclass(frozen=True, slots=True)
class Measured:
    """One line of a table: the fastest backend for steps of up to `max_rows` rows of a node that weighs `weights`."""

    op: str
    weights: int
    max_rows: int | None
    backend: Backend


def choices_of(op: str, num_weights: int, info: GpuInfo, table: Sequence[Measured]) -> Choices | None:
    """What runs a node of `num_weights` weights, or None where there is no choice.

    Of the table's nodes with the same op, the nearest in size decides: time goes with the bytes that are read.
    """
    if op not in _DEFAULTS:
        return None
    sizes = {each.weights for each in table if each.op == op}
    if not sizes:
        return _DEFAULTS[op]
    nearest = min(sizes, key=lambda size: abs(size - num_weights))
    lines = [each for each in table if (each.op, each.weights) == (op, nearest)]
    lines.sort(key=lambda each: (each.max_rows is None, each.max_rows))
    reason = f"measured on {info.name}"
    return Choices(tuple(Choice(each.max_rows, each.backend, reason) for each in lines))


def forced(op: str, backend: Backend) -> Choices | None:
    """The backend that was asked for, for every step; None where there is no choice."""
    if op not in _DEFAULTS:
        return None
    if op == "attention" and backend is Backend.VENDOR:
        return _OURS
    return Choices((Choice(None, backend, "asked for"),))


def table_name(gpu: str) -> str:
    """The name of a GPU's table, such as nvidia-h200."""
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")


def load_table(info: GpuInfo, folder: Path = _FOLDER) -> tuple[Measured, ...]:
    """The measurements that ship for a GPU; none where nobody has measured it. Raises PyruntimeError CHOICES."""
    path = folder / f"{table_name(info.name)}.json"
    if not path.is_file():
        return ()
    lines = json.loads(path.read_text(encoding="utf-8"))["choices"]
    return tuple(_line(path.name, line) for line in lines)


def _line(where: str, line: Mapping[str, Any]) -> Measured:
    try:
        return Measured(line["op"], int(line["weights"]), line["max_rows"], Backend(line["backend"]))
    except (KeyError, TypeError, ValueError) as error:
        raise PyruntimeError("CHOICES", f"{where} holds {str(line)[:80]!r} ({error}); make it with gpu-check") from None
