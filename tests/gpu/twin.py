"""The host twin of the CUDA kernels: the same sources, compiled for the CPU, a fiber for each thread."""

from __future__ import annotations

import atexit
import os
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pybind11
import pytest

from pyruntime.ops.gpu import compiled
from tests.gpu.helpers import INTERPRETED

ROOT = Path(__file__).parents[2]
NAME = "_C_cuda_twin"


def build(folder: Path) -> Path:
    """Compile the twin with CMake in `folder`; the module's file."""
    cmake = [sys.executable, "-m", "cmake"]
    options = [f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
    for command in (
        [*cmake, "-S", str(ROOT), "-B", str(folder), "-DPYRUNTIME_TWIN=ON", *options],
        [*cmake, "--build", str(folder), "--parallel", "2", "--target", NAME],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    return next(folder.glob(f"{NAME}.*.so"))


@cache
def twin() -> Any:
    """The module, built once a process; PYRUNTIME_CUDA_TWIN names one that was built before."""
    if "PYRUNTIME_CUDA_TWIN" not in os.environ:
        folder = tempfile.mkdtemp(prefix="pyruntime-twin-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        os.environ["PYRUNTIME_CUDA_TWIN"] = str(build(Path(folder)))
    return compiled.load(interpreted=True)


def kernels() -> Any:
    """The CUDA kernels that run here: those of the GPU, or their twin where Triton is interpreted."""
    found = twin() if INTERPRETED else compiled.load(interpreted=False)
    if found is None:
        pytest.skip("the CUDA extension was not built")
    return found
