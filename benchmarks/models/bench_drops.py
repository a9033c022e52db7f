"""Speed-up of drop patterns on one model: predicted beside measured, one JSON per run in benchmarks/results/.

python benchmarks/models/bench_drops.py examples/novels-5m --drop-attn last:2 --drop-attn last:4 --drop-attn last:6
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

from pyruntime import PyruntimeError
from pyruntime.bench import (
    Ceilings,
    Comparison,
    check_plan,
    compare_plans,
    decode_case,
    prefill_case,
    save_results,
)
from pyruntime.engine.load import DropOptions, Loaded, load

RESULTS = Path(__file__).parent.parent / "results"


def main() -> int:
    """Run the benchmark; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--drop-attn", action="append", required=True, help="a pattern; may be repeated")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--no-save", action="store_true", help="print only")
    arguments = parser.parse_args()
    try:
        rows = run(arguments)
    except PyruntimeError as error:
        print(error.one_line(), file=sys.stderr)
        return error.exit_code
    if not arguments.no_save:
        print(f"written to {save_results(rows, RESULTS, 'drops')}")
    return 0


def run(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure every pattern against the dense model; rows for the result file."""
    dense = loaded(arguments, None)
    cases = [decode_case(1, arguments.context), decode_case(8, arguments.context), prefill_case(arguments.context)]
    rows = []
    probe = Ceilings().probe(dense.plan.dtype)
    print(f"{'drop':<14} {'step':<34} {'predicted':>9} {'measured':>9} {'of read bandwidth':>18}")
    for pattern in arguments.drop_attn:
        pruned = loaded(arguments, pattern)
        for each in compare_plans(dense.plan, pruned.plan, cases, arguments.repeats, probe):
            row = as_row(each, pruned)
            rows.append({**row, "pattern": pattern})
            print(
                f"{pattern:<14} {each.case.name:<34} {each.predicted:>8.2f}x {each.measured:>8.2f}x "
                f"{row['fraction_of_read_bandwidth']:>18.1%}"
            )
    return rows


def loaded(arguments: argparse.Namespace, pattern: str | None) -> Loaded:
    """The model without what `pattern` names, once its results passed the gate."""
    found = load(arguments.model, drops=DropOptions(drop_attn=pattern), dtype=arguments.dtype, skip_tokenizer_init=True)
    check_plan(found.plan, found.model)
    return found


def as_row(each: Comparison, pruned: Loaded) -> dict[str, Any]:
    """One comparison, JSON-ready."""
    cost = pruned.plan.total_cost(each.case.work)
    return {
        "case": each.case.name,
        "target": pruned.plan.target,
        "drop_attn_list": list(pruned.model.spec.dropped("attention")),
        "dtype": str(pruned.plan.dtype).removeprefix("torch."),
        "predicted": each.predicted,
        "measured": each.measured,
        "dense_seconds": each.dense.seconds,
        "pruned_seconds": each.pruned.seconds,
        "bytes": cost.num_bytes,
        "flops": cost.flops,
        "read_bandwidth_bytes_per_second": statistics.median(c.read_bandwidth for c in each.pruned.ceilings),
        "fraction_of_read_bandwidth": statistics.median(each.pruned.fractions_of_read(cost.num_bytes)),
    }


if __name__ == "__main__":
    sys.exit(main())
