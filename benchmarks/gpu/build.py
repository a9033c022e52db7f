"""Building the extensions beside the sources with the Python that runs this, without network, while others work."""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
from pathlib import Path
from typing import Any, Final

from benchmarks.gpu.background import ROOT, Background

LOGS: Final = ROOT / "build" / "gpu-check"
MODULE: Final = ROOT / "pyruntime" / f"_C_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
_NUM_ARCHITECTURES: Final = 3


def start() -> Background:
    """Start building in place; CUDA C++ too where there is a compiler for it."""
    wanted = "1" if shutil.which("nvcc") is not None else "0"
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    # nvcc compiles a file for several architectures, one after the other if it is not told otherwise
    flags = f"{os.environ.get('CUDAFLAGS', '')} --threads {_NUM_ARCHITECTURES}".strip()
    return Background.start(command, LOGS / "build.log", {"PYRUNTIME_CUDA": wanted, "CUDAFLAGS": flags})


def finish(running: Background | None, seconds: float, module: Path = MODULE) -> dict[str, Any]:
    """How it went, JSON-ready; `note` is what a reader must know. A `module` that was not made is not there behind it.

    `seconds` are those that it may still take.
    """
    if running is None:
        return {"exit_code": None, "note": "nothing was built: it was not asked for"}
    code = running.wait(seconds)
    facts: dict[str, Any] = {"exit_code": code, "nvcc": shutil.which("nvcc") is not None, "note": ""}
    log = running.log.relative_to(ROOT) if running.log.is_relative_to(ROOT) else Path(running.log.name)
    if code != 0:
        # one that an earlier build left has other sources
        module.unlink(missing_ok=True)
        facts["said"] = running.text().splitlines()[-15:]
        facts["note"] = f"the extensions were not built ({log}): Triton and the vendor's kernels run alone"
    elif not facts["nvcc"]:
        facts["note"] = "there is no nvcc: Triton and the vendor's kernels run alone"
    return facts
