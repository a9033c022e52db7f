"""What every section needs: the device and its clock, the sizes, the measured rates, and plans with random weights."""

from __future__ import annotations

import gc
from dataclasses import dataclass, field

import torch

from benchmarks.gpu.clock import Clock
from benchmarks.gpu.settings import Settings
from benchmarks.gpu.weights import device_model
from pyruntime.checkpoint import Model
from pyruntime.engine.memory import available_memory
from pyruntime.graph import Cost, build, fuse
from pyruntime.plan import DTYPES, Plan, lower
from pyruntime.spec import ModelSpec

# of the device's memory; the rest is for buffers, graphs and the driver
_USABLE: float = 0.95


@dataclass(slots=True)
class Rates:
    """What the device does at best, as the ceilings section found it; zeros before."""

    copy: float = 0.0
    read: float = 0.0
    multiply: float = 0.0

    def floor(self, cost: Cost) -> float:
        """Seconds that no implementation can go below: bytes at the copy rate or operations at the multiply rate."""
        return max(cost.num_bytes / self.copy, cost.flops / self.multiply)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """One device and what is measured on it. `memory_bytes` is all of its memory."""

    device: torch.device
    dtype: str
    settings: Settings
    clock: Clock
    memory_bytes: int
    rates: Rates = field(default_factory=Rates)

    @staticmethod
    def of(device: torch.device, settings: Settings, dtype: str = "bfloat16") -> Bench:
        """The bench of a device."""
        clock = Clock(device)
        return Bench(device=device, dtype=dtype, settings=settings, clock=clock, memory_bytes=_memory_bytes(device))

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of weights and cache."""
        return DTYPES[self.dtype]

    def model(self, spec: ModelSpec, dense: ModelSpec | None = None) -> Model:
        """A model of `spec` with random weights on the device; `dense` is what it was pruned from, where it was."""
        return device_model(spec, self.dtype, self.device, dense)

    def plan(self, model: Model, dtype: str | None = None) -> Plan:
        """The model lowered for target cuda. What an earlier plan held is free by then, if nobody has it any more."""
        self.tidy()
        graph = fuse(build(model.spec))
        return lower(graph, model, target="cuda", dtype=dtype or self.dtype, device=str(self.device))

    def fits(self, weight_bytes: int, kv_bytes: int) -> bool:
        """Whether weights and cache leave room for the rest."""
        return weight_bytes + kv_bytes <= _USABLE * self.memory_bytes

    def tidy(self) -> None:
        """Give back the memory of what nobody holds any more."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def _memory_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return available_memory() or 1 << 30
