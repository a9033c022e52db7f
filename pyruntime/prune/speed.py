"""How fast a decode step would be: from the bytes and operations of its graph and the rates of a machine."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pyruntime.errors import UsageError
from pyruntime.graph import Cost, SequenceWork, build, cost_of, fuse
from pyruntime.passes import kv_values_per_token
from pyruntime.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class Machine:
    """Rates that a step is bound by, in bytes and operations per second, and what each node costs besides.

    The default counts bytes alone, which is what decides at small batches; ratios of times need no true rates then.
    """

    read_bandwidth: float = 1.0
    multiply_rate: float = math.inf
    node_seconds: float = 0.0

    def __post_init__(self) -> None:
        if not (self.read_bandwidth > 0 and self.multiply_rate > 0 and 0 <= self.node_seconds < math.inf):
            raise UsageError("MACHINE", f"{self} cannot be; expected rates above 0 and seconds from 0")


def decode_seconds(spec: ModelSpec, batch: int, context: int, itemsize: int, machine: Machine = Machine()) -> float:
    """Seconds of one decode step: for each node of the fused graph the longer of reading and computing, and a constant.

    `batch` sequences have `context` tokens each before the new one; values take `itemsize` bytes.
    """
    nodes = fuse(build(spec)).nodes
    costs = cost_of(nodes, [SequenceWork(context, 1)], itemsize, copies=batch)
    bound = sum(max(c.num_bytes / machine.read_bandwidth, c.flops / machine.multiply_rate) for c in costs.values())
    return bound + machine.node_seconds * len(nodes)


def decode_cost(spec: ModelSpec, batch: int, context: int, itemsize: int) -> Cost:
    """Bytes and operations of that step."""
    nodes = fuse(build(spec)).nodes
    return sum(cost_of(nodes, [SequenceWork(context, 1)], itemsize, copies=batch).values(), Cost())


def kv_bytes(spec: ModelSpec, batch: int, context: int, itemsize: int) -> int:
    """Bytes of the cache of `batch` sequences of `context` tokens; a window frees nothing."""
    return kv_values_per_token(spec) * itemsize * batch * context
