"""Time on a device, and work that is captured once and replayed."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from pyruntime.bench import Samples
from pyruntime.bench.timing import wait_for

Run = Callable[[], object]


class Clock:
    """Seconds of work on a device: between two of its events, or by the process's own clock on the CPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def samples(self, run: Run, repeats: int, warmup: int = 0) -> Samples:
        """Run it `warmup` times, then time each of `repeats` runs; the device is idle only before the first."""
        for _ in range(warmup):
            run()
        wait_for(self.device)
        if self.device.type != "cuda":
            return Samples(tuple(_seconds(run) for _ in range(repeats)))
        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
        for begin, end in events:
            begin.record()
            run()
            end.record()
        wait_for(self.device)
        return Samples(tuple(begin.elapsed_time(end) * 1e-3 for begin, end in events))


def captured(run: Run, device: torch.device) -> Run:
    """What replays `run`, captured in a CUDA graph after it ran twice; on the CPU `run` itself.

    What it allocates is kept by the graph; what it reads must stay where it is.
    """
    if device.type != "cuda":
        run()
        return run
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(2):
            run()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def _seconds(run: Run) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin
