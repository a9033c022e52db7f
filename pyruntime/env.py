"""Every environment variable that pyruntime reads, in one place.

A variable is read when it is asked for, never at import, and a value that cannot be understood is an error: a typing
mistake must not silently choose another path.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from pyruntime.errors import UsageError

# name -> what it does; `pyruntime collect-env` prints this table with the values in force
VARIABLES: Final = {
    "PYRUNTIME_LOGGING_LEVEL": "debug, info, warning or error (default: as the host has it; warning for the command)",
    "PYRUNTIME_CPU_ISA": "generic, avx2, avx512 or avx512_bf16: the compiled CPU path (default: the best there is)",
    "PYRUNTIME_NUM_THREADS": "threads of the C++ ops (default: what affinity and the cgroup allow)",
    "PYRUNTIME_TEST_DATA": "folder with models/ and corpora/ for the tests that check real trained models",
    "PYRUNTIME_CUDA": "auto, 0 or 1: whether a build compiles the CUDA extension (read by setup.py)",
}

# kMaxThreads of csrc/cpu/parallel.h
_MAX_THREADS: Final = 1024
_LEVELS: Final = ("debug", "info", "warning", "error")


def logging_level() -> str | None:
    """Level asked for, in capitals, or None. Raises UsageError for a name that is no level."""
    value = os.environ.get("PYRUNTIME_LOGGING_LEVEL")
    if value is None:
        return None
    if value.lower() not in _LEVELS:
        raise UsageError("ENV", f"PYRUNTIME_LOGGING_LEVEL is {value!r}; expected one of {', '.join(_LEVELS)}")
    return value.upper()


def cpu_isa() -> str | None:
    """Name of the CPU path asked for, or None for the best one."""
    return os.environ.get("PYRUNTIME_CPU_ISA") or None


def num_threads() -> int | None:
    """Threads asked for, or None. Raises UsageError unless it is an integer from 1 to 1024."""
    value = os.environ.get("PYRUNTIME_NUM_THREADS")
    if value is None:
        return None
    if not value.isdecimal() or not 1 <= int(value) <= _MAX_THREADS:
        raise UsageError("ENV", f"PYRUNTIME_NUM_THREADS is {value!r}; expected an integer from 1 to {_MAX_THREADS}")
    return int(value)


def test_data() -> Path | None:
    """Folder that holds real models for the tests, or None."""
    value = os.environ.get("PYRUNTIME_TEST_DATA")
    return Path(value) if value else None
