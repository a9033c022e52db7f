"""Compile every kernel for GPUs that need not be here, and hold it to the lock files.

python -m tests.kernels.lock              the Triton kernels that real models launch; the exit code says if all is well
python -m tests.kernels.lock --cuda       the CUDA C++ kernels, with the nvcc on PATH
python -m tests.kernels.lock --update     write the lock files anew
python -m tests.kernels.lock --only mlp --arch 90 --table

With another compiler than the lock files were made with, kernels must compile, not spill, and fit.
"""

from __future__ import annotations

import argparse
import itertools
import resource
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import triton

from tests.kernels import cuda, locks
from tests.kernels.compiled import absent_device, facts_of_all, unique
from tests.kernels.facts import Facts
from tests.kernels.models import cases
from tests.kernels.record import DEVICES, record

# of one processor; a thread has a multiple of 8 registers
REGISTERS: Final = 1 << 16
THREADS: Final = 2048
# bytes of shared memory of each block that are not its own
RESERVED: Final = 1024
# complaints that are printed for one architecture
MOST_SAID: Final = 10


@dataclass(frozen=True, slots=True)
class Compiled:
    """Facts of the kernels of one architecture, or why one does not compile, and what they are told apart by.

    `places` says where a kernel is launched, `waiting` which kernels may start early, `threads` how many a block has.
    """

    lock: str
    capability: int
    compiler: str
    found: Mapping[str, Facts | str]
    places: Mapping[str, str]
    waiting: frozenset[str]
    threads: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Clock:
    """Seconds on the wall and of all processors: a busy machine stretches the first alone."""

    wall: float
    processors: float

    @staticmethod
    def now() -> Clock:
        """Ended child processes count."""
        usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return Clock(time.monotonic(), sum(each.ru_utime + each.ru_stime for each in usage))

    def spent(self) -> str:
        """What has passed since."""
        now = Clock.now()
        return f"{now.wall - self.wall:.0f} s ({now.processors - self.processors:.0f} s of processors)"


def main() -> int:
    """Check or update; the exit code."""
    arguments = parse()
    make = cuda_kernels if arguments.cuda else triton_kernels
    known = cuda.ARCHITECTURES if arguments.cuda else DEVICES
    failed = sum(check(make(each, arguments), arguments) for each in arguments.arch or known)
    if failed:
        print(f"{failed} kernels are not as locked; where that is wanted: python -m tests.kernels.lock --update")
    return 1 if failed else 0


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cuda", action="store_true", help="the CUDA C++ kernels instead of the Triton ones")
    parser.add_argument("--update", action="store_true", help="write the lock files anew")
    parser.add_argument("--arch", type=int, nargs="+", choices=sorted(DEVICES), help="80, 90 or 100; all by default")
    parser.add_argument("--only", default="", help="kernels whose description has this text")
    parser.add_argument("--model", default="", help="models whose name has this text; the lock files are not compared")
    parser.add_argument("--table", action="store_true", help="print what every kernel needs")
    parser.add_argument("--processes", type=int, default=2)
    return parser.parse_args()


def triton_kernels(capability: int, arguments: argparse.Namespace) -> Compiled:
    """What models launch on a device of this architecture."""
    begin = Clock.now()
    chosen = [each for each in cases() if capability in each.capabilities and arguments.model in each.name]
    launches = [launch for case in chosen for launch in record(case, DEVICES[capability])]
    with absent_device(capability):
        kernels = {key: each for key, each in unique(launches, capability).items() if arguments.only in key}
        found = facts_of_all(kernels, arguments.processes)
    compiler = f"triton {triton.__version__}"
    count = f"{len(launches)} launches, {len(kernels)} kernels"
    print(f"sm_{capability}: {count}, {compiler}, {begin.spent()}", flush=True)
    return Compiled(
        lock=f"sm_{capability}",
        capability=capability,
        compiler=compiler,
        found=found,
        places={key: launch.place for key, launch in kernels.items()},
        waiting=frozenset(key for key, launch in kernels.items() if launch.early),
        threads={key: 32 * launch.num_warps for key, launch in kernels.items()},
    )


