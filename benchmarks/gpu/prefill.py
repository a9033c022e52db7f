"""Prompts: ours beside cuBLAS and SDPA alone, and what the tail saves where the last attentions are dropped."""

from __future__ import annotations

import functools
import statistics
from typing import Any, Final

import torch

from benchmarks.gpu import gate
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.record import Section
from benchmarks.gpu.runner import prompt_step
from benchmarks.gpu.settings import without_attentions
from benchmarks.gpu.torch_decoder import TorchDecoder
from pyruntime.plan import Plan

_WARMUP: Final = 2


def measure(bench: Bench, section: Section) -> None:
    """Time prompts of one model; logits of both sides are held against each other."""
    name = bench.settings.prefill_model
    model = bench.model(bench.settings.models[name])
    plan = bench.plan(model)
    nmse = gate.check_plan(f"{name} dense", plan, model, bench.settings.gate_lengths)
    longest = max(bench.settings.prefill_lengths)
    theirs = TorchDecoder(model, bench.torch_dtype, 1, longest, None)
    for length in bench.settings.prefill_lengths:
        if not section.fits(f"{name}, {length} tokens"):
            continue
        step = prompt_step(plan, length)
        tokens = torch.tensor(list(step.slices[0].token_ids), device=bench.device)
        other = gate.check(f"a prompt of {length} tokens", plan.run(step), theirs.prefill(tokens), gate.OTHERS_LIMIT)
        ours = time_prompt(bench, plan, length)
        peer = bench.clock.samples(functools.partial(theirs.prefill, tokens), bench.settings.prompt_repeats, _WARMUP)
        row = {"model": name, "length": length, "nmse": nmse, "nmse_to_torch": other}
        section.add({**row, **ours, "torch_seconds": list(peer.seconds)})


def measure_tail(bench: Bench, section: Section) -> None:
    """Time a deep model with and without its last attentions; what cost() predicts stands beside the gain."""
    settings = bench.settings
    found: dict[str, dict[str, Any]] = {}
    for name, spec in (("dense", settings.tail), ("dropped", without_attentions(settings.tail, settings.tail_kept))):
        if not section.fits(name):
            return
        model = bench.model(spec)
        plan = bench.plan(model)
        nmse = gate.check_plan(f"{len(spec.layers)} layers, {name}", plan, model, bench.settings.gate_lengths)
        found[name] = time_prompt(bench, plan, settings.tail_length)
        section.add({"variant": name, "length": settings.tail_length, "nmse": nmse, **found[name]})
        del plan
    section.say(
        layers=len(settings.tail.layers),
        kept=settings.tail_kept,
        predicted=found["dense"]["flops"] / found["dropped"]["flops"],
        measured=statistics.median(found["dense"]["seconds"]) / statistics.median(found["dropped"]["seconds"]),
    )


def time_prompt(bench: Bench, plan: Plan, length: int) -> dict[str, Any]:
    """Seconds of a prompt in one step, and the operations it cannot do without."""
    step = prompt_step(plan, length)
    samples = bench.clock.samples(lambda: plan.run(step), bench.settings.prompt_repeats, _WARMUP)
    cost = plan.prefill_cost(length)
    return {"seconds": list(samples.seconds), "flops": cost.flops, "bytes": cost.num_bytes}
