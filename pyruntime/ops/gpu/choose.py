"""Which kernels run a matrix product, by number of rows: from a table of measurements, or a default that says so."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

from pyruntime.ops.gpu.device import GpuInfo


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


# rows that one Triton program holds with its tile of weights
SKINNY_ROWS: Final = 16
_NOT_MEASURED: Final = "not measured on this device"
DEFAULT: Final = Choices(
    (Choice(SKINNY_ROWS, Backend.TRITON, _NOT_MEASURED), Choice(None, Backend.VENDOR, _NOT_MEASURED))
)


def choices_of(op: str, attrs: Any, info: GpuInfo, has_compiled: bool) -> Choices:
    """What runs a node by number of rows on this device."""
    return DEFAULT
