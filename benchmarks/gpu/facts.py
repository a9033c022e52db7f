"""Which device, driver and versions a run belongs to."""

from __future__ import annotations

import shutil
import subprocess
from typing import Any, Final

import torch

from pyruntime.bench import extensions
from pyruntime.ops.gpu.device import gpu_info

_ASKED: Final = (
    "name,driver_version,vbios_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.draw,power.limit,"
    "temperature.gpu,clocks_event_reasons.active"
)
_SECONDS: Final = 10


def device_facts(device: torch.device) -> dict[str, Any]:
    """Name, processors, memory, caches and compiled parts, JSON-ready."""
    info = gpu_info(device)
    facts: dict[str, Any] = {"name": info.name, "capability": info.capability, "num_sms": info.num_sms}
    facts |= {"cuda": torch.version.cuda, "extensions": extensions()}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {"memory_bytes": properties.total_memory, "l2_bytes": properties.L2_cache_size}
    return facts


def clocks() -> dict[str, str]:
    """What nvidia-smi says of the first GPU now: clocks, power, temperature, and why clocks are held down."""
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return {"nvidia-smi": "not there"}
    command = [smi, f"--query-gpu={_ASKED}", "--format=csv,noheader,nounits", "--id=0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_SECONDS)
    except subprocess.TimeoutExpired:
        return {"nvidia-smi": f"no answer within {_SECONDS} s"}
    values = [each.strip() for each in done.stdout.strip().split(",")]
    names = _ASKED.split(",")
    if done.returncode != 0 or len(values) != len(names):
        return {"nvidia-smi": (done.stdout + done.stderr).strip()[:200]}
    return dict(zip(names, values, strict=True))
