"""Decode steps of whole models, captured once and replayed: every variant, batch and context."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.gpu import gate
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.record import Section
from benchmarks.gpu.runner import Decoder
from benchmarks.gpu.settings import VARIANTS, variant
from pyruntime.bench import percentile
from pyruntime.graph import Cost, SequenceWork, build, cost_of, fuse
from pyruntime.plan import Plan
from pyruntime.spec import ModelSpec


def measure(bench: Bench, section: Section) -> None:
    """Time every cell of the grid that fits on the device; plans are checked first."""
    settings = bench.settings
    section.say(skipped=[])
    for name, spec in settings.models.items():
        cells = [(batch, context) for context in settings.contexts for batch in settings.batches]
        for form in VARIANTS:
            measure_form(bench, section, name, variant(spec, form), form, cells)


def measure_long(bench: Bench, section: Section) -> None:
    """One large batch over a long context, dense and with half the attentions dropped."""
    section.say(skipped=[])
    name = bench.settings.long_model
    for form in ("dense", "half"):
        spec = variant(bench.settings.models[name], form)
        measure_form(bench, section, name, spec, form, [bench.settings.long_case])


def measure_form(
    bench: Bench, section: Section, name: str, spec: ModelSpec, form: str, cells: Sequence[tuple[int, int]]
) -> None:
    """Time the cells of one variant of one model that fit."""
    room = bench.settings.warmup + bench.settings.replays + 2
    fitting = []
    for batch, context in cells:
        weight_bytes, kv_bytes = memory_of(spec, batch, context + room, bench.torch_dtype.itemsize)
        if bench.fits(weight_bytes, kv_bytes):
            fitting.append((batch, context))
        else:
            needed = f"{(weight_bytes + kv_bytes) / 1e9:.0f} GB of {bench.memory_bytes / 1e9:.0f} GB"
            section.data["skipped"].append(f"{name} {form}, batch {batch}, context {context}: {needed}")
    if not fitting or not section.fits(f"{name} {form}"):
        return
    model = bench.model(spec)
    plan = bench.plan(model)
    section.data.setdefault("how", {})[f"{name} {form}"] = how(plan)
    nmse = gate.check_plan(f"{name} {form}", plan, model, bench.settings.gate_lengths)
    for batch, context in fitting:
        if section.fits(f"{name} {form}, batch {batch}, context {context}"):
            about = {"model": name, "variant": form, "batch": batch, "context": context}
            section.add({**about, "nmse": nmse, **time_cell(bench, plan, batch, context)})


def time_cell(bench: Bench, plan: Plan, batch: int, context: int) -> dict[str, Any]:
    """Seconds of each replay, by pass, beside the bytes that a step in the middle moves and what they take at best."""
    settings = bench.settings
    bench.tidy()
    decoder = Decoder(plan, batch, context, settings.warmup + settings.replays + 2)
    expected = decoder.expected(plan)
    decoder.start()
    what = f"batch {batch}, context {context}: the decode form beside the other"
    nmse = gate.check(what, decoder.logits(), expected, gate.OTHERS_LIMIT)
    passes = []
    for _ in range(settings.passes):
        decoder.start()
        passes.append(list(bench.clock.samples(decoder.step, settings.replays, settings.warmup).seconds))
    cost = step_cost(plan, batch, context + 1 + settings.warmup + settings.replays // 2)
    return {
        "captured": decoder.captured,
        "nmse_to_prefill": nmse,
        "nodes": 0 if plan.gpu is None else len(plan.gpu.steps.decode),
        "seconds": passes,
        "bytes": cost.num_bytes,
        "flops": cost.flops,
        "floor_seconds": bench.rates.floor(cost),
    }


def how(plan: Plan) -> dict[str, str]:
    """What runs each op of a decode step, and why."""
    return {} if plan.gpu is None else {step.node.op: step.reason for step in plan.gpu.steps.decode}


def step_cost(plan: Plan, batch: int, context: int) -> Cost:
    """Cost of one token for each of `batch` sequences with `context` tokens before it."""
    nodes = [step.node for step in plan.steps]
    work = [SequenceWork(context, 1)]
    return sum(cost_of(nodes, work, plan.dtype.itemsize, copies=batch).values(), Cost())


def memory_of(spec: ModelSpec, batch: int, length: int, itemsize: int) -> tuple[int, int]:
    """Bytes of the weights, an untied head's and the embedding's among them, and of the cache."""
    graph = fuse(build(spec))
    weights: dict[str, int] = {}
    for node in graph.nodes:
        shapes: Mapping[str, tuple[int, ...]] = node.attrs.weight_shapes()
        for role, name in node.weights:
            size = 1
            for each in shapes[role]:
                size *= each
            weights[name] = size * itemsize
    per_token = sum(shape.num_values for shape in graph.kv_shapes()) * itemsize
    return sum(weights.values()), batch * length * per_token


def median(row: Mapping[str, Any]) -> float:
    """Seconds of a step, over all passes."""
    return statistics.median(_all(row))


def spread(row: Mapping[str, Any]) -> tuple[float, float]:
    """p20 and p80."""
    return percentile(_all(row), 20), percentile(_all(row), 80)


def _all(row: Mapping[str, Any]) -> list[float]:
    return [seconds for each in row["seconds"] for seconds in each]
