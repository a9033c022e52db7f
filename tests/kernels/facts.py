"""What a compiled kernel needs of a GPU and which instructions it uses, read from its object."""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import triton

ROOT: Final = Path(__file__).parents[2]
CACHE: Final = ROOT / "build" / "kernel-cache"
# in Triton's own wheel, so that no CUDA toolkit is needed
TOOL: Final = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
# classes by how an instruction starts: a kernel that loses one has lost its fast path
CLASSES: Final = {
    "HGMMA": r"HGMMA",  # tensor cores fed from shared memory (wgmma, sm_90)
    "UTCMMA": r"UTC\w*MMA",  # the same on sm_100 (tcgen05)
    "HMMA": r"HMMA",  # tensor cores fed from registers (mma.sync)
    "LDSM": r"LDSM",  # matrices from shared memory
    "LDGSTS": r"LDGSTS",  # asynchronous copies to shared memory (cp.async)
    "UBLKCP": r"UBLKCP|UTMALDG",  # bulk copies
    "LDG128": r"LDG\.E\.(?:\w+\.)*128",  # loads of 16 bytes
    "PREFETCH": r"CCTL\.E\.PF2",  # lines brought into the L2 cache
    "ACQBULK": r"ACQBULK",  # waits for the kernel in front
    "PREEXIT": r"PREEXIT",  # lets the kernel behind start
    "ATOM": r"(?:ATOM|ATOMG|RED|REDG)\b",  # atomic operations on global memory
}
# a line of disassembly: /*address*/ predicate instruction operands
_INSTRUCTION: Final = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)")


@dataclass(frozen=True, slots=True)
class Facts:
    """Registers of a thread, bytes of shared memory of a block, bytes of a thread that spilled, instruction classes."""

    registers: int
    shared: int
    spilled: int
    instructions: tuple[str, ...]

    def to_json(self) -> str:
        """One line."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> Facts:
        """The facts in such a line."""
        fields = json.loads(text)
        return Facts(**{**fields, "instructions": tuple(fields["instructions"])})


def run(*command: str | Path) -> str:
    """What a program prints."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command[0]} failed: {done.stdout + done.stderr}"
    return done.stdout + done.stderr


def read_cubin(cubin: bytes, shared: int) -> Facts:
    """Facts of an object with one kernel that is launched with `shared` bytes of dynamic shared memory."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        usage, code = run(TOOL, "-res-usage", path), run(TOOL, "-sass", path)
    found = re.search(r"REG:(\d+).*?STACK:(\d+).*?LOCAL:(\d+)", usage)
    assert found is not None, f"cuobjdump does not say how many registers there are: {usage}"
    return Facts(int(found[1]), shared, int(found[2]) + int(found[3]), instructions_of(code))


def instructions_of(disassembly: str) -> tuple[str, ...]:
    """The instruction classes that occur."""
    names = set(_INSTRUCTION.findall(disassembly))
    return tuple(kind for kind, start in CLASSES.items() if any(re.match(start, name) for name in names))
