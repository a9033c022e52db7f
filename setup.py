"""Drives CMake and lays kernels/ inside the package as pyruntime.kernels. Everything else is in pyproject.toml."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


def require_linux_x86_64() -> None:
    """Stop with one line on a machine that cannot run the result."""
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        sys.exit(f"pyruntime runs on Linux x86-64 only; this is {platform.system()} {platform.machine()}")


def find_nvcc() -> str | None:
    """Path of nvcc: the one CUDACXX or CUDA_HOME names, else the first on PATH, else None."""
    home = os.environ.get("CUDA_HOME")
    named = os.environ.get("CUDACXX") or (f"{home}/bin/nvcc" if home else "nvcc")
    return shutil.which(named)


def has_nvidia_gpu() -> bool:
    """Whether a driver with at least one GPU is loaded. Does not start CUDA."""
    gpus = Path("/proc/driver/nvidia/gpus")
    if gpus.is_dir() and any(gpus.iterdir()):
        return True
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return False
    listed = subprocess.run([smi, "-L"], capture_output=True, text=True, check=False)
    return listed.returncode == 0 and "GPU 0" in listed.stdout


def wants_cuda() -> bool:
    """Whether this build compiles the CUDA extension: as PYRUNTIME_CUDA says, or where there is a GPU and nvcc."""
    asked = os.environ.get("PYRUNTIME_CUDA", "auto")
    if asked not in ("auto", "0", "1"):
        sys.exit(f"PYRUNTIME_CUDA is {asked!r}; expected auto, 0 or 1")
    if asked != "auto":
        return asked == "1"
    if not has_nvidia_gpu():
        return False
    if find_nvcc() is None:
        print("pyruntime: an NVIDIA GPU is here but no nvcc; building without the CUDA extension", file=sys.stderr)
        return False
    return True


class CMakeBuild(build_ext):
    """Builds every extension with one CMake project."""

    def finalize_options(self) -> None:
        """Decide which extensions there are before setuptools lists their files."""
        names = ["_C", "_C_cuda"] if wants_cuda() else ["_C"]
        self.distribution.ext_modules = [Extension(f"pyruntime.{name}", sources=[]) for name in names]
        super().finalize_options()

    def run(self) -> None:
        """Configure, build, and leave each module where setuptools expects it."""
        names = [extension.name.rpartition(".")[2] for extension in self.extensions]
        nvcc = find_nvcc() if "_C_cuda" in names else None
        if "_C_cuda" in names and nvcc is None:
            sys.exit(
                "PYRUNTIME_CUDA=1 but no nvcc was found; install the CUDA toolkit, put nvcc on PATH or set CUDACXX"
            )
        folder = self.build_folder()
        self.cmake("-S", str(ROOT), "-B", str(folder), *self.configure_options(nvcc))
        self.cmake("--build", str(folder), "--parallel", str(self.jobs()), "--target", *names)
        for extension, name in zip(self.extensions, names, strict=True):
            built = next(folder.glob(f"{name}.*.so"))
            target = Path(self.get_ext_fullpath(extension.name))
            target.parent.mkdir(parents=True, exist_ok=True)
            # a running program may have the old file mapped: replace it, never write into it
            target.unlink(missing_ok=True)
            shutil.copy2(built, target)

    def build_folder(self) -> Path:
        """Where CMake works. An editable build keeps its objects, so that the next one compiles only what changed."""
        if not (self.inplace or self.editable_mode):
            return Path(self.build_temp).resolve()
        # CMake remembers the paths of the sources and of Python: another place or Python needs another folder
        key = zlib.crc32(f"{ROOT}\n{sys.prefix}".encode())
        return ROOT / "build" / "cmake" / f"{sys.implementation.cache_tag}-{key:08x}"

    def configure_options(self, nvcc: str | None) -> list[str]:
        """What CMake must be told about this Python and its tools."""
        import ninja  # a build requirement: absent when setup.py is only asked for metadata
        import pybind11

        options = [
            "-G",
            "Ninja",
            f"-DCMAKE_MAKE_PROGRAM={Path(ninja.BIN_DIR) / 'ninja'}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DPYRUNTIME_CUDA={'ON' if nvcc else 'OFF'}",
        ]
        return options + ([f"-DCMAKE_CUDA_COMPILER={nvcc}"] if nvcc else [])

    def jobs(self) -> int:
        """Compilers to run at once: what CMAKE_BUILD_PARALLEL_LEVEL says, else as many as this process has CPUs."""
        asked = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL")
        return int(asked) if asked else len(os.sched_getaffinity(0))

    def cmake(self, *arguments: str) -> None:
        """Run CMake quietly; on failure print everything it said and stop."""
        done = subprocess.run([sys.executable, "-m", "cmake", *arguments], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            sys.exit(f"{done.stdout}\n{done.stderr}\npyruntime: cmake {arguments[0]} failed; its output is above")
        if self.verbose > 1:
            print(done.stdout)


require_linux_x86_64()
setup(
    packages=[*find_packages(include=["pyruntime", "pyruntime.*"]), "pyruntime.kernels"],
    package_dir={"pyruntime.kernels": "kernels"},
    # tells setuptools that the wheel is not pure Python; CMakeBuild lists what is really built
    ext_modules=[Extension("pyruntime._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
