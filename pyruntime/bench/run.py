"""The measurements behind `pyruntime bench`: whole requests (latency, throughput) and bare steps (forward)."""

from __future__ import annotations

import datetime
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch

from pyruntime.bench.gate import GateResult, check_plan
from pyruntime.bench.machine import machine
from pyruntime.bench.timing import Samples, interleaved, matmul_rate, read_bandwidth, wait_for
from pyruntime.engine.load import EngineSizes, Loaded, make_engine
from pyruntime.engine.params import SamplingParams
from pyruntime.errors import UsageError
from pyruntime.graph import Cost, SequenceWork
from pyruntime.ops.step import SequenceSlice, Step, make_step
from pyruntime.plan import Plan

PERCENTILES: Final = (10, 25, 50, 75, 90, 99)
_PAGE_SIZE: Final = 16
Progress = Callable[[int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestLoad:
    """Requests of one kind: `num_prompts` of `input_len` tokens, `output_len` new tokens each."""

    num_prompts: int
    input_len: int
    output_len: int


def bench_latency(
    loaded: Loaded, load: RequestLoad, num_iters: int, num_iters_warmup: int, progress: Progress | None = None
) -> dict[str, Any]:
    """Seconds from a batch of prompts to its last token, in vLLM's fields avg_latency, latencies, percentiles."""
    gate = check_plan(loaded.plan, loaded.model)
    before = read_bandwidth(loaded.plan.device)
    latencies = [_generate(loaded, load, progress) for _ in range(num_iters_warmup + num_iters)][num_iters_warmup:]
    samples = Samples(tuple(latencies))
    return {
        "avg_latency": statistics.fmean(latencies),
        "latencies": latencies,
        "percentiles": {str(percent): samples.percentile(percent) for percent in PERCENTILES},
        **_moved(loaded.plan, load, samples.median, before),
        **_about(loaded, gate, load),
    }


def bench_throughput(loaded: Loaded, load: RequestLoad, progress: Progress | None = None) -> dict[str, Any]:
    """Requests and tokens per second with all prompts queued at once, in vLLM's JSON fields."""
    gate = check_plan(loaded.plan, loaded.model)
    # one short round first: the first step of a process pays for thread pools and caches
    _generate(loaded, RequestLoad(num_prompts=1, input_len=load.input_len, output_len=1), None)
    before = read_bandwidth(loaded.plan.device)
    elapsed = _generate(loaded, load, progress)
    tokens = load.num_prompts * (load.input_len + load.output_len)
    return {
        "elapsed_time": elapsed,
        "num_requests": load.num_prompts,
        "total_num_tokens": tokens,
        "requests_per_second": load.num_prompts / elapsed,
        "tokens_per_second": tokens / elapsed,
        "output_tokens_per_second": load.num_prompts * load.output_len / elapsed,
        **_moved(loaded.plan, load, elapsed, before),
        **_about(loaded, gate, load),
    }


def bench_forward(
    loaded: Loaded, prompt_lengths: Sequence[int], batch: int, context: int, repeats: int
) -> list[dict[str, Any]]:
    """Bare plan steps in llama-bench's fields: prefill of each length (pp), one decode step of `batch` rows (tg)."""
    longest = loaded.model.spec.max_position
    for name, length in (*(("prompt_len", length) for length in prompt_lengths), ("depth + 1", context + 1)):
        if not 1 <= length <= longest:
            raise UsageError("BENCH", f"{name} is {length}; the model holds 1 to {longest} tokens")
    gate = check_plan(loaded.plan, loaded.model)
    plan = loaded.plan
    bandwidth, rate = read_bandwidth(plan.device), matmul_rate(plan.dtype, plan.device)
    tests = [(f"pp{length}", [SequenceWork(0, length)]) for length in prompt_lengths]
    tests.append((f"tg1 b{batch} @ d{context}", [SequenceWork(context, 1)] * batch))
    runs = [step_runner(plan, work) for _, work in tests]
    timed = interleaved(runs, repeats)
    # the same machine may be slower a minute later
    bandwidth = (bandwidth + read_bandwidth(plan.device)) / 2
    rate = max(rate, matmul_rate(plan.dtype, plan.device))
    ceilings = {"read_bandwidth_bytes_per_second": bandwidth, "matmul_flops_per_second": rate}
    about = {**_about(loaded, gate, None), **ceilings}
    return [
        {
            "test": name,
            **_rates(samples, sum(each.length for each in work), plan.total_cost(work), bandwidth, rate),
            **about,
        }
        for (name, work), samples in zip(tests, timed, strict=True)
    ]


def step_runner(plan: Plan, work: Sequence[SequenceWork]) -> Callable[[], torch.Tensor]:
    """A function that computes one step over `work` again and again; the cache before it holds zeros."""
    lengths = [each.start + each.length for each in work]
    pages_each = [-(-length // _PAGE_SIZE) for length in lengths]
    cache = plan.new_cache(sum(pages_each), _PAGE_SIZE)
    cache.clear()
    first = 0
    slices = []
    for each, count in zip(work, pages_each, strict=True):
        ids = [(each.start + i) % plan.vocab_size for i in range(each.length)]
        wanted = range(each.length - min(each.wanted, each.length), each.length)
        slices.append(SequenceSlice(ids, each.start, range(first, first + count), wanted))
        first += count

    def run() -> torch.Tensor:
        # making the step is part of every engine step, so it is timed too
        step: Step = make_step(slices, cache, plan.device)
        logits = plan.run(step)
        wait_for(plan.device)
        return logits

    return run


def load_cost(plan: Plan, load: RequestLoad) -> Cost:
    """What `load` must move and compute: all prompts in one step, then a step for each token after the first.

    An engine that needs more steps than these moves more: this is what no engine can avoid.
    """
    works = [[SequenceWork(0, load.input_len)] * load.num_prompts]
    # the last token is never fed back
    works += [[SequenceWork(load.input_len + i, 1)] * load.num_prompts for i in range(load.output_len - 1)]
    return sum((plan.total_cost(work) for work in works), Cost())


def _rates(samples: Samples, num_tokens: int, cost: Cost, bandwidth: float, matmul: float) -> dict[str, Any]:
    per_second = [num_tokens / seconds for seconds in samples.seconds]
    return {
        "avg_ns": round(statistics.fmean(samples.seconds) * 1e9),
        "stddev_ns": round(statistics.pstdev(samples.seconds) * 1e9),
        "avg_ts": statistics.fmean(per_second),
        "stddev_ts": statistics.pstdev(per_second),
        "median_ts": num_tokens / samples.median,
        "p20_ts": num_tokens / samples.percentile(80),
        "p80_ts": num_tokens / samples.percentile(20),
        "samples_ns": [round(seconds * 1e9) for seconds in samples.seconds],
        "bytes": cost.num_bytes,
        "flops": cost.flops,
        "fraction_of_read_bandwidth": cost.num_bytes / samples.median / bandwidth,
        "fraction_of_matmul_rate": cost.flops / samples.median / matmul,
    }


def _moved(plan: Plan, load: RequestLoad, seconds: float, bandwidth_before: float) -> dict[str, Any]:
    """Bytes and operations of the load that took `seconds`, beside the bandwidth measured before and now."""
    cost, bandwidth = load_cost(plan, load), (bandwidth_before + read_bandwidth(plan.device)) / 2
    return {
        "bytes": cost.num_bytes,
        "flops": cost.flops,
        "read_bandwidth_bytes_per_second": bandwidth,
        "fraction_of_read_bandwidth": cost.num_bytes / seconds / bandwidth,
    }


def _generate(loaded: Loaded, load: RequestLoad, progress: Progress | None) -> float:
    """Seconds that one fresh engine takes for `load`."""
    length = load.input_len + load.output_len
    if not 1 <= length <= loaded.model.spec.max_position:
        raise UsageError(
            "BENCH",
            f"input_len {load.input_len} and output_len {load.output_len} make {length} tokens; "
            f"the model holds {loaded.model.spec.max_position}",
        )
    engine = make_engine(loaded, EngineSizes(max_model_len=length, max_num_seqs=load.num_prompts))
    params = SamplingParams(temperature=0.0, max_tokens=load.output_len, ignore_eos=True, detokenize=False)
    vocab_size = loaded.model.spec.vocab_size
    for i in range(load.num_prompts):
        engine.add_request(str(i), [(i + k) % vocab_size for k in range(load.input_len)], params)
    begin = time.perf_counter()
    while engine.has_unfinished:
        for output in engine.step():
            if output.finished and progress is not None:
                progress(1)
    return time.perf_counter() - begin


def _about(loaded: Loaded, gate: GateResult, load: RequestLoad | None) -> dict[str, Any]:
    """What a figure belongs to."""
    spec, plan = loaded.model.spec, loaded.plan
    sizes = {} if load is None else {"input_len": load.input_len, "output_len": load.output_len}
    return {
        "model_filename": str(loaded.model.path),
        "model_type": spec.family,
        "model_size": plan.weight_bytes,
        "dtype": str(plan.dtype).removeprefix("torch."),
        "target": plan.target,
        "n_layer": len(spec.layers),
        "drop_attn_list": list(spec.dropped("attention")),
        "drop_mlp_list": list(spec.dropped("mlp")),
        "plan_steps": len(plan.steps),
        "kv_bytes_per_token": plan.kv_bytes_per_token,
        "gate_nmse": gate.nmse,
        "gate_limit": gate.limit,
        "gate_oracle": gate.oracle,
        "device": str(plan.device),
        "test_time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        **sizes,
        **machine(),
    }
