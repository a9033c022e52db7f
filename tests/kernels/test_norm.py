"""The norm kernels: Triton in the interpreter against float64, CUDA compiled where asked for."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
# law 3: elementwise float32; outputs rounded to 16 bit
NMSE_LIMITS = {"torch.float32": 1e-7, "torch.float16": 5e-4, "torch.bfloat16": 5e-4}


@cache
def rows_of(script: str) -> tuple[dict[str, Any], ...]:
    """Rows that a script beside this file prints, run once, in the interpreter."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, str(Path(__file__).parent / script)]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    return tuple(json.loads(line) for line in done.stdout.splitlines())


def test_norm_matches_the_formula_in_float64() -> None:
    rows = rows_of("interpreted_norm.py")
    assert len(rows) == 72
    assert [row for row in rows if not row["nmse"] < NMSE_LIMITS[row["dtype"]]] == []


def test_nothing_is_written_beside_the_outputs() -> None:
    assert [row["case"] for row in rows_of("interpreted_norm.py") if not row["intact"]] == []


def test_dot_is_right_in_the_interpreter_for_every_dtype() -> None:
    errors = {row["dtype"]: row["error"] for row in rows_of("interpreted_dot.py")}
    assert set(errors) == set(NMSE_LIMITS)
    # operands are exact in float32, sums of 16 products of size 1 round in the last place
    assert max(errors.values()) < 1e-5


@pytest.fixture(scope="module")
def cuda_module(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The CUDA extension, compiled by CMake with the nvcc that is here."""
    if os.environ.get("PYRUNTIME_CUDA") != "1":
        pytest.skip("the CUDA extension is compiled only with PYRUNTIME_CUDA=1")
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc on PATH: the CUDA extension cannot be compiled here")
    import pybind11

    folder = tmp_path_factory.mktemp("cuda")
    options = [f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
    cuda = ["-DPYRUNTIME_CUDA=ON", f"-DCMAKE_CUDA_COMPILER={nvcc}"]
    cmake = [sys.executable, "-m", "cmake"]
    subprocess.run([*cmake, "-S", ROOT, "-B", folder, *options, *cuda], check=True, capture_output=True)
    build = [*cmake, "--build", folder, "--target", "_C_cuda"]
    done = subprocess.run(build, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(folder.glob("_C_cuda.*.so"))


def run_cuda(module: Path, program: str) -> str:
    # a driver-less machine stays one even where this test runs on a GPU
    environment = {**os.environ, "PYTHONPATH": str(module.parent), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", program]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout


@pytest.mark.slow
def test_the_cuda_extension_counts_no_device_without_a_driver(cuda_module: Path) -> None:
    assert run_cuda(cuda_module, "import _C_cuda; print(_C_cuda.device_count())") == "0\n"


@pytest.mark.slow
def test_the_cuda_extension_needs_no_cuda_library_to_load(cuda_module: Path) -> None:
    listed = subprocess.run(["ldd", cuda_module], capture_output=True, text=True, check=True).stdout
    assert "cuda" not in listed.replace(str(cuda_module), "").lower()


CALL = """
import _C_cuda
good = dict(x=256, residual=0, weight=256, sum_out=0, out=256, rows=1, hidden=8, x_stride=8, residual_stride=0,
            sum_out_stride=0, out_stride=8, eps=1e-5, dtype="float32", stream=0)
for change in ({}, {"x": 0}, {"rows": 0}, {"out_stride": 7}, {"residual": 256}, {"dtype": "int8"}, {"eps": -1.0}):
    try:
        _C_cuda.norm(**{**good, **change})
        print("launched")
    except (ValueError, RuntimeError) as error:
        print(type(error).__name__)
"""


@pytest.mark.slow
def test_the_norm_launcher_raises_instead_of_launching_nonsense(cuda_module: Path) -> None:
    # the first call is a good one: without a device its launch fails and says so
    assert run_cuda(cuda_module, CALL).split() == ["RuntimeError"] + ["ValueError"] * 6
