"""pyruntime beside eager transformers: the same weights, one process, in turn; one JSON per run in benchmarks/results/.

python benchmarks/peers/bench_transformers.py --shape smollm2-135m --dtype float32 --batch 1 --batch 8 --prompt 512

Both sides are checked against each other first, and nothing is timed where they differ. A decode step is one forward
of one token per sequence and the choice of the next one by argmax, over caches that grow; a sample is the mean of 8
steps in a row, because that is how text is made. A prefill is one forward of a prompt into a cache without keys, with
the logits of the last position. transformers runs eagerly (no torch.compile), with its default attention (sdpa), every
CPU that the process may use, and its DynamicCache.

torch's OpenMP workers spin after each parallel region and would take a core from whoever runs next, so each side begins
after a pause that is longer than they spin. OMP_WAIT_POLICY is left alone, because that is best for transformers: with
smollm2-135m in float32 on two cores, `passive` cost transformers 5 % at batch 1 and 15 % to 60 % at batch 8; `active`
gained nothing beyond the noise, and its workers would never sleep. The policy found is written into the result.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import torch
from hf_twin import twin
from sides import Ours, Side, Theirs, greedy, paired

from pyruntime import PyruntimeError
from pyruntime.bench import (
    Ceilings,
    Samples,
    nmse_of,
    random_model,
    save_results,
    shape_names,
    shape_spec,
)
from pyruntime.checkpoint import Model, read_model
from pyruntime.engine.memory import check_memory
from pyruntime.errors import RunError, UsageError
from pyruntime.graph import Cost, build, fuse
from pyruntime.passes import drop, make_drop_plan
from pyruntime.plan import DTYPES, Plan, lower

RESULTS: Final = Path(__file__).parent.parent / "results"
# largest difference over the spread in float32; where both sides round every product's input, NMSE
FLOAT32_LIMIT: Final = 1e-4
HALF_LIMIT: Final = 2e-3
WARMUP: Final = 3
BURST: Final = 8
CHECKED_STEPS: Final = 3


def main() -> int:
    """Run the benchmark; the exit code."""
    arguments = parse()
    try:
        rows = list(run(arguments))
    except PyruntimeError as error:
        print(error.one_line(), file=sys.stderr)
        return error.exit_code
    if not arguments.no_save:
        about = arguments.shape or arguments.model.resolve().name
        print(f"written to {save_results(rows, RESULTS, f'transformers-{about}-{arguments.dtype}')}")
    return 0


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--shape", help=f"random weights in the shape of: {', '.join(shape_names())}")
    what.add_argument("--model", type=Path, help="a checkpoint folder")
    parser.add_argument("--target", default="auto")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--batch", type=int, action="append", help="sequences per decode step; may be repeated (1, 8)")
    parser.add_argument("--context", type=int, default=32, help="tokens before the first decode step")
    parser.add_argument(
        "--prompt", type=int, action="append", help="tokens of a prefill; may be repeated (512), 0: none"
    )
    parser.add_argument("--drop-attn", help="attentions that both sides go without: 20-30, last:8, ...")
    parser.add_argument("--repeats", type=int, default=15, help="pairs of runs per case")
    parser.add_argument("--pause", type=float, default=0.03, help="seconds of silence before each run")
    parser.add_argument("--no-save", action="store_true", help="print only")
    arguments = parser.parse_args()
    arguments.batch = arguments.batch or [1, 8]
    arguments.prompt = [512] if arguments.prompt is None else [length for length in arguments.prompt if length]
    return arguments


def run(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Check and time every case; rows for the result file."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model = model_of(arguments)
    check_sizes(arguments, model)
    plan, theirs = sides_of(model, arguments.target, DTYPES[arguments.dtype])
    ours = Ours(plan)
    sides = f"{'pyruntime ms p20/p50/p80':>26} {'transformers ms p20/p50/p80':>28}"
    print(f"{'step':<30} {sides} {'ratio':>7} must move or compute, and the fraction of the ceiling")
    common = {
        "model": arguments.shape or str(arguments.model),
        "target": plan.target,
        "dtype": arguments.dtype,
        "drop_attn_list": list(model.spec.dropped("attention")),
        "num_threads": torch.get_num_threads(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", ""),
        "pause_seconds": arguments.pause,
        "burst": BURST,
    }
    for batch in arguments.batch:
        yield {**common, **decode(ours, theirs, plan, batch, arguments)}
    for length in arguments.prompt:
        yield {**common, **prefill(ours, theirs, plan, length, arguments)}


def model_of(arguments: argparse.Namespace) -> Model:
    """The model that both sides are made from; its weights are read later, one by one."""
    if arguments.shape is not None:
        model = random_model(shape_spec(arguments.shape), arguments.dtype)
    else:
        model = read_model(arguments.model)
    dropped = make_drop_plan(model.spec, drop_attn=arguments.drop_attn)
    return drop(model, dropped) if dropped else model


def check_sizes(arguments: argparse.Namespace, model: Model) -> None:
    """Raise UsageError BENCH for what the model cannot hold."""
    room = CHECKED_STEPS + steps_timed(arguments)
    longest = max(arguments.context + room, *arguments.prompt, 0)
    least = min(arguments.context, arguments.repeats, *arguments.batch)
    if least < 1 or longest > model.spec.max_position:
        raise UsageError(
            "BENCH",
            f"batch, context and repeats start at {least} and sequences grow to {longest} tokens; "
            f"expected 1 or more, and at most {model.spec.max_position}: change them",
        )


def sides_of(model: Model, target: str, dtype: torch.dtype) -> tuple[Plan, Side]:
    """The plan and the transformers model, each with its own copy of the weights and no third one."""
    stored = model.weight_bytes // DTYPES[model.dtype].itemsize * dtype.itemsize
    check_memory(2 * stored, "a copy of the weights for each side")
    theirs = Theirs(twin(model, dtype))
    name = str(dtype).removeprefix("torch.")
    return lower(fuse(build(model.spec)), model, target=target, dtype=name), theirs


def decode(ours: Side, theirs: Side, plan: Plan, batch: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """One token for each of `batch` sequences."""
    name = f"decode, batch {batch}, context {arguments.context}"
    prompts = prompts_of(batch, arguments.context, plan.vocab_size)
    error = check(name, ours, theirs, prompts, plan.dtype)
    room = steps_timed(arguments)
    runs = [greedy(side, side.start(prompts, room)) for side in (ours, theirs)]
    probe = Ceilings().probe(plan.dtype)
    times = paired(runs, arguments.repeats, arguments.pause, WARMUP, probe, BURST)
    # the caches grow as the steps go; this is the middle one
    cost = plan.decode_cost(batch, arguments.context + room // 2)
    fractions = [statistics.median(each.fractions_of_read(cost.num_bytes)) for each in times]
    found = row(name, times, cost, error)
    print(
        f"{cost.num_bytes / 1e6:>9.1f} MB, {fractions[0]:.1%} and {fractions[1]:.1%} of the read bandwidth", flush=True
    )
    return {"batch": batch, "context": arguments.context, **found, "fractions_of_read_bandwidth": fractions}


def steps_timed(arguments: argparse.Namespace) -> int:
    """Decode steps of one case: bursts, and the step before each."""
    return (BURST + 1) * (WARMUP + arguments.repeats)


def prefill(ours: Side, theirs: Side, plan: Plan, length: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """The last logits of one prompt of `length` tokens."""
    name = f"prefill, {length} tokens"
    prompts = prompts_of(1, length, plan.vocab_size)
    error = check(name, ours, theirs, prompts, plan.dtype, steps=0)
    runs = [lambda side=side: side.start(prompts, 0).argmax(-1) for side in (ours, theirs)]
    times = paired(runs, arguments.repeats, arguments.pause, WARMUP, Ceilings().probe(plan.dtype))
    cost = plan.prefill_cost(length)
    fractions = [statistics.median(each.fractions_of_multiply(cost.flops)) for each in times]
    found = row(name, times, cost, error)
    print(f"{cost.flops / 1e9:>6.1f} GFLOP, {fractions[0]:.1%} and {fractions[1]:.1%} of the multiply rate", flush=True)
    return {"prompt": length, **found, "fractions_of_multiply_rate": fractions}


def prompts_of(batch: int, length: int, vocab_size: int) -> torch.Tensor:
    """Token ids spread over the vocabulary, [batch, length], the same in every run."""
    return torch.arange(batch * length).reshape(batch, length) * 7919 % vocab_size


def check(
    name: str, ours: Side, theirs: Side, prompts: torch.Tensor, dtype: torch.dtype, steps: int = CHECKED_STEPS
) -> float:
    """The worst difference of the two sides' logits behind `prompts` and some steps. Raises RunError NUMERICS."""
    tokens = prompts[:, 0]
    logits = [(ours.start(prompts, steps), theirs.start(prompts, steps))]
    for _ in range(steps):
        logits.append((ours.step(tokens), theirs.step(tokens)))
        # the same for both, or rounding could lead them to different texts
        tokens = logits[-1][1].argmax(-1)
    full = dtype is torch.float32
    worst = max(spread_error(a, b) if full else nmse_of(a, b) for a, b in logits)
    limit = FLOAT32_LIMIT if full else HALF_LIMIT
    # written so that a NaN fails
    if not worst <= limit:
        what = "a relative error" if full else "an NMSE"
        raise RunError(
            "NUMERICS", f"{name}: the two sides' logits have {what} of {worst:.1e}; expected at most {limit:.0e}"
        )
    return worst


def spread_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference over the spread of the expected values."""
    return float((found.double() - expected.double()).abs().max() / expected.double().std())


def row(name: str, times: tuple[Samples, ...], cost: Cost, error: float) -> dict[str, Any]:
    """One case, its times printed, JSON-ready. Both sides are held against what the plan must move and compute."""
    ours, theirs = times
    ratio = statistics.median(slow / own for slow, own in zip(theirs.seconds, ours.seconds, strict=True))
    print(f"{name:<30} {spread(ours):>26} {spread(theirs):>28} {ratio:>6.2f}x ", end="")
    return {
        "case": name,
        "pyruntime_seconds": ours.seconds,
        "transformers_seconds": theirs.seconds,
        "ratio": ratio,
        "bytes": cost.num_bytes,
        "flops": cost.flops,
        "read_bandwidth_bytes_per_second": [each.read_bandwidth for each in ours.ceilings],
        "multiply_flops_per_second": [each.multiply_rate for each in ours.ceilings],
        "difference": error,
    }


def spread(samples: Samples) -> str:
    """p20, p50 and p80 in milliseconds."""
    return " / ".join(f"{samples.percentile(percent) * 1e3:.2f}" for percent in (20, 50, 80))


if __name__ == "__main__":
    sys.exit(main())
