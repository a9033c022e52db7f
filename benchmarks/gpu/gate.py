"""No time without a right result: plans against the unfused reference in float32 or float64, on the same device."""

from __future__ import annotations

from typing import Final

import torch

from benchmarks.gpu.runner import PAGE_SIZE, gpu_of, num_pages
from pyruntime.bench import nmse_of
from pyruntime.checkpoint import Model
from pyruntime.errors import RunError
from pyruntime.graph import LOGITS, build
from pyruntime.ops.cache import KvCache
from pyruntime.ops.gpu.batch import GREEDY
from pyruntime.ops.step import SequenceSlice, make_step
from pyruntime.ops.table import OPS
from pyruntime.plan import Plan

# a whole model in half precision, as in pyruntime.bench.gate; the float32 one is that of a matrix product
LIMITS: Final = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 5e-4}
# another implementation rounds elsewhere: both are this far from the truth
OTHERS_LIMIT: Final = 2e-3
_NUM_DECODED: Final = 2


def wrong(what: str, nmse: float, limit: float) -> RunError:
    """The error that ends a run."""
    return RunError(
        "NUMERICS", f"{what} has an NMSE of {nmse:.1e}; at most {limit:.0e}: no time is printed for a wrong result"
    )


def check(what: str, found: torch.Tensor, expected: torch.Tensor, limit: float) -> float:
    """The NMSE of `found`. Raises RunError NUMERICS above `limit`, and for a NaN."""
    nmse = nmse_of(found, expected)
    if not nmse <= limit:
        raise wrong(what, nmse, limit)
    return nmse


def check_plan(
    what: str, plan: Plan, model: Model, lengths: tuple[int, ...], dtype: torch.dtype = torch.float32
) -> float:
    """NMSE of a plan's logits: a ragged step of prompts, then new tokens of each through the decode form.

    `lengths` are those of the sequences, new tokens included.

    The reference computes everything at once in `dtype`, one op after the other, and reads the weights of one op at a
    time. Raises RunError NUMERICS.
    """
    sequences = [[(k + i) * 7919 % model.spec.vocab_size for k in range(n)] for i, n in enumerate(lengths)]
    return check(what, _found(plan, sequences), _expected(model, sequences, plan.device, dtype), LIMITS[plan.dtype])


def _pages(sequences: list[list[int]]) -> list[range]:
    each = num_pages(max(map(len, sequences)))
    return [range(i * each, (i + 1) * each) for i in range(len(sequences))]


def _found(plan: Plan, sequences: list[list[int]]) -> torch.Tensor:
    """Logits of all rows, sequence by sequence."""
    pages = _pages(sequences)
    cache = plan.new_cache(pages[-1].stop, PAGE_SIZE)
    ends = [len(each) - _NUM_DECODED for each in sequences]
    slices = [SequenceSlice(s[:end], 0, p, range(end)) for s, end, p in zip(sequences, ends, pages, strict=True)]
    rows = list(plan.run(make_step(slices, cache, plan.device)).split(ends))
    gpu = gpu_of(plan)
    for k in range(_NUM_DECODED):
        slices = [
            SequenceSlice(s[end + k : end + k + 1], end + k, p, [0])
            for s, end, p in zip(sequences, ends, pages, strict=True)
        ]
        with torch.inference_mode():
            gpu.decode(slices, [GREEDY] * len(slices), cache)
            decoded = gpu.decoded_logits(len(slices)).clone()
        rows = [torch.cat((own, more)) for own, more in zip(rows, decoded.split(1), strict=True)]
    return torch.cat(rows)


def _expected(model: Model, sequences: list[list[int]], device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    graph, pages = build(model.spec), _pages(sequences)
    cache = KvCache(graph.kv_shapes(), pages[-1].stop, PAGE_SIZE, dtype, device)
    step = make_step(
        [SequenceSlice(s, 0, p, range(len(s))) for s, p in zip(sequences, pages, strict=True)], cache, device
    )
    buffers: dict[str, torch.Tensor] = {}
    with torch.inference_mode():
        for node in graph.nodes:
            (run,) = (each.run for each in OPS[node.op] if each.target == "reference")
            assert run is not None
            weights = {role: model.weights[name].read().to(dtype) for role, name in node.weights}
            inputs = [buffers[name] for name in node.inputs]
            buffers.update(zip(node.outputs, run(node.attrs, weights, inputs, step.view(node.rows)), strict=True))
    return buffers[LOGITS]
