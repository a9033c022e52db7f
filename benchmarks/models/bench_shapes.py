"""What dropping attentions gains on a published shape with random weights: predicted beside measured.

python benchmarks/models/bench_shapes.py --shape tinyllama-1.1b --context 32 --context 1024 --drop-attn 11-21
python benchmarks/models/bench_shapes.py --shape tinyllama-1.1b --prompt 512 --drop-attn 11-21

Decode is predicted by the bytes that a step moves, prefill by its operations: with the last attentions gone, that
counts the tail, which runs on the last row only. Without --drop-attn the dense model alone is timed. One JSON per run
in benchmarks/results/.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from pyruntime import PyruntimeError
from pyruntime.bench import (
    Case,
    Ceilings,
    Samples,
    check_plan,
    compare_plans,
    decode_case,
    interleaved,
    prefill_case,
    random_model,
    save_results,
    shape_names,
    shape_spec,
    step_runner,
)
from pyruntime.checkpoint import Model
from pyruntime.engine.memory import check_memory
from pyruntime.errors import UsageError
from pyruntime.graph import build, fuse
from pyruntime.passes import drop, make_drop_plan
from pyruntime.plan import Plan, lower

RESULTS: Final = Path(__file__).parent.parent / "results"


def main() -> int:
    """Run the benchmark; the exit code."""
    arguments = parse()
    try:
        rows = list(run(arguments))
    except PyruntimeError as error:
        print(error.one_line(), file=sys.stderr)
        return error.exit_code
    if not arguments.no_save:
        print(f"written to {save_results(rows, RESULTS, f'shapes-{arguments.shape}-{arguments.dtype}')}")
    return 0


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", required=True, help=f"one of {', '.join(shape_names())}")
    parser.add_argument("--drop-attn", action="append", default=[], help="a pattern; may be repeated")
    parser.add_argument("--target", default="auto")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--batch", type=int, action="append", help="sequences of a decode step; may be repeated (1)")
    parser.add_argument("--context", type=int, action="append", default=[], help="tokens before it; may be repeated")
    parser.add_argument("--prompt", type=int, action="append", default=[], help="tokens of a prefill; may be repeated")
    parser.add_argument("--repeats", type=int, default=15, help="pairs of runs per case")
    parser.add_argument("--no-save", action="store_true", help="print only")
    arguments = parser.parse_args()
    arguments.batch = arguments.batch or [1]
    if not arguments.context and not arguments.prompt:
        arguments.context = [32, 512]
    return arguments


def run(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Check every model, then measure; rows for the result file."""
    dense = random_model(shape_spec(arguments.shape), arguments.dtype)
    cases = cases_of(arguments, dense)
    pruned = [drop(dense, make_drop_plan(dense.spec, drop_attn=pattern)) for pattern in arguments.drop_attn]
    needed = 2 * dense.weight_bytes if pruned else dense.weight_bytes
    check_memory(needed, f"{'two plans' if pruned else 'a plan'} of {arguments.shape}")
    # the check needs the room of the other plan, so each is checked alone, and made again from the same weights
    for model in (dense, *pruned):
        print(check_plan(plan_of(model, arguments), model).line(), flush=True)
    print(
        f"{'drop':<14} {'step':<34} {'ms p20/p50/p80':>24} {'predicted':>9} {'measured':>9} {'reached':>8} of ceiling"
    )
    plan = plan_of(dense, arguments)
    if not pruned:
        yield from measure_alone(plan, cases, arguments)
    for pattern, model in zip(arguments.drop_attn, pruned, strict=True):
        yield from measure_drop(plan, plan_of(model, arguments), pattern, cases, arguments)


