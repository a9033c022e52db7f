"""What the wheel and the source archive hold, and what the build refuses."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import pyruntime

ROOT = Path(__file__).parents[1]


def run_setup(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "setup.py", "--quiet", *arguments]
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Names in a wheel built from this checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    command = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(ROOT)]
    environment = {**os.environ, "PYRUNTIME_CUDA": "0"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return zipfile.ZipFile(next(folder.glob("pyruntime_llm-*.whl"))).namelist()


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Names in a source archive of this checkout, without the leading folder."""
    folder = tmp_path_factory.mktemp("sdist")
    done = run_setup("egg_info", "--egg-base", str(folder), "sdist", "--dist-dir", str(folder))
    assert done.returncode == 0, done.stdout + done.stderr
    with tarfile.open(next(folder.glob("pyruntime_llm-*.tar.gz"))) as archive:
        return [name.partition("/")[2] for name in archive.getnames()]


def sources(folder: str, *suffixes: str) -> set[str]:
    found = {path.relative_to(ROOT).as_posix() for path in (ROOT / folder).rglob("*") if path.suffix in suffixes}
    assert found
    return found


@pytest.mark.slow
def test_wheel_has_one_top_level_package(wheel: list[str]) -> None:
    assert {name.partition("/")[0] for name in wheel if ".dist-info/" not in name} == {"pyruntime"}


@pytest.mark.slow
def test_wheel_has_the_kernels_and_the_extension(wheel: list[str]) -> None:
    assert {f"pyruntime/{name}" for name in sources("kernels", ".py")} <= set(wheel)
    assert [name for name in wheel if name.startswith("pyruntime/_C.") and name.endswith(".so")]
    assert "pyruntime/py.typed" in wheel


@pytest.mark.slow
def test_wheel_has_every_module(wheel: list[str]) -> None:
    """A room without __init__.py would be left out without a word."""
    modules = {name for name in sources("pyruntime", ".py") if not name.startswith("pyruntime/kernels/")}
    assert modules - set(wheel) == set()


@pytest.mark.slow
def test_sdist_has_all_sources_once(sdist: list[str]) -> None:
    wanted = sources("kernels", ".py", ".cu", ".cuh") | sources("csrc", ".cpp", ".h")
    assert wanted | {"CMakeLists.txt", "LICENSE", "pyproject.toml", "setup.py"} <= set(sdist)
    assert [name for name in sdist if name.startswith("pyruntime/kernels")] == []
    assert [name for name in sdist if name.endswith((".so", ".pyc"))] == []


def test_the_version_stands_in_two_places_and_is_one() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert pyruntime.__version__ == project["version"]


def test_the_kernels_folder_is_reached_by_a_relative_link() -> None:
    assert (ROOT / "pyruntime/kernels").readlink() == Path("../kernels")


def test_an_unknown_cuda_setting_is_refused_in_one_line(tmp_path: Path) -> None:
    done = run_setup("build_ext", "--build-temp", str(tmp_path), "--build-lib", str(tmp_path), PYRUNTIME_CUDA="yes")
    assert done.returncode == 1
    assert done.stderr.strip() == "PYRUNTIME_CUDA is 'yes'; expected auto, 0 or 1"


def test_cuda_asked_for_without_nvcc_is_refused(tmp_path: Path) -> None:
    missing = str(tmp_path / "nvcc")
    arguments = ("build_ext", "--build-temp", str(tmp_path), "--build-lib", str(tmp_path))
    done = run_setup(*arguments, PYRUNTIME_CUDA="1", CUDACXX=missing)
    assert done.returncode == 1
    assert "no nvcc was found" in done.stderr.splitlines()[-1]


def test_another_platform_is_refused_in_one_line() -> None:
    program = "import platform, runpy; platform.machine = lambda: 'aarch64'; runpy.run_path('setup.py')"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.strip() == "pyruntime runs on Linux x86-64 only; this is Linux aarch64"
