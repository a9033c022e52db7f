"""Timing: warmed up, interleaved where two are compared, each sample beside the ceilings read before and after it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import torch

# rows and columns: large enough for the best rate, small enough for half precision on a CPU, which can be very slow
_MATMUL_SIDE: Final = {"cpu": 512, "cuda": 8192}
# a run shorter than this is done once untimed behind a reading, which has emptied the caches that it would find full
_SHORT_SECONDS: Final = 0.05


@dataclass(frozen=True, slots=True)
class Ceiling:
    """What the machine could do at one moment: bytes read per second, floating-point operations per second."""

    read_bandwidth: float
    multiply_rate: float

    def mean(self, other: Ceiling) -> Ceiling:
        """Halfway between two readings."""
        return Ceiling((self.read_bandwidth + other.read_bandwidth) / 2, (self.multiply_rate + other.multiply_rate) / 2)


Probe = Callable[[], Ceiling]


@dataclass(frozen=True, slots=True)
class Samples:
    """Seconds of repeated runs; where a probe stood between them, the ceiling around each of them too."""

    seconds: tuple[float, ...]
    ceilings: tuple[Ceiling, ...] = ()

    @property
    def median(self) -> float:
        """p50."""
        return statistics.median(self.seconds)

    def percentile(self, percent: float) -> float:
        """The value that `percent` of the samples do not exceed, between neighbours by a straight line."""
        return percentile(self.seconds, percent)

    def spread(self) -> str:
        """p20 to p80 in milliseconds."""
        return f"{self.percentile(20) * 1e3:.2f}-{self.percentile(80) * 1e3:.2f} ms"

    def fractions_of_read(self, num_bytes: float) -> tuple[float, ...]:
        """For each sample, the part of the read bandwidth around it that moving `num_bytes` took.

        Their median stands where other programs slow the machine down for a while: they slow both down. Above 1, a part
        of the bytes came from a cache.
        """
        return tuple(
            num_bytes / seconds / each.read_bandwidth for seconds, each in zip(self.seconds, self.ceilings, strict=True)
        )

    def fractions_of_multiply(self, flops: float) -> tuple[float, ...]:
        """For each sample, the part of the multiply rate around it that `flops` operations took."""
        return tuple(
            flops / seconds / each.multiply_rate for seconds, each in zip(self.seconds, self.ceilings, strict=True)
        )


def percentile(values: Sequence[float], percent: float) -> float:
    """The value that `percent` of `values` do not exceed, between neighbours by a straight line."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def interleaved(
    runs: Sequence[Callable[[], object]], repeats: int, warmup: int = 2, probe: Probe | None = None
) -> tuple[Samples, ...]:
    """Run all of `runs` in turn, `repeats` times after `warmup` rounds: what disturbs one disturbs the others too.

    With a `probe`, each sample carries the mean of the readings right before and after it.
    """
    last = [float("inf")] * len(runs)
    for _ in range(warmup):
        last = [_seconds(run) for run in runs]
    timers = [_timer(run, seconds, probe is not None) for run, seconds in zip(runs, last, strict=True)]
    return sampled(timers, repeats, probe)


def sampled(timers: Sequence[Callable[[], float]], repeats: int, probe: Probe | None = None) -> tuple[Samples, ...]:
    """Call all of `timers` in turn, `repeats` times; each returns the seconds of one sample.

    With a `probe`, each sample carries the mean of the readings right before and after it.
    """
    seconds: list[list[float]] = [[] for _ in timers]
    ceilings: list[list[Ceiling]] = [[] for _ in timers]
    before = None if probe is None else probe()
    for _ in range(repeats):
        for i, timer in enumerate(timers):
            seconds[i].append(timer())
            if probe is not None and before is not None:
                after = probe()
                ceilings[i].append(before.mean(after))
                before = after
    return tuple(Samples(tuple(own), tuple(around)) for own, around in zip(seconds, ceilings, strict=True))


def matmul_side(device: torch.device) -> int:
    """Rows and columns of the product that is timed."""
    return _MATMUL_SIDE.get(device.type, _MATMUL_SIDE["cpu"])


def wait_for(device: torch.device) -> None:
    """Return when the device has done what it was given; a clock read earlier would not see that work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def best(compute: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Seconds of the fastest of `repeats` runs of `compute` on the device."""

    def run() -> None:
        compute()
        wait_for(device)

    return min(interleaved([run], repeats)[0].seconds)


def _timer(run: Callable[[], object], last: float, refill: bool) -> Callable[[], float]:
    """A function that gives the seconds of one `run`, which took `last` before; `refill`: once untimed where short."""

    def timed() -> float:
        nonlocal last
        if refill and last < _SHORT_SECONDS:
            run()
        last = _seconds(run)
        return last

    return timed


def _seconds(run: Callable[[], object]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin
