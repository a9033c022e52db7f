"""Measurements: gated, interleaved, with the bytes and operations they stand for."""

from pyruntime.bench.compare import Case, Comparison, compare_plans, decode_case, prefill_case
from pyruntime.bench.gate import GateResult, check_plan, nmse_of
from pyruntime.bench.machine import environment, extensions, machine
from pyruntime.bench.run import RequestLoad, bench_forward, bench_latency, bench_throughput, step_runner
from pyruntime.bench.summary import describe, summary
from pyruntime.bench.timing import Samples, interleaved, matmul_rate, read_bandwidth

__all__ = [
    "Case",
    "Comparison",
    "GateResult",
    "RequestLoad",
    "Samples",
    "bench_forward",
    "bench_latency",
    "bench_throughput",
    "check_plan",
    "compare_plans",
    "decode_case",
    "describe",
    "environment",
    "extensions",
    "interleaved",
    "machine",
    "matmul_rate",
    "nmse_of",
    "prefill_case",
    "read_bandwidth",
    "step_runner",
    "summary",
]
