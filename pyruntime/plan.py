"""The plan: a graph bound to one target, with every choice made, every weight in place and every cost known."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch

from pyruntime.checkpoint import Model
from pyruntime.errors import UsageError
from pyruntime.graph import LOGITS, Cost, Graph, Node, SequenceWork, cost_of, verify
from pyruntime.ops.cache import KvCache, KvShape
from pyruntime.ops.qkv_rope import QkvRopeAttrs
from pyruntime.ops.step import Step
from pyruntime.ops.table import OPS, Implementation

TARGETS: Final = ("reference",)
DTYPES: Final = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True, slots=True)
class PlanStep:
    """One node with the implementation that runs it, why, its weights, and the places of its buffers."""

    node: Node
    implementation: Implementation
    reason: str
    weights: Mapping[str, torch.Tensor]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """Steps in execution order over `num_places` buffer places. Made by `lower`; nothing is chosen after that."""

    target: str
    dtype: torch.dtype
    device: torch.device
    steps: tuple[PlanStep, ...]
    num_places: int
    vocab_size: int
    max_position: int
    kv_shapes: tuple[KvShape, ...]

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights in memory; shared ones count once."""
        tensors = {w.data_ptr(): w for step in self.steps for w in step.weights.values()}
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes that one token leaves in the cache, over all kept attentions."""
        values = sum(2 * shape.num_kv_heads * shape.head_dim for shape in self.kv_shapes)
        return values * self.dtype.itemsize

    def new_cache(self, num_pages: int, page_size: int) -> KvCache:
        """An empty cache for this plan."""
        return KvCache(self.kv_shapes, num_pages, page_size, self.dtype, self.device)

    def run(
        self, step: Step, watch: Callable[[PlanStep, tuple[torch.Tensor, ...]], None] | None = None
    ) -> torch.Tensor:
        """Compute one step and give the logits of its wanted rows, [wanted, vocab].

        A step that wants no row stops where the tail begins. `watch` is shown every node's outputs.
        """
        places: list[torch.Tensor | None] = [None] * self.num_places
        with torch.inference_mode():
            for each in self.steps:
                view = step.view(each.node.rows)
                if view.num_rows == 0:
                    break
                inputs = [buffer for place in each.inputs if (buffer := places[place]) is not None]
                outputs = each.implementation.run(each.node.attrs, each.weights, inputs, view)
                if watch is not None:
                    watch(each, outputs)
                for place, buffer in zip(each.outputs, outputs, strict=True):
                    places[place] = buffer
            else:
                logits = places[self.steps[-1].outputs[0]]
                assert logits is not None
                return logits
        return torch.empty((0, self.vocab_size), device=self.device)

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
        slots = f"{len(self.kv_shapes)} KV slots, {self.kv_bytes_per_token} KV bytes per token"
        return "\n".join([*lines, f"{len(lines)} steps, {slots}, {_megabytes(self.weight_bytes)} MB of weights"])


def lower(
    graph: Graph,
    model: Model,
    *,
    target: str = "reference",
    dtype: str = "auto",
    device: str = "cpu",
    progress: Callable[[int], None] | None = None,
) -> Plan:
    """Bind `graph` to `target`: choose implementations, read the weights it needs and no other, place the buffers.

    `dtype` "auto" keeps the checkpoint's. `progress` is called with the bytes of each tensor read. Raises UsageError
    for an unknown target or dtype, and where the target cannot run a node.
    """
    verify(graph)
    # one target runs whole plans so far, so the best one is it
    why = "asked for" if target != "auto" else "auto: the one target that runs whole plans"
    target = "reference" if target == "auto" else target
    if target not in TARGETS:
        raise UsageError("TARGET", f"target {target!r} does not exist; expected one of {', '.join(TARGETS)}")
    name = model.dtype if dtype == "auto" else dtype
    if name not in DTYPES:
        raise UsageError("DTYPE", f"dtype {dtype!r} is not known; expected auto, {', '.join(DTYPES)}")
    torch_dtype = DTYPES[name]
    _check_device(device)
    choices = [_choose(node, target, torch_dtype, why) for node in graph.nodes]
    weights = _read(graph, model, torch_dtype, device, progress)
    places = _place(graph)
    steps = tuple(
        PlanStep(
            node=node,
            implementation=implementation,
            reason=reason,
            weights={role: weights[source] for role, source in node.weights},
            inputs=tuple(places[buffer] for buffer in node.inputs),
            outputs=tuple(places[buffer] for buffer in node.outputs),
        )
        for node, (implementation, reason) in zip(graph.nodes, choices, strict=True)
    )
    kv_shapes = tuple(
        KvShape(node.attrs.attention.num_kv_heads, node.attrs.attention.head_dim)
        for node in graph.nodes
        if isinstance(node.attrs, QkvRopeAttrs) and node.attrs.cache
    )
    return Plan(
        target=target,
        dtype=torch_dtype,
        device=torch.device(device),
        steps=steps,
        num_places=max(places.values()) + 1,
        vocab_size=model.spec.vocab_size,
        max_position=model.spec.max_position,
        kv_shapes=kv_shapes,
    )


def _check_device(device: str) -> None:
    try:
        torch.empty(0, device=device)
    # torch says the same thing with either, depending on how it was built
    except (RuntimeError, AssertionError) as error:
        why = str(error).partition("\n")[0]
        raise UsageError("DEVICE", f"device {device!r} cannot be used here ({why}); expected cpu, or cuda") from None


def _choose(node: Node, target: str, dtype: torch.dtype, why: str) -> tuple[Implementation, str]:
    """The target's own implementation, else the reference with the reason of each refusal."""
    refusals: list[str] = []
    for implementation in OPS[node.op]:
        why_not = implementation.refuses(node.attrs, dtype)
        if implementation.target == target and why_not is None:
            return implementation, why
        if implementation.target == target:
            refusals.append(f"{target} refused: {why_not}")
    reference = next(each for each in OPS[node.op] if each.target == "reference")
    return reference, "; ".join(refusals) or f"{target} has no {node.op}"


def _read(
    graph: Graph, model: Model, dtype: torch.dtype, device: str, progress: Callable[[int], None] | None
) -> dict[str, torch.Tensor]:
    names = dict.fromkeys(name for node in graph.nodes for _, name in node.weights)
    found: dict[str, torch.Tensor] = {}
    for name in names:
        weight = model.weights[name]
        found[name] = weight.read().to(device=device, dtype=dtype)
        if progress is not None:
            progress(weight.num_bytes)
    return found


def _place(graph: Graph) -> dict[str, int]:
    """A place for every buffer; a place is free again behind the last node that reads it."""
    consumers = graph.consumers()
    last_use = {buffer: nodes[-1].name for buffer, nodes in consumers.items()}
    places: dict[str, int] = {}
    free: list[int] = []
    count = 0
    for node in graph.nodes:
        # outputs first: an op may not write over what it still reads
        for buffer in node.outputs:
            if free:
                places[buffer] = free.pop()
            else:
                places[buffer] = count
                count += 1
        free.extend(places[b] for b in dict.fromkeys(node.inputs) if last_use[b] == node.name and b != LOGITS)
    return places


def _weight_bytes(step: PlanStep) -> int:
    return sum(weight.numel() * weight.element_size() for weight in step.weights.values())


def _megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:.{3 if num_bytes and math.log10(num_bytes) < 6 else 1}f}"