def cases_of(arguments: argparse.Namespace, model: Model) -> list[Case]:
    """The steps to measure. Raises UsageError BENCH for what the model cannot hold."""
    sizes = [*arguments.batch, *arguments.context, *arguments.prompt, arguments.repeats]
    longest = max([*(context + 1 for context in arguments.context), *arguments.prompt])
    if min(sizes) < 1 or longest > model.spec.max_position:
        raise UsageError(
            "BENCH",
            f"sizes and repeats start at {min(sizes)} and the longest sequence has {longest} tokens; "
            f"expected 1 or more, and at most {model.spec.max_position}: change them",
        )
    decodes = [decode_case(batch, context) for batch in arguments.batch for context in arguments.context]
    return decodes + [prefill_case(length) for length in arguments.prompt]


def plan_of(model: Model, arguments: argparse.Namespace) -> Plan:
    """The lowered plan; it reads the weights anew."""
    return lower(fuse(build(model.spec)), model, target=arguments.target, dtype=arguments.dtype)


def measure_alone(plan: Plan, cases: list[Case], arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The dense plan by itself."""
    probe = Ceilings().probe(plan.dtype)
    for case in cases:
        (samples,) = interleaved([step_runner(plan, case.work)], arguments.repeats, probe=probe)
        fraction = reached(plan, case, samples)
        print(f"{'nothing':<14} {case.name:<34} {spread(samples):>24} {'':>28} {fraction:>10.1%}", flush=True)
        yield {
            **about(plan, case, arguments),
            "dense_seconds": samples.seconds,
            "ceilings": ceilings(case, samples),
            "fraction_of_ceiling": fraction,
        }


def measure_drop(
    dense: Plan, pruned: Plan, pattern: str, cases: list[Case], arguments: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """Both plans in turn, case by case, with the ceiling before and after every run."""
    probe = Ceilings().probe(pruned.dtype)
    for case in cases:
        (found,) = compare_plans(dense, pruned, [case], arguments.repeats, probe)
        fraction = reached(pruned, case, found.pruned)
        share = found.measured / found.predicted
        gains = f"{found.predicted:>8.3f}x {found.measured:>8.3f}x {share:>8.1%}"
        print(f"{pattern:<14} {case.name:<34} {spread(found.pruned):>24} {gains} {fraction:>10.1%}", flush=True)
        yield {
            **about(pruned, case, arguments),
            "pattern": pattern,
            "predicted": found.predicted,
            "measured": found.measured,
            "measured_over_predicted": share,
            "dense_seconds": found.dense.seconds,
            "pruned_seconds": found.pruned.seconds,
            "ceilings": ceilings(case, found.pruned),
            "fraction_of_ceiling": fraction,
            "dense_fraction_of_ceiling": reached(dense, case, found.dense),
        }


def ceilings(case: Case, samples: Samples) -> list[float]:
    """What bounded each sample: bytes per second that can be read, or operations per second in registers."""
    return [each.read_bandwidth if case.by_bytes else each.multiply_rate for each in samples.ceilings]


def reached(plan: Plan, case: Case, samples: Samples) -> float:
    """Median over the samples of the fraction of the ceiling around each."""
    cost = plan.total_cost(case.work)
    by_bytes = case.by_bytes
    return statistics.median(
        samples.fractions_of_read(cost.num_bytes) if by_bytes else samples.fractions_of_multiply(cost.flops)
    )


def about(plan: Plan, case: Case, arguments: argparse.Namespace) -> dict[str, Any]:
    """What a figure belongs to."""
    cost = plan.total_cost(case.work)
    return {
        "model": arguments.shape,
        "case": case.name,
        "target": plan.target,
        "dtype": arguments.dtype,
        "predicted_by": "bytes" if case.by_bytes else "flops",
        "bytes": cost.num_bytes,
        "flops": cost.flops,
    }


def spread(samples: Samples) -> str:
    """p20, p50 and p80 in milliseconds."""
    return " / ".join(f"{samples.percentile(percent) * 1e3:.2f}" for percent in (20, 50, 80))


if __name__ == "__main__":
    sys.exit(main())
