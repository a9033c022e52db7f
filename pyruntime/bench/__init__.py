"""Measurements: gated, interleaved, with the bytes and operations they stand for."""

from pyruntime.bench.ceilings import Ceilings
from pyruntime.bench.compare import Case, Comparison, compare_plans, decode_case, prefill_case
from pyruntime.bench.gate import GateResult, check_plan, nmse_of
from pyruntime.bench.machine import commit, environment, extensions, machine
from pyruntime.bench.random_model import RandomWeight, random_model
from pyruntime.bench.results import save_results
from pyruntime.bench.run import (
    ForwardLoad,
    RequestLoad,
    bench_forward,
    bench_latency,
    bench_throughput,
    load_shape,
)
from pyruntime.bench.shapes import Shape, parse_shape, shape_names, shape_spec
from pyruntime.bench.steps import step_runner, steps_runner
from pyruntime.bench.summary import describe, num_weights, summary
from pyruntime.bench.timing import Ceiling, Samples, interleaved, percentile, sampled

__all__ = [
    "Case",
    "Ceiling",
    "Ceilings",
    "Comparison",
    "ForwardLoad",
    "GateResult",
    "RandomWeight",
    "RequestLoad",
    "Samples",
    "Shape",
    "bench_forward",
    "bench_latency",
    "bench_throughput",
    "check_plan",
    "commit",
    "compare_plans",
    "decode_case",
    "describe",
    "environment",
    "extensions",
    "interleaved",
    "load_shape",
    "machine",
    "nmse_of",
    "num_weights",
    "parse_shape",
    "percentile",
    "prefill_case",
    "random_model",
    "sampled",
    "save_results",
    "shape_names",
    "shape_spec",
    "step_runner",
    "steps_runner",
    "summary",
]
