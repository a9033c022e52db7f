"""Times worth quoting: warmed up, interleaved where two are compared, as medians with their spread."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import torch

_CPU: Final = torch.device("cpu")
_BANDWIDTH_BYTES: Final = 1 << 28
# rows and columns: large enough for the best rate, small enough for half precision on a CPU, which can be very slow
_MATMUL_SIDE: Final = {"cpu": 512, "cuda": 8192}


@dataclass(frozen=True, slots=True)
class Samples:
    """Seconds of repeated runs."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """p50."""
        return statistics.median(self.seconds)

    def percentile(self, percent: float) -> float:
        """The value that `percent` of the samples do not exceed, between neighbours by a straight line."""
        ordered = sorted(self.seconds)
        place = (len(ordered) - 1) * percent / 100
        low = int(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (ordered[high] - ordered[low]) * (place - low)

    def spread(self) -> str:
        """p20 to p80 in milliseconds."""
        return f"{self.percentile(20) * 1e3:.2f}-{self.percentile(80) * 1e3:.2f} ms"


def interleaved(runs: Sequence[Callable[[], object]], repeats: int, warmup: int = 2) -> tuple[Samples, ...]:
    """Run all of `runs` in turn, `repeats` times after `warmup` rounds: what disturbs one disturbs the others too."""
    for _ in range(warmup):
        for run in runs:
            run()
    seconds: list[list[float]] = [[] for _ in runs]
    for _ in range(repeats):
        for own, run in zip(seconds, runs, strict=True):
            begin = time.perf_counter()
            run()
            own.append(time.perf_counter() - begin)
    return tuple(Samples(tuple(own)) for own in seconds)


def read_bandwidth(device: torch.device = _CPU, repeats: int = 5) -> float:
    """Bytes per second at which the device's memory can be read, best of `repeats` sums over 256 MiB."""
    data = torch.ones(_BANDWIDTH_BYTES // 4, dtype=torch.float32, device=device)
    return _BANDWIDTH_BYTES / _best(data.sum, device, repeats)


def matmul_rate(dtype: torch.dtype, device: torch.device = _CPU, repeats: int = 20) -> float:
    """Floating-point operations per second that torch's matrix product reaches in `dtype`, best of `repeats`."""
    side = _MATMUL_SIDE.get(device.type, _MATMUL_SIDE["cpu"])
    data = torch.ones((side, side), dtype=dtype, device=device)
    return 2 * side**3 / _best(lambda: data @ data, device, repeats)


def wait_for(device: torch.device) -> None:
    """Return when the device has done what it was given; a clock read earlier would not see that work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _best(compute: Callable[[], object], device: torch.device, repeats: int) -> float:
    def run() -> None:
        compute()
        wait_for(device)

    return min(interleaved([run], repeats)[0].seconds)
