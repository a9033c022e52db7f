"""What machine and which versions a figure belongs to."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any, Final

import torch

import pyruntime
from pyruntime import env

_PACKAGES: Final = ("torch", "transformers", "tokenizers", "safetensors", "huggingface_hub", "triton")


def machine() -> dict[str, Any]:
    """Names, counts and versions, JSON-ready: cpu_info, num_cores, memory_bytes, gpu_info, a version per package."""
    return {
        "pyruntime": pyruntime.__version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()} {' '.join(platform.libc_ver())}",
        "cpu_info": _cpu_name(),
        "num_cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpu_info": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "num_threads": torch.get_num_threads(),
        **{package: _version(package) for package in _PACKAGES},
    }


def commit() -> str:
    """Commit of the checkout that the package runs from, "-dirty" behind it where files differ; "" without one."""
    root = Path(pyruntime.__file__).resolve().parents[1]
    # a folder of packages may lie inside somebody else's repository
    if not (root / ".git").exists() or not (root / "pyproject.toml").exists():
        return ""
    git = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""


def environment() -> dict[str, str]:
    """Every variable that pyruntime reads and its value, "" where it is not set."""
    return {name: os.environ.get(name, "") for name in env.VARIABLES}


def extensions() -> dict[str, str]:
    """Whether the compiled parts can be imported, with the reason where not."""
    found = {}
    for name in ("_C", "_C_cuda"):
        try:
            __import__(f"pyruntime.{name}")
            found[name] = "built"
        except ImportError as error:
            found[name] = f"not there ({error})"
    return found


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
