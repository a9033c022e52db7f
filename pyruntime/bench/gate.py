"""No speed without a green gate: a plan's logits against the same model in float64, or float32 for half precision."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import torch

from pyruntime.checkpoint import Model
from pyruntime.engine.memory import available_memory
from pyruntime.errors import RunError
from pyruntime.graph import LOGITS, Graph, build
from pyruntime.ops.cache import KvCache
from pyruntime.ops.step import SequenceSlice, Step, make_step
from pyruntime.ops.table import OPS
from pyruntime.plan import DTYPES, Plan

# whole-model limits: the float32 one is that of a matmul, half precision rounds every product's input
LIMITS: Final = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 5e-4}
_PAGE_SIZE: Final = 16
# tokens of the two sequences: the first one is longer than a block of the attention kernels
_LENGTHS: Final = (70, 5)
_PAGES_EACH: Final = -(-max(_LENGTHS) // _PAGE_SIZE)
_NUM_PAGES: Final = _PAGES_EACH * len(_LENGTHS)
# of each sequence, the tokens that come one by one: first both together, then the first sequence alone
_DECODED: Final = (3, 2)


@dataclass(frozen=True, slots=True)
class GateResult:
    """Normalised mean squared error, its limit, and the dtype of the reference it was taken against."""

    nmse: float
    limit: float
    oracle: str

    def line(self) -> str:
        """One line for people."""
        return f"gate: NMSE {self.nmse:.1e} against {self.oracle} (limit {self.limit:.0e})"


def check_plan(plan: Plan, model: Model) -> GateResult:
    """Compare `plan` with the unfused reference on two fixed sequences of different length.

    The plan takes the steps that are timed: a chunk of prompts, a new token for each sequence, and one for one of them;
    the reference computes all at once. It reads the weights of one op at a time, so a model that fits once can be
    checked, in float64; where that does not fit, in float32 for a plan of half precision. Raises RunError NUMERICS
    beyond the limit, RunError MEMORY where no reference fits.
    """
    limit, graph = LIMITS[plan.dtype], build(model.spec)
    dtype = _oracle_dtype(plan, graph)
    sequences = _sequences(model)
    nmse = nmse_of(_found(plan, sequences), _reference(graph, model, sequences, DTYPES[dtype]))
    # written so that a NaN fails
    if not nmse <= limit:
        raise RunError("NUMERICS", f"the plan's logits have an NMSE of {nmse:.1e} against {dtype}; at most {limit:.0e}")
    return GateResult(nmse, limit, dtype)


def nmse_of(found: torch.Tensor, expected: torch.Tensor) -> float:
    """mean((found - expected)^2) / mean(expected^2), in float64; the two may be on different devices."""
    found, expected = found.cpu().double(), expected.cpu().double()
    return float((found - expected).square().mean() / expected.square().mean())


def _oracle_dtype(plan: Plan, graph: Graph) -> str:
    """The most exact dtype whose largest op fits in half of the memory; the other half is for what is computed."""
    names = ("float64", "float32") if plan.dtype.itemsize < torch.float32.itemsize else ("float64",)
    available = available_memory()
    if available is None:
        return names[0]
    largest = max(sum(math.prod(shape) for shape in node.attrs.weight_shapes().values()) for node in graph.nodes)
    for name in names:
        needed = largest * DTYPES[name].itemsize * 2
        if needed <= available:
            return name
    raise RunError(
        "MEMORY",
        f"checking the results needs {needed / 2**30:.2f} GiB, twice the largest weights in {name}; "
        f"{available / 2**30:.2f} GiB are available, and no time is printed without the check",
    )


def _sequences(model: Model) -> list[list[int]]:
    # spread over the vocabulary, the same for every plan
    lengths = [min(length, model.spec.max_position) for length in _LENGTHS]
    return [[(k + i) * 7919 % model.spec.vocab_size for k in range(length)] for i, length in enumerate(lengths)]


def _slice(number: int, sequence: list[int], start: int, end: int) -> SequenceSlice:
    pages = range(number * _PAGES_EACH, (number + 1) * _PAGES_EACH)
    return SequenceSlice(sequence[start:end], start, pages, range(end - start))


def _found(plan: Plan, sequences: list[list[int]]) -> torch.Tensor:
    """Logits of the plan, sequence by sequence: a chunk, then tokens one by one."""
    cache = plan.new_cache(_NUM_PAGES, _PAGE_SIZE)
    done = [0] * len(sequences)
    logits: list[list[torch.Tensor]] = [[] for _ in sequences]
    for left in range(max(_DECODED), -1, -1):
        ends = [len(each) - min(left, own, len(each) - 1) for each, own in zip(sequences, _DECODED, strict=True)]
        moving = [i for i, end in enumerate(ends) if end > done[i]]
        slices = [_slice(i, sequences[i], done[i], ends[i]) for i in moving]
        rows = plan.run(make_step(slices, cache, plan.device)).split([ends[i] - done[i] for i in moving])
        for i, own in zip(moving, rows, strict=True):
            logits[i].append(own)
        done = ends
    return torch.cat([part for own in logits for part in own])


def _reference(graph: Graph, model: Model, sequences: list[list[int]], dtype: torch.dtype) -> torch.Tensor:
    """Logits of the reference, which forgets the weights of each op before it reads the next one's."""
    slices = [_slice(i, each, 0, len(each)) for i, each in enumerate(sequences)]
    step: Step = make_step(slices, KvCache(graph.kv_shapes(), _NUM_PAGES, _PAGE_SIZE, dtype))
    buffers: dict[str, torch.Tensor] = {}
    with torch.inference_mode():
        for node in graph.nodes:
            (run,) = (each.run for each in OPS[node.op] if each.target == "reference")
            assert run is not None
            weights = {role: model.weights[name].read().to(dtype) for role, name in node.weights}
            outputs = run(node.attrs, weights, [buffers[name] for name in node.inputs], step.view(node.rows))
            buffers.update(zip(node.outputs, outputs, strict=True))
    return buffers[LOGITS]
