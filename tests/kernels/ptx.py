"""The order of a compiled kernel's memory operations, on every path through its PTX."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

WAIT: Final = re.compile(r"griddepcontrol\.wait")
BARRIER: Final = re.compile(r"bar(rier)?(\.cta)?\.sync")
ATOMIC: Final = re.compile(r"atom\.")
LOAD: Final = re.compile(r"ld(\.\w+)*\.global")
STORE: Final = re.compile(r"st(\.\w+)*\.global")
RETURN: Final = re.compile(r"(ret|exit)\b")
# what a kernel may do only when the one in front has ended; prefetch.global touches no value
_GUARDED: Final = (
    LOAD,
    STORE,
    ATOMIC,
    RETURN,
    re.compile(r"red\."),
    re.compile(r"cp\.(async\.(?!commit|wait)|reduce)"),
)
_LABEL: Final = re.compile(r"(\$L__BB\w+):")
_INSTRUCTION: Final = re.compile(r"(?:(@!?%\w+)\s+)?([a-z]\w*[^;]*);")
_BRANCH: Final = re.compile(r"bra(\.uni)?\s+(\$L\w+)$")


@dataclass(frozen=True, slots=True)
class Program:
    """Instructions of a kernel, without predicates, and which may run behind each and in front of it."""

    instructions: Sequence[str]
    behind: Sequence[tuple[int, ...]]
    in_front: Sequence[tuple[int, ...]]


def parse(text: str) -> Program:
    """The kernel in `text`, a PTX module with one function."""
    instructions: list[str] = []
    predicated: list[bool] = []
    labels: dict[str, int] = {}
    body = re.sub(r"//[^\n]*", "", text[text.index("{", text.index(".entry")) :])
    for line in map(str.strip, body.splitlines()):
        if label := _LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif not line.startswith((".", "$")):
            for found in _INSTRUCTION.finditer(line):
                instructions.append(found[2].strip())
                predicated.append(found[1] is not None)
    behind = [_behind(i, each, predicated[i], labels, len(instructions)) for i, each in enumerate(instructions)]
    in_front: list[list[int]] = [[] for _ in instructions]
    for i, others in enumerate(behind):
        for other in others:
            in_front[other].append(i)
    return Program(instructions, behind, [tuple(each) for each in in_front])


def _behind(i: int, instruction: str, predicated: bool, labels: dict[str, int], count: int) -> tuple[int, ...]:
    branch = _BRANCH.match(instruction)
    assert branch is not None or not instruction.startswith("br"), f"not a branch that is known: {instruction}"
    targets = () if branch is None else (labels[branch[2]],)
    falls_through = predicated or (branch is None and not RETURN.match(instruction))
    return (*targets, i + 1) if falls_through and i + 1 < count else targets


def before_waiting(program: Program) -> list[str]:
    """Instructions that some path reaches without having waited for the kernel in front, and that must not be."""
    reached = _reached(program, [0], program.behind, WAIT)
    return [each for each in reached if any(kind.match(each) for kind in _GUARDED)]


def around_arrivals(program: Program) -> list[str]:
    """Stores that some path has no barrier between and an atomic operation behind, and loads likewise in front.

    One thread arrives for all of its block: what the others stored must be there before, and what they load be loaded
    after.
    """
    atomics = [i for i, each in enumerate(program.instructions) if ATOMIC.match(each)]
    stores = _reached(program, (j for i in atomics for j in program.in_front[i]), program.in_front, BARRIER)
    loads = _reached(program, (j for i in atomics for j in program.behind[i]), program.behind, BARRIER)
    return [each for each in stores if STORE.match(each)] + [each for each in loads if LOAD.match(each)]


def _reached(
    program: Program, begin: Iterable[int], edges: Sequence[tuple[int, ...]], end: re.Pattern[str]
) -> list[str]:
    """Instructions on the paths from `begin` that no instruction like `end` stands before."""
    found: set[int] = set()
    waiting = list(begin)
    while waiting:
        i = waiting.pop()
        if i not in found and not end.match(program.instructions[i]):
            found.add(i)
            waiting += edges[i]
    return [program.instructions[i] for i in sorted(found)]
