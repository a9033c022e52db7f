"""The native sampler beside the reference: same tokens first, then p20, p50 and p80 of both in microseconds.

python benchmarks/ops/bench_sample.py
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

from pyruntime import PyruntimeError
from pyruntime.bench import Samples, interleaved
from pyruntime.bench.results import save_results
from pyruntime.errors import RunError
from pyruntime.ops import sample
from pyruntime.ops.sample import SampleConfig
from pyruntime.ops.sample_native import NativeSampler

RESULTS = Path(__file__).parent.parent / "results"
CONFIGS = {
    "greedy": SampleConfig(),
    "temperature": SampleConfig(temperature=1.0, seed=1),
    "top-p 0.9": SampleConfig(temperature=1.0, top_p=0.9, seed=1),
    "top-k 50": SampleConfig(temperature=1.0, top_k=50, seed=1),
}
VOCABS = (32_000, 128_256)
ROWS = (1, 8)
# standard deviation of the logits: a few hundred tokens hold 90 % of the probability
SPREAD = 4.0


def main() -> int:
    """Run the benchmark; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=100)
    parser.add_argument("--no-save", action="store_true", help="print only")
    arguments = parser.parse_args()
    # the reference on one thread: its workers would stay awake and take the processors of the native team
    torch.set_num_threads(1)
    print(
        f"{'vocab':>7} {'rows':>4} {'':<12} {'native: p20, p50, p80':>24} {'reference: p20, p50, p80':>27} {'ratio':>7}"
    )
    try:
        found = [measure(vocab, rows, name, arguments.repeats) for vocab in VOCABS for rows in ROWS for name in CONFIGS]
    except PyruntimeError as error:
        print(error.one_line(), file=sys.stderr)
        return error.exit_code
    if not arguments.no_save:
        print(f"written to {save_results(found, RESULTS, 'sample')}")
    return 0


def measure(vocab: int, rows: int, name: str, repeats: int) -> dict[str, Any]:
    """Check, then time, one case; a row for the result file."""
    logits = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(rows)) * SPREAD
    configs, empty = [CONFIGS[name]] * rows, [()] * rows
    sampler = NativeSampler(vocab)
    for first in range(0, 20 * rows, rows):
        steps = range(first, first + rows)
        expected = sample.reference(logits, configs, empty, empty, steps)
        if sampler.sample(logits, range(rows), configs, empty, empty, steps) != expected:
            raise RunError("NUMERICS", f"{name}, vocab {vocab}: the native tokens at {steps} are not the reference's")
    steps = range(rows)
    native, reference = interleaved(
        [
            lambda: sampler.sample(logits, range(rows), configs, empty, empty, steps),
            lambda: sample.reference(logits, configs, empty, empty, steps),
        ],
        repeats,
    )
    ratio = reference.median / native.median
    print(f"{vocab:>7} {rows:>4} {name:<12} {microseconds(native):>24} {microseconds(reference):>27} {ratio:>6.1f}x")
    return {
        "case": name,
        "vocab": vocab,
        "rows": rows,
        "native_seconds": native.seconds,
        "reference_seconds": reference.seconds,
        "bytes": logits.numel() * logits.element_size(),
    }


def microseconds(samples: Samples) -> str:
    """p20, p50 and p80."""
    return ", ".join(f"{samples.percentile(percent) * 1e6:.0f}" for percent in (20, 50, 80))


if __name__ == "__main__":
    sys.exit(main())
