"""The host twin of the CUDA kernels: the same sources, compiled for the CPU, a fiber for each thread."""

from __future__ import annotations

import atexit
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pybind11

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
    path = os.environ.get("PYRUNTIME_CUDA_TWIN")
    if path is None:
        folder = tempfile.mkdtemp(prefix="pyruntime-twin-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        path = os.environ["PYRUNTIME_CUDA_TWIN"] = str(build(Path(folder)))
    spec = importlib.util.spec_from_file_location(NAME, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
