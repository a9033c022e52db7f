"""Measurements: gated, interleaved, with the bytes and operations they stand for."""

from pyruntime.bench.gate import GateResult, check_plan, nmse_of
from pyruntime.bench.machine import environment, extensions, machine
from pyruntime.bench.run import RequestLoad, bench_forward, bench_latency, bench_throughput, step_runner
from pyruntime.bench.timing import Samples, interleaved, read_bandwidth

__all__ = [
    "GateResult",
    "RequestLoad",
    "Samples",
    "bench_forward",
    "bench_latency",
    "bench_throughput",
    "check_plan",
    "environment",
    "extensions",
    "interleaved",
    "machine",
    "nmse_of",
    "read_bandwidth",
    "step_runner",
]
