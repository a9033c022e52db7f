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
from pyruntime.ops.cache import KvCache, KvShape
from pyruntime.ops.qkv_rope import QkvRopeAttrs
from pyruntime.ops.step import SequenceSlice, Step, make_step
from pyruntime.ops.table import OPS
from pyruntime.plan import DTYPES, Plan

# whole-model limits: the float32 one is that of a matmul, half precision rounds every product's input
LIMITS: Final = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 5e-4}
_NUM_TOKENS: Final = 32
_PAGE_SIZE: Final = 16
_NUM_PAGES: Final = _NUM_TOKENS // _PAGE_SIZE


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
    """Compare `plan` with the unfused reference on a fixed prompt.

    The reference reads the weights of one op at a time, so a model that fits once can be checked. It computes in
    float64; where that does not fit, in float32 for a plan of half precision. Raises RunError NUMERICS beyond the
    limit, RunError MEMORY where no reference fits.
    """
    limit, graph = LIMITS[plan.dtype], build(model.spec)
    dtype = _oracle_dtype(plan, graph)
    slices = _prompt(model)
    found = plan.run(make_step(slices, plan.new_cache(_NUM_PAGES, _PAGE_SIZE), plan.device))
    nmse = nmse_of(found, _reference(graph, model, slices, DTYPES[dtype]))
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


def _prompt(model: Model) -> list[SequenceSlice]:
    count = min(_NUM_TOKENS, model.spec.max_position)
    # spread over the vocabulary, the same for every plan
    ids = [i * 7919 % model.spec.vocab_size for i in range(count)]
    return [SequenceSlice(ids, 0, range(_NUM_PAGES), range(count))]


def _reference(graph: Graph, model: Model, slices: list[SequenceSlice], dtype: torch.dtype) -> torch.Tensor:
    """Logits of the reference, which forgets the weights of each op before it reads the next one's."""
    shapes = tuple(
        KvShape(node.attrs.attention.num_kv_heads, node.attrs.attention.head_dim)
        for node in graph.nodes
        if isinstance(node.attrs, QkvRopeAttrs) and node.attrs.cache
    )
    step: Step = make_step(slices, KvCache(shapes, _NUM_PAGES, _PAGE_SIZE, dtype))
    buffers: dict[str, torch.Tensor] = {}
    with torch.inference_mode():
        for node in graph.nodes:
            (run,) = (each.run for each in OPS[node.op] if each.target == "reference")
            assert run is not None
            weights = {role: model.weights[name].read().to(dtype) for role, name in node.weights}
            outputs = run(node.attrs, weights, [buffers[name] for name in node.inputs], step.view(node.rows))
            buffers.update(zip(node.outputs, outputs, strict=True))
    return buffers[LOGITS]
