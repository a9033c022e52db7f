"""Each step of a plan held against the float64 reference of that step alone, on what the step itself read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import torch

from pyruntime.checkpoint import Model
from pyruntime.graph import Graph, Node
from pyruntime.ops.cache import KvCache
from pyruntime.ops.qkv_rope import QkvRopeAttrs
from pyruntime.ops.step import Rows, SequenceSlice, Span, Step, make_step
from pyruntime.ops.table import OPS

PAGE_SIZE: Final = 16
# normalised mean square errors that are no mistake: what float32 sums and results of 16 bits are allowed
_ELEMENTWISE: Final = ("embed", "norm", "add", "gather")
_ELEMENTWISE_LIMIT: Final = 1e-7
_SUMMED_LIMIT: Final = 1e-6
_NARROW_LIMIT: Final = 5e-4


def limit_of(op: str, dtype: torch.dtype) -> float:
    """The largest NMSE of an op that is no mistake."""
    if dtype.itemsize < torch.float32.itemsize:
        return _NARROW_LIMIT
    return _ELEMENTWISE_LIMIT if op in _ELEMENTWISE else _SUMMED_LIMIT


@dataclass(slots=True)
class Found:
    """What was seen of each op: its largest NMSE, and the first thing that is wrong with it."""

    nmse: dict[str, float] = field(default_factory=dict)
    wrong: dict[str, str] = field(default_factory=dict)

    def saw(self, op: str, nmse: float, limit: float, where: str) -> bool:
        """One result; whether it is right."""
        # a NaN must not hide behind a number
        self.nmse[op] = max(self.nmse.get(op, 0.0), math.inf if math.isnan(nmse) else nmse)
        if nmse <= limit:
            return True
        self.fail(op, f"{where}: NMSE {nmse:.1e}, at most {limit:.0e}")
        return False

    def fail(self, op: str, reason: str) -> None:
        """Something wrong; the first one counts, as others may follow from it."""
        self.wrong.setdefault(op, reason)


class Judge:
    """The reference of one graph in float64 on the CPU, one step behind the plan that is judged."""

    def __init__(self, graph: Graph, model: Model, num_pages: int, dtype: torch.dtype, found: Found) -> None:
        self._nodes = {node.name: node for node in graph.nodes}
        self._model = model
        self._cache = KvCache(graph.kv_shapes(), num_pages, PAGE_SIZE, torch.float64)
        self._dtype = dtype
        self.found = found

    def of(self, graph: Graph) -> Judge:
        """A judge of another form of the graph, which goes on with the same cache."""
        other = Judge(graph, self._model, self._cache.num_pages, self._dtype, self.found)
        other._cache = self._cache
        return other

    def begin(self, slices: Sequence[SequenceSlice], own: KvCache) -> None:
        """Start a step of the plan, whose cache is `own`."""
        self._step, self._own_step = make_step(slices, self._cache), make_step(slices, own, own.device)

    def expected(self, name: str, inputs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Outputs of the node `name` of what it read, float64 on the CPU."""
        node = self._nodes[name]
        (run,) = (each.run for each in OPS[node.op] if each.target == "reference")
        assert run is not None
        weights = {role: self._model.weights[key].read().double() for role, key in node.weights}
        with torch.inference_mode():
            return run(node.attrs, weights, [each.cpu().double() for each in inputs], self._step.view(node.rows))

    def judge(
        self, name: str, inputs: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, ...] | None:
        """Compare the outputs of a node, and the cache behind one that writes it; None where all of it is right.

        Else what was expected, which the plan must go on with so that no other node is blamed; its cache is mended.
        """
        node, right = self._nodes[name], self.expected(name, inputs)
        named = [(name, found, expected) for found, expected in zip(outputs, right, strict=True)]
        limit, fine = limit_of(node.op, self._dtype), True
        for where, found, expected in (*named, *self._written(node)):
            fine &= self.found.saw(node.op, nmse_of(found, expected), limit, where)
        slot = _written_slot(node)
        if slot is not None:
            # whoever reads the cache next is judged by what the plan left there
            self._follow(slot, *((self._own_step, self._step) if fine else (self._step, self._own_step)))
        return None if fine else right

    def _written(self, node: Node) -> list[tuple[str, torch.Tensor, torch.Tensor]]:
        slot = _written_slot(node)
        if slot is None:
            return []
        pairs = [self._contexts(step, slot) for step in (self._own_step, self._step)]
        kinds = [f"{node.name}, {kind} of the cache" for kind in ("keys", "values")]
        # slim attention has no values
        return list(zip(kinds, *pairs, strict=False))

    def _contexts(self, step: Step, slot: int) -> list[torch.Tensor]:
        per_span = [step.cache.read(slot, span.pages, span.context) for span in step.view(Rows.ALL).spans]
        return [torch.cat(parts) for parts in zip(*per_span, strict=True)]

    def _follow(self, slot: int, good: Step, other: Step) -> None:
        """Copy the contexts of a slot from the cache of one step to that of the other."""
        for mine, theirs in zip(good.view(Rows.ALL).spans, other.view(Rows.ALL).spans, strict=True):
            left = [each.to(other.cache.device) for each in good.cache.read(slot, mine.pages, mine.context)]
            other.cache.write(slot, _places(theirs), left[0], left[1] if len(left) > 1 else None)


def nmse_of(found: torch.Tensor, expected: torch.Tensor) -> float:
    """mean((found - expected)^2) / mean(expected^2), of nothing 0; the mean itself where all that is expected is 0."""
    if not expected.numel():
        return 0.0
    wide = expected.cpu().double()
    off, scale = (found.cpu().double() - wide).square().mean(), wide.square().mean()
    return float(off / scale) if scale > 0 else float(off)


def _written_slot(node: Node) -> int | None:
    return node.attrs.slot if isinstance(node.attrs, QkvRopeAttrs) and node.attrs.cache else None


def _places(span: Span) -> torch.Tensor:
    positions = torch.arange(span.context, device=span.pages.device)
    return span.pages[positions // PAGE_SIZE] * PAGE_SIZE + positions % PAGE_SIZE
