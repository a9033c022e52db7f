"""What the last self-check on this GPU found: kernels that plans must not use.

`pyruntime doctor` writes the file, one for each combination of driver, GPU and versions, in the user's cache folder.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from pyruntime.ops.gpu.device import GpuInfo

_LOGGER: Final = logging.getLogger("pyruntime")
_DRIVER: Final = Path("/proc/driver/nvidia/version")
_PACKAGES: Final = {"pyruntime": "pyruntime-llm", "torch": "torch", "triton": "triton"}
_MAX_BYTES: Final = 1 << 16
_MAX_REASON: Final = 300


def failed_kernels(info: GpuInfo) -> dict[str, str]:
    """Ops whose kernels failed their self-check on a device like `info` with today's driver and versions, and why.

    Empty where no self-check was made. A file that cannot be read is as if absent, and one warning says so.
    """
    path = file_of(info)
    # the interpreter is for tests, whose results must not depend on what lies in a home folder
    if info.interpreted or path is None:
        return {}
    try:
        with path.open("rb") as file:
            text = file.read(_MAX_BYTES + 1)
        return _parsed(text, identity(info))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        _LOGGER.warning(
            "the results of the last self-check in %s cannot be read (%s), so every kernel is used; run pyruntime "
            "doctor again",
            path,
            error,
        )
        return {}


def identity(info: GpuInfo) -> dict[str, str]:
    """What the result of a self-check belongs to: driver, GPU, and versions of what compiles and launches."""
    return {"driver": driver_version() or "unknown", "gpu": info.name} | {
        name: _version(package) for name, package in _PACKAGES.items()
    }


def driver_version() -> str | None:
    """The version of the NVIDIA driver, or None where there is none."""
    try:
        first = _DRIVER.read_text(encoding="utf-8", errors="replace").partition("\n")[0]
    except OSError:
        return None
    found = re.search(r"\s(\d+(?:\.\d+)+)\s", first)
    return found[1] if found else "unknown"


def file_of(info: GpuInfo) -> Path | None:
    """Where the result for `info` lies, or None where the user has no home."""
    # as the XDG base directory specification says, a relative path counts for nothing
    said = os.environ.get("XDG_CACHE_HOME", "")
    try:
        cache = Path(said) if os.path.isabs(said) else Path.home() / ".cache"
    except RuntimeError:
        return None
    digest = hashlib.sha256(json.dumps(identity(info), sort_keys=True).encode()).hexdigest()
    return cache / "pyruntime" / f"selfcheck-{digest[:16]}.json"


def as_text(info: GpuInfo, failed: Mapping[str, str]) -> str:
    """The content of the file: `failed` ops and why."""
    reasons = {op: reason[:_MAX_REASON] for op, reason in failed.items()}
    return json.dumps({"identity": identity(info), "failed": reasons}, indent=2) + "\n"


def _parsed(text: bytes, expected: Mapping[str, str]) -> dict[str, str]:
    if len(text) > _MAX_BYTES:
        raise ValueError(f"it has more than {_MAX_BYTES} bytes")
    value: Any = json.loads(text)
    if not isinstance(value, dict) or value.get("identity") != expected:
        raise ValueError("it belongs to another driver, GPU or version")
    failed = value.get("failed")
    if not isinstance(failed, dict) or not all(isinstance(reason, str) for reason in failed.values()):
        raise ValueError("it holds no reasons by op")
    # a warning will quote them
    return {op: "".join(c for c in reason[:_MAX_REASON] if c.isprintable()) for op, reason in failed.items()}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
