"""Checks of every field of a specification: a bool is no int, a NaN is no number, all sizes are bounded."""

from __future__ import annotations

import math
from enum import StrEnum
from typing import Any, Final

from pyruntime.errors import UsageError

MAX_LAYERS: Final = 1024
MAX_VOCAB: Final = 1 << 20
MAX_WIDTH: Final = 1 << 20
MAX_HEADS: Final = 4096
MAX_EXPERTS: Final = 4096
MAX_HEAD_DIM: Final = 1024
MAX_POSITION: Final = 1 << 24


def check_int(name: str, value: Any, low: int, high: int) -> int:
    """Return `value` if it is an int (bool is not) in [low, high]; raise UsageError SPEC otherwise."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise UsageError("SPEC", f"{name} is {value!r} ({type(value).__name__}); expected an integer")
    if not low <= value <= high:
        raise UsageError("SPEC", f"{name} is {value}; expected an integer from {low} to {high}")
    return value


def check_real(name: str, value: Any, low: float, high: float) -> float:
    """Return `value` as a float if it is a finite number with low < value <= high; raise UsageError SPEC otherwise."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UsageError("SPEC", f"{name} is {value!r} ({type(value).__name__}); expected a number")
    # comparing before float(): a huge int from a hostile file would overflow the conversion
    if not low < value <= high or not math.isfinite(value):
        raise UsageError("SPEC", f"{name} is {value!r}; expected a number above {low:g} and at most {high:g}")
    return float(value)


def check_bool(name: str, value: Any) -> bool:
    """Return `value` if it is a bool; raise UsageError SPEC otherwise."""
    if not isinstance(value, bool):
        raise UsageError("SPEC", f"{name} is {value!r} ({type(value).__name__}); expected true or false")
    return value


def check_kind(name: str, value: Any, kinds: type[StrEnum]) -> None:
    """Raise UsageError SPEC unless `value` is a member of the enum `kinds`."""
    if not isinstance(value, kinds):
        raise UsageError("SPEC", f"{name} is {value!r}; expected one of {', '.join(kinds)}")


def require(condition: bool, message: str) -> None:
    """Raise UsageError SPEC with `message` unless `condition` holds."""
    if not condition:
        raise UsageError("SPEC", message)
