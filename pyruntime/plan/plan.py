"""The plan: a graph bound to one target, with every choice made, every weight in place and every cost known."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pyruntime.errors import UsageError
from pyruntime.graph import Cost, SequenceWork, cost_of
from pyruntime.ops.cache import KvCache, KvLayout, KvShape
from pyruntime.ops.layout import PANEL
from pyruntime.ops.program import Program, ProgramRun
from pyruntime.ops.step import Rows, Step
from pyruntime.plan.gpu import GpuRunner
from pyruntime.plan.step import PlanStep, Watch


@dataclass(frozen=True, slots=True)
class Plan:
    """Steps in execution order over `num_places` buffer places. Made by `lower`; nothing is chosen after that.

    `segments` are the same steps in runs of neighbours that all belong to `program` (one call each), or do not. `gpu`
    runs them on target cuda, where decode steps have a form of their own.
    """

    target: str
    dtype: torch.dtype
    device: torch.device
    steps: tuple[PlanStep, ...]
    num_places: int
    vocab_size: int
    max_position: int
    kv_shapes: tuple[KvShape, ...]
    program: Program | None = None
    segments: tuple[tuple[PlanStep, ...], ...] = ()
    gpu: GpuRunner | None = None

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights in memory; shared ones count once."""
        tensors = {w.data_ptr(): w for step in self.steps for w in step.weights.values()}
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes that one token leaves in the cache, over all kept attentions."""
        return sum(shape.num_values for shape in self.kv_shapes) * self.dtype.itemsize

    def new_cache(self, num_pages: int, page_size: int) -> KvCache:
        """An empty cache for this plan. Raises UsageError for a page size that the plan's kernels cannot read."""
        if (self.program is not None or self.gpu is not None) and page_size % PANEL:
            raise UsageError(
                "CONFIG", f"page_size is {page_size}; target {self.target} needs a multiple of {PANEL} tokens"
            )
        if self.gpu is not None:
            # padding rows of a decode step need a page, too
            return KvCache(self.kv_shapes, num_pages + 1, page_size, self.dtype, self.device, KvLayout.TOKENS)
        return KvCache(self.kv_shapes, num_pages, page_size, self.dtype, self.device)

    def run(self, step: Step, watch: Watch | None = None) -> torch.Tensor:
        """Compute one step and give the logits of its wanted rows, [wanted, vocab].

        A step that wants no row stops where the tail begins. `watch` is shown every node's outputs; on target cpu each
        node is then a call of its own, and the outputs are views that later nodes write over. It must not run this
        plan. Raises UsageError CACHE for a cache that another kind of plan made, and on target cpu UsageError STEP for
        ids, pages and offsets out of bounds.
        """
        self.check_cache(step.cache)
        with torch.inference_mode():
            if self.gpu is not None:
                return self.gpu.run(step, watch)
            if self.program is None:
                return self._run_in_python(step, watch)
            with self.program.start(step) as run:
                for segment in self.segments if watch is None else [(each,) for each in self.steps]:
                    _run_segment(segment, run)
                    if watch is not None and step.num_rows(segment[0].node.rows) > 0:
                        watch(segment[0], tuple(_buffers(run, segment[0], segment[0].outputs)))
                return run.logits

    def check_cache(self, cache: KvCache) -> None:
        """Raise UsageError CACHE for a cache that another kind of plan made."""
        found = (cache.shapes, cache.dtype, cache.device, cache.layout)
        layout = KvLayout.HEADS if self.gpu is None else KvLayout.TOKENS
        needed = (self.kv_shapes, self.dtype, self.device, layout)
        if found != needed:
            raise UsageError(
                "CACHE", f"the cache is made for {found}; the plan needs {needed}: make it with plan.new_cache"
            )

    def _run_in_python(self, step: Step, watch: Watch | None) -> torch.Tensor:
        places: list[torch.Tensor | None] = [None] * self.num_places
        for each in self.steps:
            view = step.view(each.node.rows)
            if view.num_rows == 0:
                return torch.empty((0, self.vocab_size), device=self.device)
            inputs = [buffer for place in each.inputs if (buffer := places[place]) is not None]
            assert each.implementation.run is not None
            outputs = each.implementation.run(each.node.attrs, each.weights, inputs, view)
            if watch is not None:
                watch(each, outputs)
            for place, buffer in zip(each.outputs, outputs, strict=True):
                places[place] = buffer
        logits = places[self.steps[-1].outputs[0]]
        assert logits is not None
        return logits

    def cost(self, work: Sequence[SequenceWork]) -> dict[str, Cost]:
        """Cost of each node for one step over `work`, by node name. Attention counts visible positions only."""
        return cost_of([each.node for each in self.steps], work, self.dtype.itemsize)

    def total_cost(self, work: Sequence[SequenceWork]) -> Cost:
        """Cost of the whole step over `work`."""
        return sum(self.cost(work).values(), Cost())

    def decode_cost(self, batch: int, context: int) -> Cost:
        """Cost of one new token for each of `batch` sequences that have `context` tokens before it."""
        return self.total_cost([SequenceWork(context, 1)] * batch)

    def prefill_cost(self, length: int, wanted: int = 1) -> Cost:
        """Cost of a prompt of `length` tokens whose last `wanted` logits are asked for."""
        return self.total_cost([SequenceWork(0, length, wanted)])

    def explain(self) -> str:
        """One line a step: what runs it, on which rows, why, and what it weighs."""
        width = max(len(each.node.name) for each in self.steps)
        lines = [
            f"{each.node.name:<{width}}  {each.node.op:<10} {each.node.rows:<6} {_megabytes(_weight_bytes(each)):>9} MB"
            f"  {each.implementation.target} ({each.reason})"
            for each in self.steps
        ]
        if self.gpu is not None:
            lines.append(self.gpu.explain())
        slots = f"{len(self.kv_shapes)} KV slots, {self.kv_bytes_per_token} KV bytes per token"
        return "\n".join([*lines, f"{len(self.steps)} steps, {slots}, {_megabytes(self.weight_bytes)} MB of weights"])


def _run_segment(segment: Sequence[PlanStep], run: ProgramRun) -> None:
    """Run neighbours of a plan with a program: in one call, or the one step that Python runs."""
    first, last = segment[0], segment[-1]
    if first.native is not None and last.native is not None:
        run.execute(first.native[0], last.native[1])
        return
    view = run.step.view(first.node.rows)
    if view.num_rows == 0:
        return
    assert first.implementation.run is not None
    inputs = _buffers(run, first, first.inputs)
    outputs = first.implementation.run(first.node.attrs, first.weights, inputs, view)
    for buffer, output in zip(_buffers(run, first, first.outputs), outputs, strict=True):
        buffer.copy_(output)


def _buffers(run: ProgramRun, step: PlanStep, places: Sequence[int]) -> list[torch.Tensor]:
    attrs = step.node.attrs
    widths = attrs.in_widths() if places is step.inputs else attrs.out_widths()
    # what a gather reads has a row for each of the step's
    rows = Rows.ALL if step.node.op == "gather" and places is step.inputs else step.node.rows
    return [run.buffer(place, rows, width) for place, width in zip(places, widths, strict=True)]


def _weight_bytes(step: PlanStep) -> int:
    return sum(weight.numel() * weight.element_size() for weight in step.weights.values())


def _megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:.{3 if num_bytes and math.log10(num_bytes) < 6 else 1}f}"
