"""What a launch sees: its node, the rows of the step, the memory it works in, and the machine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from pyruntime.ops.cache import KvCache
from pyruntime.ops.gpu.choose import Choices
from pyruntime.ops.gpu.device import GpuInfo as GpuInfo
from pyruntime.ops.gpu.workspace import Workspace
from pyruntime.spec import Rope

# kernel, grid, arguments, constants, warps, stages, whether it starts early
Launcher = Callable[[Any, tuple[int, ...], Sequence[Any], Mapping[str, Any], int, int, bool], None]


def launch_kernel(
    kernel: Any,
    grid: tuple[int, ...],
    arguments: Sequence[Any],
    constants: Mapping[str, Any],
    num_warps: int,
    num_stages: int,
    early: bool,
) -> None:
    """Launch a Triton kernel on the current stream."""
    options: dict[str, Any] = {"num_warps": num_warps, "num_stages": num_stages}
    if early:
        options["launch_pdl"] = True
    kernel[grid](*arguments, **constants, **options)


@dataclass(frozen=True, slots=True)
class GpuView:
    """The rows that a node works on. Every tensor is static memory; the first `num_rows` or `num_sequences` count.

    `decode`: sequence i has the one row i, and rows beyond the step's own are padding on a page that nobody owns.
    `longest`: the most rows that a sequence of the step has. Rows of a sequence stand together, positions ascending,
    but where only wanted rows are computed they need not be neighbours: masks follow `positions`.
    """

    num_rows: int
    num_sequences: int
    longest: int
    decode: bool
    token_ids: torch.Tensor  # [rows] int32
    positions: torch.Tensor  # [rows] int32
    sequences: torch.Tensor  # [rows] int32, the sequence of each row
    starts: torch.Tensor  # [sequences + 1] int32, first row of each sequence
    contexts: torch.Tensor  # [sequences] int32, positions in the cache once the step has written its own
    page_table: torch.Tensor  # [sequences, pages] int32
    index: torch.Tensor  # [rows] int32, their numbers among all rows of the step


class RotaryTables(Protocol):
    """Tables of cosines and sines by rope."""

    def tables(self, rope: Rope) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin, float32 [positions, rope.dim / 2], times the rope's attention factor."""
        ...


@dataclass(frozen=True, slots=True)
class GpuNode:
    """A node as `on_gpu` of its stem sees it, once, when the plan is made.

    `weights` are arranged as the stem's `layouts` says, on the device. `compiled` is the module with the CUDA C++
    kernels, or None where it was not built.
    """

    name: str
    weights: Mapping[str, torch.Tensor]
    dtype: torch.dtype
    device: torch.device
    info: GpuInfo
    choices: Choices
    compiled: Any = None


@dataclass(frozen=True, slots=True)
class Frame:
    """One node in one step. `inputs` and `outputs` are [rows, width], rows contiguous, in static memory.

    Outputs of qkv_rope and attention are in the plan's dtype, all others float32. Nothing here may be read on the host.
    """

    view: GpuView
    inputs: tuple[torch.Tensor, ...]
    outputs: tuple[torch.Tensor, ...]
    cache: KvCache
    info: GpuInfo
    workspace: Workspace
    rotaries: RotaryTables
    launcher: Launcher = field(default=launch_kernel)

    def launch(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        *arguments: Any,
        num_warps: int = 4,
        num_stages: int = 3,
        **constants: Any,
    ) -> None:
        """Launch a Triton kernel; PDL is filled in where the kernel has that constant."""
        early = self.info.has_dependent_launch and "PDL" in kernel.arg_names
        if "PDL" in kernel.arg_names:
            constants["PDL"] = early
        self.launcher(kernel, grid, arguments, constants, num_warps, num_stages, early)

    def scratch(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Memory with undefined values until the node's last launch."""
        return self.workspace.scratch(shape, dtype)

    def counters(self, count: int) -> torch.Tensor:
        """`count` int32 zeros, which the launch must leave as zeros."""
        return self.workspace.counters(count)

    def rotary(self, rope: Rope) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin, float32 [positions, rope.dim / 2], for every position that the cache can hold."""
        return self.rotaries.tables(rope)


# a node's work in one step
Launch = Callable[[Frame], None]
