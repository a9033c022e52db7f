"""The steps of a plan that C++ runs in one call, and the memory that they work in."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace

import torch

from pyruntime.errors import UsageError
from pyruntime.ops import memory, rope
from pyruntime.ops._native import Native
from pyruntime.ops.native_step import NativeStep
from pyruntime.ops.step import Rows, Step
from pyruntime.spec import Rope


class Program:
    """Steps in C++ over numbered places; `widths` are the values per row of each place for all and for wanted rows.

    The last place holds the logits. Runs of several threads follow one another: they share one team and one workspace.
    """

    def __init__(self, native: Native, *, vocab_size: int, num_slots: int, widths: Sequence[tuple[int, int]]) -> None:
        self._native = native.module.Program(
            isa=native.isa,
            num_threads=native.num_threads,
            vocab_size=vocab_size,
            num_slots=num_slots,
            widths=list(widths),
        )
        self._vocab_size = vocab_size
        self._logits_place = len(widths) - 1
        self._rotaries: dict[tuple[Rope, bool], int] = {}
        # C++ holds addresses only
        self._kept: list[torch.Tensor] = []
        self._lock = threading.Lock()
        self._workspace = torch.empty(0)

    @property
    def num_steps(self) -> int:
        """Steps added so far."""
        return int(self._native.num_steps)

    @property
    def num_threads(self) -> int:
        """Threads that walk the steps."""
        return int(self._native.num_threads)

    def rotary(self, spec: Rope, wanted: bool) -> int:
        """Number of the table of angles of a rope for the rows of a view; made when it is first asked for."""
        key = (spec, wanted)
        if key not in self._rotaries:
            frequencies = rope.inverse_frequencies(spec).cpu().contiguous()
            factor = 1.0 if spec.attention_factor is None else spec.attention_factor
            where = self.keep(frequencies)
            fields = SimpleNamespace(half=frequencies.numel(), frequencies=where, factor=factor, wanted=wanted)
            self._rotaries[key] = self._native.add_rotary(fields)
        return self._rotaries[key]

    def keep(self, tensor: torch.Tensor) -> tuple[int, int]:
        """Address and number of elements of a tensor that lives as long as the program."""
        self._kept.append(tensor)
        return tensor.data_ptr(), tensor.numel()

    def add(self, step: NativeStep, weights: Sequence[torch.Tensor]) -> None:
        """Append a step that reads `weights`."""
        self._kept.extend(weights)
        self._native.add(step.op, step.fields)

    @contextmanager
    def start(self, step: Step) -> Iterator[ProgramRun]:
        """A run over the rows of `step`; nothing else runs until the context ends."""
        rows, wanted = step.num_rows(Rows.ALL), step.num_rows(Rows.WANTED)
        with self._lock:
            needed = self._native.workspace_bytes(rows, wanted)
            if needed > self._workspace.numel() * 4:
                self._workspace = torch.empty(0)
                self._workspace = memory.alloc((-(-needed // 4),), torch.float32)
            logits = memory.alloc((wanted, self._vocab_size), torch.float32)
            yield ProgramRun(self._native, step, self._workspace, logits, self._logits_place)


@dataclass(frozen=True, slots=True)
class ProgramRun:
    """One step of the engine on its way through a program."""

    native: object
    step: Step
    workspace: torch.Tensor  # [floats]
    logits: torch.Tensor  # [wanted, vocab]
    logits_place: int

    def execute(self, begin: int, end: int) -> None:
        """Run the program's steps [begin, end) in one call; one whose view has no row ends it."""
        slices = [(each.token_ids, each.start, each.pages, each.wanted) for each in self.step.slices]
        workspace = (self.workspace.data_ptr(), self.workspace.numel() * 4)
        logits = (self.logits.data_ptr(), self.logits.numel())
        try:
            self.native.run(begin, end, slices, self.step.cache, workspace, logits)  # type: ignore[attr-defined]
        except ValueError as error:
            raise UsageError("STEP", str(error)) from None

    def buffer(self, place: int, rows: Rows, width: int) -> torch.Tensor:
        """What a place holds, [rows, width]: a view, valid until the next run."""
        if place == self.logits_place:
            return self.logits
        counts = self.step.num_rows(Rows.ALL), self.step.num_rows(Rows.WANTED)
        regions = self.native.regions(*counts)  # type: ignore[attr-defined]
        num_rows = self.step.num_rows(rows)
        first = regions[place][0] // 4
        return self.workspace[first : first + num_rows * width].view(num_rows, width)
