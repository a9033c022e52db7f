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

from pyruntime.bench.ceilings import Ceilings
from pyruntime.bench.gate import GateResult, check_plan
from pyruntime.bench.machine import commit, machine
from pyruntime.bench.random_model import random_model
from pyruntime.bench.shapes import shape_spec
from pyruntime.bench.steps import steps_runners
from pyruntime.bench.summary import num_weights
from pyruntime.bench.timing import Samples, interleaved, percentile, sampled
from pyruntime.engine.load import DropOptions, EngineSizes, Loaded, make_engine, pruned
from pyruntime.engine.memory import check_memory
from pyruntime.engine.params import SamplingParams
from pyruntime.errors import UsageError
from pyruntime.graph import Cost, SequenceWork, build, fuse
from pyruntime.plan import Plan, lower, resolve_device

PERCENTILES: Final = (10, 25, 50, 75, 90, 99)
_MAX_BATCH: Final = 4096
Progress = Callable[[int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestLoad:
    """Requests of one kind: `num_prompts` of `input_len` tokens, `output_len` new tokens each."""

    num_prompts: int
    input_len: int
    output_len: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardLoad:
    """Bare steps: a prefill of each of `prompt_lens` (pp), `num_new` decode steps behind `depth` tokens (tg).

    A decode step has a row for each of a batch of sequences; there is one test for each of `batch_sizes`. 0 leaves a
    test out, as in llama-bench.
    """

    prompt_lens: tuple[int, ...] = ()
    num_new: int = 1
    batch_sizes: tuple[int, ...] = (1,)
    depth: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Test:
    """One row of the result."""

    name: str
    prompt_len: int = 0
    num_new: int = 0
    batch_size: int = 1
    depth: int = 0

    @property
    def num_tokens(self) -> int:
        return self.prompt_len + self.num_new * self.batch_size

    def works(self) -> list[list[SequenceWork]]:
        if self.prompt_len:
            return [[SequenceWork(0, self.prompt_len)]]
        return [[SequenceWork(self.depth + i, 1)] * self.batch_size for i in range(self.num_new)]


def bench_latency(
    loaded: Loaded, load: RequestLoad, num_iters: int, num_iters_warmup: int, progress: Progress | None = None
) -> dict[str, Any]:
    """Seconds from a batch of prompts to its last token, in vLLM's fields avg_latency, latencies, percentiles."""
    _check_length(loaded, load)
    gate, ceilings = check_plan(loaded.plan, loaded.model), Ceilings(loaded.plan.device)
    for _ in range(num_iters_warmup):
        _generate(loaded, load, progress)
    samples = _requests(loaded, load, num_iters, ceilings, progress)
    return {
        "avg_latency": statistics.fmean(samples.seconds),
        "latencies": list(samples.seconds),
        "percentiles": {str(percent): samples.percentile(percent) for percent in PERCENTILES},
        **_spread("latency", samples.seconds),
        **_speed(samples, load_cost(loaded.plan, load)),
        **_about(loaded, gate, ceilings, load),
    }


def bench_throughput(
    loaded: Loaded, load: RequestLoad, num_iters: int = 1, progress: Progress | None = None
) -> dict[str, Any]:
    """Requests and tokens per second with all prompts queued at once, the median of the rounds; vLLM's JSON fields."""
    _check_length(loaded, load)
    gate, ceilings = check_plan(loaded.plan, loaded.model), Ceilings(loaded.plan.device)
    # one short round first: the first step of a process pays for thread pools and caches
    _generate(loaded, RequestLoad(num_prompts=1, input_len=load.input_len, output_len=1), None)
    samples = _requests(loaded, load, num_iters, ceilings, progress)
    elapsed, tokens = samples.median, load.num_prompts * (load.input_len + load.output_len)
    return {
        "elapsed_time": elapsed,
        "elapsed_times": list(samples.seconds),
        "num_requests": load.num_prompts,
        "total_num_tokens": tokens,
        "requests_per_second": load.num_prompts / elapsed,
        "tokens_per_second": tokens / elapsed,
        "output_tokens_per_second": load.num_prompts * load.output_len / elapsed,
        **_spread("elapsed_time", samples.seconds),
        **_speed(samples, load_cost(loaded.plan, load)),
        **_about(loaded, gate, ceilings, load),
    }


def bench_forward(loaded: Loaded, load: ForwardLoad, repeats: int, name: str | None = None) -> list[dict[str, Any]]:
    """Bare plan steps in llama-bench's fields: prefill of each length (pp), decode steps of each batch (tg).

    `name` is the model's where it has no folder.
    """
    tests = _tests(load, loaded.model.spec.max_position)
    gate, plan = check_plan(loaded.plan, loaded.model), loaded.plan
    ceilings = Ceilings(plan.device)
    runs = steps_runners(plan, [test.works() for test in tests])
    timed = interleaved(runs, repeats, warmup=1, probe=ceilings.probe(plan.dtype))
    about = _about(loaded, gate, ceilings, None, name)
    return [
        {
            "test": test.name,
            "n_prompt": test.prompt_len,
            "n_gen": test.num_new,
            "n_depth": test.depth,
            "n_batch": test.batch_size,
            **_rates(samples, test.num_tokens),
            **_speed(samples, sum((plan.total_cost(work) for work in test.works()), Cost())),
            **about,
        }
        for test, samples in zip(tests, timed, strict=True)
    ]


def load_shape(
    name: str,
    *,
    drops: DropOptions = DropOptions(),
    dtype: str = "auto",
    target: str = "auto",
    device: str = "auto",
) -> Loaded:
    """A model of the shape called `name` with random weights, pruned and lowered.

    `dtype` "auto" is bfloat16. Raises UsageError SHAPE for an unknown name, RunError MEMORY for one that does not fit.
    """
    model = pruned(random_model(shape_spec(name), "bfloat16" if dtype == "auto" else dtype), drops)
    check_memory(model.weight_bytes, f"a model of the shape {name}", resolve_device(device, target))
    plan = lower(fuse(build(model.spec)), model, target=target, dtype=dtype, device=device)
    return Loaded(model=model, plan=plan, tokenizer=None, generation_config={}, eos_token_ids=())


def load_cost(plan: Plan, load: RequestLoad) -> Cost:
    """What `load` must move and compute: all prompts in one step, then a step for each token after the first.

    An engine that needs more steps than these moves more: this is what no engine can avoid.
    """
    works = [[SequenceWork(0, load.input_len)] * load.num_prompts]
    # the last token is never fed back
    works += [[SequenceWork(load.input_len + i, 1)] * load.num_prompts for i in range(load.output_len - 1)]
    return sum((plan.total_cost(work) for work in works), Cost())


def _tests(load: ForwardLoad, longest: int) -> list[_Test]:
    """The tests of `load`. Raises UsageError BENCH for what the model cannot hold, and where nothing is left to do."""
    bounds = [("prompt_len", length, 0, longest) for length in load.prompt_lens]
    bounds += [("batch_size", batch, 1, _MAX_BATCH) for batch in load.batch_sizes]
    bounds += [("n_gen", load.num_new, 0, longest), ("depth", load.depth, 0, longest)]
    bounds += [("depth + n_gen", load.depth + load.num_new, 0, longest)]
    for name, value, low, high in bounds:
        if not low <= value <= high:
            why = f"; the model holds {longest} tokens" if high == longest else ""
            raise UsageError("BENCH", f"{name} is {value}; expected {low} to {high}{why}")
    tests = [_Test(name=f"pp{length}", prompt_len=length) for length in load.prompt_lens if length]
    for batch in load.batch_sizes if load.num_new else ():
        name = f"tg{load.num_new}{f' b{batch}' if batch > 1 else ''}{f' @ d{load.depth}' if load.depth else ''}"
        tests.append(_Test(name=name, num_new=load.num_new, batch_size=batch, depth=load.depth))
    if not tests:
        raise UsageError("BENCH", "prompt_len and n_gen are 0, so nothing is left to measure; expected one above 0")
    return tests


def _rates(samples: Samples, num_tokens: int) -> dict[str, Any]:
    """Tokens per second and times of one test, in llama-bench's fields and as percentiles."""
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
        "samples_ts": per_second,
    }


def _speed(samples: Samples, cost: Cost) -> dict[str, Any]:
    """Bytes and operations of each sample beside the ceilings around it: rates are medians, and so are fractions."""
    bandwidths = [each.read_bandwidth for each in samples.ceilings]
    rates = [each.multiply_rate for each in samples.ceilings]
    return {
        "bytes": cost.num_bytes,
        "flops": cost.flops,
        "read_bandwidth_bytes_per_second": statistics.median(bandwidths),
        "matmul_flops_per_second": statistics.median(rates),
        "samples_read_bandwidth": bandwidths,
        "samples_multiply_rate": rates,
        "fraction_of_read_bandwidth": statistics.median(samples.fractions_of_read(cost.num_bytes)),
        **_spread("fraction_of_read_bandwidth", samples.fractions_of_read(cost.num_bytes)),
        "fraction_of_matmul_rate": statistics.median(samples.fractions_of_multiply(cost.flops)),
        **_spread("fraction_of_matmul_rate", samples.fractions_of_multiply(cost.flops)),
    }


def _spread(name: str, values: Sequence[float]) -> dict[str, float]:
    return {f"p{percent}_{name}": percentile(values, percent) for percent in (20, 50, 80)}


def _requests(
    loaded: Loaded, load: RequestLoad, repeats: int, ceilings: Ceilings, progress: Progress | None
) -> Samples:
    """`load` again and again, each time in a fresh engine."""
    probe = ceilings.probe(loaded.plan.dtype)
    (samples,) = sampled([lambda: _generate(loaded, load, progress)], repeats, probe)
    return samples


def _check_length(loaded: Loaded, load: RequestLoad) -> None:
    """Raise UsageError BENCH for requests that the model cannot hold."""
    length = load.input_len + load.output_len
    if not 1 <= length <= loaded.model.spec.max_position:
        raise UsageError(
            "BENCH",
            f"input_len {load.input_len} and output_len {load.output_len} make {length} tokens; "
            f"the model holds {loaded.model.spec.max_position}",
        )


def _generate(loaded: Loaded, load: RequestLoad, progress: Progress | None) -> float:
    """Seconds that one fresh engine takes for `load`."""
    length = load.input_len + load.output_len
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


def _about(
    loaded: Loaded, gate: GateResult, ceilings: Ceilings, load: RequestLoad | None, name: str | None = None
) -> dict[str, Any]:
    """What a figure belongs to."""
    spec, plan = loaded.model.spec, loaded.plan
    sizes = {} if load is None else {"input_len": load.input_len, "output_len": load.output_len}
    facts = machine()
    return {
        "model_filename": name or str(loaded.model.path),
        "model_type": spec.family,
        "model_size": plan.weight_bytes,
        "model_n_params": num_weights(spec),
        "dtype": str(plan.dtype).removeprefix("torch."),
        "target": plan.target,
        "n_threads": torch.get_num_threads() if plan.program is None else plan.program.num_threads,
        "n_layer": len(spec.layers),
        "drop_attn_list": list(spec.dropped("attention")),
        "drop_mlp_list": list(spec.dropped("mlp")),
        "plan_steps": len(plan.steps),
        "kv_bytes_per_token": plan.kv_bytes_per_token,
        "gate_nmse": gate.nmse,
        "gate_limit": gate.limit,
        "gate_oracle": gate.oracle,
        "device": str(plan.device),
        **ceilings.names(plan.dtype),
        # an installed package knows its version alone
        "commit": commit() or facts["pyruntime"],
        "test_time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        **sizes,
        **facts,
    }
