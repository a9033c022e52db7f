"""The fuzzer: `python -m tests.fuzz.run --cases 1000000 --seed 1`. In one tree, seed and number name a case.

What fails is written as a corpus file. Kept in corpus/ it needs a rule, the code that the rule asks for, and why.
"""

from __future__ import annotations

import argparse
import re
import resource
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from tests.fuzz.cases import TARGETS, Case, Entry, Seed, dump_entry, load_seeds, whole
from tests.fuzz.check import ACCEPTED, Bench, Violation, open_bench
from tests.fuzz.mutate import make_case
from tests.fuzz.shrink import shrink

_CHUNK = 2000


@dataclass(slots=True)
class Tally:
    """What became of a range of cases.

    `failures` and `branches` hold the first case number of each; `slowest` is (processor seconds, target, case number).
    """

    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)
    failures: dict[tuple[str, str], int] = field(default_factory=dict)
    branches: dict[tuple[str, str], int] = field(default_factory=dict)
    slowest: tuple[float, str, int] = (0.0, "", 0)

    def add(self, other: Tally) -> None:
        """Count `other` in."""
        self.outcomes += other.outcomes
        self.failures = {**other.failures, **self.failures}
        self.branches = {**other.branches, **self.branches}
        self.slowest = max(self.slowest, other.slowest)


def usable_seeds(bench: Bench) -> list[Seed]:
    """The seeds that this release reads: those of families and dialects to come are left out."""
    return [seed for seed in load_seeds() if bench.run(whole(seed)).code == ACCEPTED]


def run_range(targets: Sequence[str], seed: int, start: int, stop: int) -> Tally:
    """Cases `start` to `stop` of the stream `seed`, each for the next of `targets`."""
    tally = Tally()
    with open_bench() as bench:
        seeds = usable_seeds(bench)
        for number in range(start, stop):
            target = targets[number % len(targets)]
            case = make_case(target, seed, number, seeds)
            before = time.process_time()
            try:
                outcome = bench.run(case)
            except Violation as violation:
                tally.outcomes[target, "VIOLATION"] += 1
                tally.failures.setdefault((target, kind_of(violation)), number)
            else:
                tally.outcomes[target, outcome.code] += 1
                tally.branches.setdefault((target, f"{outcome.code} {outcome.site}"), number)
            tally.slowest = max(tally.slowest, (time.process_time() - before, target, number))
    return tally


def kind_of(violation: Violation) -> str:
    """The violation without its numbers and quoted values, so that equal ones are counted once."""
    return re.sub(r"'[^']*'|\"[^\"]*\"|(?<!:)\b\d+", "~", str(violation))


def branch_of(bench: Bench, case: Case) -> str:
    """What `run_range` would file `case` under."""
    try:
        outcome = bench.run(case)
    except Violation as violation:
        return kind_of(violation)
    return f"{outcome.code} {outcome.site}"


def write_cases(folder: Path, found: dict[tuple[str, str], int], seed: int, prefix: str) -> None:
    """The case of each entry of `found` as a corpus file in `folder`, made as small as it goes."""
    folder.mkdir(parents=True, exist_ok=True)
    with open_bench() as bench:
        seeds = usable_seeds(bench)
        for (target, branch), number in sorted(found.items()):

            def same(case: Case, branch: str = branch) -> bool:
                return branch_of(bench, case) == branch

            entry = Entry(shrink(make_case(target, seed, number, seeds), same), "", "*", branch)
            (folder / f"{prefix}-{target}-{seed}-{number}.json").write_text(dump_entry(entry))


def _tallies(targets: Sequence[str], seed: int, cases: int, jobs: int) -> Iterator[Tally]:
    ranges = [(targets, seed, start, min(start + _CHUNK, cases)) for start in range(0, cases, _CHUNK)]
    if jobs == 1:
        yield from (run_range(*each) for each in ranges)
        return
    with ProcessPoolExecutor(jobs) as pool:
        yield from pool.map(run_range, *zip(*ranges, strict=True))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, show progress, write what failed, print the figures; 1 where something failed."""
    parser = argparse.ArgumentParser(description="Fuzz the readers of untrusted files.")
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--target", choices=TARGETS)
    parser.add_argument("--failures", type=Path, default=Path("build/fuzz"), help="folder for cases that failed")
    parser.add_argument("--collect", type=Path, help="folder for one small case of every branch that was taken")
    options = parser.parse_args(arguments)
    targets = (options.target,) if options.target else TARGETS
    total, start = Tally(), time.monotonic()
    with tqdm(total=options.cases, unit=" cases", mininterval=5, maxinterval=30) as bar:
        for tally in _tallies(targets, options.seed, options.cases, options.jobs):
            total.add(tally)
            bar.update(sum(tally.outcomes.values()))
            bar.set_postfix(failures=len(total.failures), branches=len(total.branches))
    seconds = time.monotonic() - start
    for (target, code), count in sorted(total.outcomes.items()):
        print(f"{target:10} {code:20} {count:9}")
    speed = f"{options.cases / seconds:.0f} cases/s"
    print(f"{options.cases} cases, seed {options.seed}: {speed}, {len(total.branches)} branches")
    print(f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10} MiB of memory at most")
    print(f"slowest: {total.slowest[0]:.3f} s of processor time, {total.slowest[1]} case {total.slowest[2]}")
    for (target, kind), number in total.failures.items():
        print(f"FAILED {target} case {number}: {kind}")
    print(f"{len(total.failures)} distinct failures")
    write_cases(options.failures, total.failures, options.seed, "failed")
    if options.collect:
        write_cases(options.collect, total.branches, options.seed, "branch")
    return 1 if total.failures else 0


if __name__ == "__main__":
    sys.exit(main())
