"""How much memory there is: what the machine has left, and what the control groups of this process allow."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

import torch

from pyruntime.errors import RunError

_MEMINFO: Final = Path("/proc/meminfo")
_MEMBERSHIP: Final = Path("/proc/self/cgroup")
_CGROUPS: Final = Path("/sys/fs/cgroup")
# limit, usage, and the start of the fields of memory.stat with the file cache, which the kernel gives back on demand
_V2: Final = ("memory.max", "memory.current", "")
_V1: Final = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")


def check_memory(num_bytes: int, what: str, device: str = "cpu") -> None:
    """Raise RunError MEMORY unless the machine, or the GPU `device`, has `num_bytes` to spare for `what`."""
    on_gpu = device.startswith("cuda")
    available = torch.cuda.mem_get_info(device)[0] if on_gpu else available_memory()
    if available is not None and num_bytes > available:
        raise RunError(
            "MEMORY",
            f"{what} needs {num_bytes / 2**30:.2f} GiB; {available / 2**30:.2f} GiB are available: free some, or take "
            "a smaller dtype, model or context",
        )


def available_memory(meminfo: Path = _MEMINFO, membership: Path = _MEMBERSHIP, cgroups: Path = _CGROUPS) -> int | None:
    """Bytes that this process can get without swapping: the machine's, or less where a cgroup says so.

    None where nothing says so. File cache counts as free, in a cgroup as on the machine.
    """
    bounds = [*_on_machine(meminfo), *_in_cgroups(membership, cgroups)]
    return max(min(bounds), 0) if bounds else None


def _on_machine(meminfo: Path) -> Iterator[int]:
    for line in _read(meminfo).splitlines():
        if line.startswith("MemAvailable:"):
            yield int(line.split()[1]) * 1024


def _in_cgroups(membership: Path, cgroups: Path) -> Iterator[int]:
    """Room in each memory cgroup from the process's own up to the root; no limit is no bound."""
    for line in _read(membership).splitlines():
        number, controllers, path = (*line.split(":", 2), "", "")[:3]
        if number == "0" and controllers == "":
            root, files = cgroups, _V2
        elif "memory" in controllers.split(","):
            root, files = cgroups / "memory", _V1
        else:
            continue
        # the path is the host's; in a container only its end, or the root alone, may be visible
        own = Path(path.lstrip("/"))
        for each in (own, *own.parents):
            yield from _room(root / each, *files)


def _room(folder: Path, limit_name: str, usage_name: str, prefix: str) -> Iterator[int]:
    limit, usage = _read(folder / limit_name).strip(), _read(folder / usage_name).strip()
    # "max" is no limit; version 1 writes a number that no machine has
    if limit.isdecimal() and usage.isdecimal():
        fields = dict(line.partition(" ")[::2] for line in _read(folder / "memory.stat").splitlines())
        cached = [fields.get(f"{prefix}{name}_file", "0") for name in ("inactive", "active")]
        yield int(limit) - int(usage) + sum(int(size) for size in cached if size.isdecimal())


def _read(path: Path) -> str:
    """Text of a small file of the kernel, or nothing where it cannot be read."""
    try:
        return path.read_text(encoding="ascii")
    except (OSError, ValueError):
        return ""