def cuda_kernels(capability: int, arguments: argparse.Namespace) -> Compiled:
    """What is in kernels/*.cu."""
    begin = Clock.now()
    compiler = cuda.nvcc_version()
    if compiler is None:
        sys.exit("no nvcc on PATH: the CUDA C++ kernels cannot be compiled here")
    found = cuda.facts_of_all(capability, arguments.processes)
    name = cuda.ARCHITECTURES[capability]
    print(f"{name}: {len(found)} CUDA kernels, {compiler}, {begin.spent()}", flush=True)
    kept = {key: facts for key, facts in found.items() if arguments.only in key}
    # every one of them may be launched early where that exists
    waiting = frozenset(kept) if DEVICES[capability].has_dependent_launch else frozenset()
    return Compiled(f"cuda_{name}", capability, compiler, kept, {}, waiting, {})


def check(compiled: Compiled, arguments: argparse.Namespace) -> int:
    """Say what is wrong, or update the lock file; how many kernels are not as they should be."""
    if arguments.table:
        print_table(compiled)
    wrong = locks.broken(compiled.found, compiled.lock, compiled.capability, compiled.waiting)
    if not arguments.model:
        good = {key: each for key, each in compiled.found.items() if isinstance(each, Facts) and key not in wrong}
        wrong |= compared(compiled, good, arguments)
    for key, why in itertools.islice(wrong.items(), MOST_SAID):
        place = f" ({compiled.places[key]})" if key in compiled.places else ""
        print(f"{compiled.lock}: {key}{place}: {why}")
    if len(wrong) > MOST_SAID:
        print(f"{compiled.lock}: and {len(wrong) - MOST_SAID} more")
    return len(wrong)


def compared(compiled: Compiled, good: Mapping[str, Facts], arguments: argparse.Namespace) -> dict[str, str]:
    """What is worse than the lock file says; nothing once it was updated."""
    lock = locks.read(compiled.lock)
    if arguments.update:
        others = {key: facts for key, facts in lock.kernels.items() if arguments.only not in key}
        locks.write(compiled.lock, locks.Lock(compiled.compiler, {**others, **good}))
        return {}
    if lock.kernels and lock.compiler != compiled.compiler:
        print(f"{compiled.lock}: made with {lock.compiler}, so it is not compared")
        return {}
    gone = {} if arguments.only else locks.unneeded(compiled.found, compiled.lock)
    failed = compiled.found.keys() - good.keys()
    expected = {key: each for key, each in lock.kernels.items() if arguments.only in key and key not in failed}
    return gone | locks.worse(good, expected)


def print_table(compiled: Compiled) -> None:
    """A line for each kernel: what it needs, how many blocks a processor holds at a time, and where it is used."""
    for key, facts in sorted(compiled.found.items()):
        if isinstance(facts, Facts):
            needs = f"{facts.registers:>3} registers {facts.spilled:>4} spilled {facts.shared:>6} shared"
            if key in compiled.threads:
                needs += f" {blocks_of(facts, compiled.threads[key], compiled.capability):>2} blocks"
            print(f"  {needs}  {key}  {' '.join(facts.instructions)}  {compiled.places.get(key, '')}")


def blocks_of(facts: Facts, threads: int, capability: int) -> int:
    """Blocks that the registers, the shared memory and the threads of one processor are enough for."""
    registers = -(-facts.registers // 8) * 8 * threads
    # each block takes 1 KiB more than it asks for, and one block may have all but that
    shared = facts.shared + RESERVED
    return min(REGISTERS // registers, (locks.SHARED_LIMITS[capability] + RESERVED) // shared, THREADS // threads)


if __name__ == "__main__":
    sys.exit(main())
