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
    "PYRUNTIME_MAX_HEADER_BYTES": "longest header of a weight file, 1 to 100000000 bytes (default: 16777216)",
    "PYRUNTIME_LINK_ROOT": "folder into which links in place of weight files may lead beside the model's own",
    "PYRUNTIME_TEST_DATA": "folder with models/ and corpora/ for the tests that check real trained models",
    "PYRUNTIME_GPU_KERNELS": "triton, cuda or vendor: what computes matrix products on a GPU (default: as measured)",
    "PYRUNTIME_CUDA_TWIN": "file of the CUDA kernels compiled for the CPU, for tests of plans in Triton's interpreter",
    "PYRUNTIME_CUDA": "auto, 0 or 1: whether a build compiles the CUDA extension (read by setup.py)",
}

# kMaxThreads of csrc/cpu/parallel.h
_MAX_THREADS: Final = 1024
_HEADER_BYTES: Final = 16 << 20
# as much as the safetensors library reads
_MAX_HEADER_BYTES: Final = 100_000_000
_GPU_KERNELS: Final = ("triton", "cuda", "vendor")
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
    return _count("PYRUNTIME_NUM_THREADS", _MAX_THREADS)


def gpu_kernels() -> str | None:
    """Kernels asked for, or None for the measured choice. Raises UsageError for a name that is none."""
    value = os.environ.get("PYRUNTIME_GPU_KERNELS")
    if value is not None and value not in _GPU_KERNELS:
        raise UsageError("ENV", f"PYRUNTIME_GPU_KERNELS is {value!r}; expected one of {', '.join(_GPU_KERNELS)}")
    return value


def max_header_bytes() -> int:
    """Longest header of a weight file that is read. Raises UsageError unless it is 1 to 100 MB."""
    return _count("PYRUNTIME_MAX_HEADER_BYTES", _MAX_HEADER_BYTES) or _HEADER_BYTES


def link_root() -> Path | None:
    """Folder into which links among weight files may lead, or None. Raises UsageError unless it is absolute."""
    value = os.environ.get("PYRUNTIME_LINK_ROOT")
    if not value:
        return None
    if not os.path.isabs(value):
        raise UsageError("ENV", f"PYRUNTIME_LINK_ROOT is {value!r}; expected the absolute path of a folder")
    return Path(value)


def test_data() -> Path | None:
    """Folder that holds real models for the tests, or None."""
    value = os.environ.get("PYRUNTIME_TEST_DATA")
    return Path(value) if value else None


def cuda_twin() -> Path | None:
    """File of the CUDA kernels compiled for the CPU, or None."""
    value = os.environ.get("PYRUNTIME_CUDA_TWIN")
    return Path(value) if value else None


def _count(name: str, most: int) -> int | None:
    """The integer from 1 to `most` that the variable holds, or None where it is not set."""
    value = os.environ.get(name)
    if value is None:
        return None
    # int() takes other digits too, and refuses a very long number in its own way
    if not (value.isascii() and value.isdecimal() and len(value) <= len(str(most)) and 1 <= int(value) <= most):
        raise UsageError("ENV", f"{name} is {value[:80]!r}; expected an integer from 1 to {most}")
    return int(value)
