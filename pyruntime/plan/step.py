"""One step of a plan."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from pyruntime.graph import Node
from pyruntime.ops.gpu.frame import Launch
from pyruntime.ops.table import Implementation


@dataclass(frozen=True, slots=True)
class PlanStep:
    """One node with the implementation that runs it, why, its weights, and the places of its buffers.

    `native` are the steps [begin, end) of the plan's C++ program that run it, `launch` what a GPU does for it; where
    both are None, PyTorch runs it.
    """

    node: Node
    implementation: Implementation
    reason: str
    weights: Mapping[str, torch.Tensor]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    native: tuple[int, int] | None = None
    launch: Launch | None = None


# shown every step of a plan and what it wrote
Watch = Callable[[PlanStep, tuple[torch.Tensor, ...]], None]
