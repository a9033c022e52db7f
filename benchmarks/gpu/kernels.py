"""Each node of a decode step by itself: by every backend, beside PyTorch, and beside the bytes that it must read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Final

import torch

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.clock import Run, captured
from benchmarks.gpu.nodes import distinct_runs
from benchmarks.gpu.record import Section
from benchmarks.gpu.runner import gpu_of
from benchmarks.gpu.settings import deep, merged, without_attentions
from benchmarks.gpu.torch_nodes import torch_run
from pyruntime.checkpoint import Model
from pyruntime.ops.attention import AttentionAttrs
from pyruntime.ops.attrs import Attrs
from pyruntime.ops.gpu.choose import Backend
from pyruntime.ops.head import HeadAttrs
from pyruntime.ops.linear import LinearAttrs
from pyruntime.ops.mlp import MlpAttrs
from pyruntime.ops.mlp_chain import MlpChainAttrs
from pyruntime.ops.qkv_rope import QkvRopeAttrs
from pyruntime.plan import Plan, PlanStep
from pyruntime.spec import MLP, Attention, ModelSpec

_WARMUP: Final = 1
# layers of the chain that is timed
_CHAINED: Final = 4
# two layers' caches, the same in float64, and what PyTorch reads
_CHECKED_CACHES: Final = 12
# a context for nodes that do not look at it
CONTEXT: Final = 32


@dataclass(frozen=True, slots=True)
class Group:
    """Nodes of one op with weights of their own, in a plan that holds them."""

    label: str
    plan: Plan
    model: Model
    steps: tuple[PlanStep, ...]

    @property
    def attrs(self) -> Attrs:
        """Those of the first node."""
        return self.steps[0].node.attrs


def groups(bench: Bench, name: str) -> Iterator[Group]:
    """Every kind of node of one model that weighs something, with so many of each that no cache holds their weights."""
    spec = bench.settings.models[name]
    attentions = replace(spec, layers=tuple(replace(layer, mlp=None) for layer in spec.layers))
    for prefix, made, ops in (
        ("", _rotated(bench, attentions), ("qkv_rope", "linear")),
        ("merged ", _rotated(bench, merged(attentions)), ("qkv_rope",)),
        ("", _rotated(bench, spec), ("mlp", "head")),
        ("", without_attentions(deep(spec, 1 + _CHAINED), 1), ("mlp_chain",)),
    ):
        model = bench.model(made)
        plan = bench.plan(model)
        for op in ops:
            yield Group(f"{prefix}{op}", plan, model, _alike(plan, op))


def attention_group(bench: Bench, batch: int, context: int) -> Group:
    """As many attentions as it takes to read more than a cache holds; their weights are small."""
    spec = merged(bench.settings.models[bench.settings.kernel_models[0]])
    kv_bytes = attention_bytes(bench, batch, context)
    bare = replace(spec, layers=tuple(replace(layer, mlp=None) for layer in spec.layers))
    model = bench.model(deep(bare, 1 + -(-bench.settings.rotated_bytes // kv_bytes)))
    plan = bench.plan(model)
    return Group("attention", plan, model, _alike(plan, "attention"))


def attention_bytes(bench: Bench, batch: int, context: int) -> int:
    """Keys and values that one attention reads in a step."""
    attention = bench.settings.models[bench.settings.kernel_models[0]].layers[0].attention
    assert isinstance(attention, Attention)
    return batch * context * attention.cached_size * bench.torch_dtype.itemsize


def measure(bench: Bench, section: Section) -> None:
    """Time every group at every number of rows, and attention over caches of several sizes."""
    for name in bench.settings.kernel_models:
        for group in groups(bench, name):
            for rows in bench.settings.kernel_rows:
                if section.fits(f"{name} {group.label}, {rows} rows"):
                    section.add({"shape": name, **time_group(bench, group, rows, CONTEXT)})
    for batch, context in bench.settings.attention_cases:
        what = f"attention, {batch} x {context}"
        if not bench.fits(0, _CHECKED_CACHES * attention_bytes(bench, batch, context)):
            section.data["cut"].append(f"{what} (its check does not fit in memory)")
        elif section.fits(what):
            group = attention_group(bench, batch, context)
            shape = bench.settings.kernel_models[0]
            section.add({"shape": shape, **time_group(bench, group, batch, context)})


def time_group(bench: Bench, group: Group, rows: int, context: int) -> dict[str, Any]:
    """A row of figures: seconds per node by backend, each checked first; `torch` is what PyTorch launches for it."""
    what = f"{group.label}, {rows} rows, context {context}"
    seconds: dict[str, float] = {}
    errors: dict[str, float] = {}
    num_bytes = 0
    for node in distinct_runs(group.plan, group.steps, rows, context):
        num_bytes = node.cost().num_bytes // len(group.steps)
        name = str(node.backend)
        with torch.inference_mode():
            errors[name] = node.check(f"{what}, {name}", group.model)
            seconds[name] = _seconds(bench, node.run, len(group.steps))
    nodes = [step.node for step in group.steps]
    peer = torch_run(nodes, group.model, rows, context, bench.torch_dtype)
    if peer is not None:
        with torch.inference_mode():
            seconds["torch"] = _seconds(bench, peer, len(group.steps))
    outputs, inputs = shape_of(group.attrs)
    return {
        "label": group.label,
        "op": group.steps[0].node.op,
        "outputs": outputs,
        "inputs": inputs,
        "weights": sum(weight.numel() for weight in group.steps[0].weights.values()),
        "rows": rows,
        "context": context,
        "bytes": num_bytes,
        "seconds": seconds,
        "nmse": errors,
    }


def shape_of(attrs: Attrs) -> tuple[int, int]:
    """Outputs and inputs of a node's first product; for attention, of its heads and its cache."""
    match attrs:
        case MlpChainAttrs(parts=parts):
            return shape_of(parts[0])
        case MlpAttrs(mlp=mlp):
            return mlp.up.out_features * (1 if mlp.gate is None else 2), mlp.in_size
        case QkvRopeAttrs():
            return sum(each.out_features for each in attrs.linears().values() if each is not None), attrs.in_size
        case LinearAttrs(linear=linear):
            return linear.out_features, linear.in_features
        case HeadAttrs(head=head):
            return head.linear.out_features, head.linear.in_features
        case AttentionAttrs(attention=attention):
            return attention.q_size, attention.cached_size
    raise AssertionError(attrs)


def choices(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The choice table of what was timed: for each node and number of rows, the fastest backend and all times.

    Beyond the rows that were timed the vendor's library runs: that is what it is made for. Attention is one line: the
    backend that takes the least time for all its cases together.
    """
    found = []
    for row in rows:
        seconds = _by_backend(row)
        if len(seconds) < 2 or row["op"] == "attention":
            continue
        node = {name: row[name] for name in ("op", "weights", "outputs", "inputs")}
        found.append({**node, "max_rows": row["rows"], **_fastest(seconds)})
        beyond = {**node, "max_rows": None, "backend": str(Backend.VENDOR), "microseconds": {}}
        if beyond not in found:
            found.append(beyond)
    cases = [_by_backend(row) for row in rows if row["op"] == "attention"]
    common = set.intersection(*map(set, cases)) if cases else set()
    if len(common) > 1:
        totals = {name: sum(each[name] for each in cases) for name in sorted(common)}
        found.append({"op": "attention", "weights": 0, "max_rows": None, **_fastest(totals)})
    return sorted(found, key=lambda each: (each["op"], each["weights"], each["max_rows"] or 1 << 30))


def _by_backend(row: dict[str, Any]) -> dict[str, float]:
    return {name: seconds for name, seconds in row["seconds"].items() if name in [str(each) for each in Backend]}


def _fastest(seconds: dict[str, float]) -> dict[str, Any]:
    microseconds = {name: round(each * 1e6, 2) for name, each in seconds.items()}
    return {"backend": min(seconds, key=lambda name: seconds[name]), "microseconds": microseconds}


def _seconds(bench: Bench, run: Run, count: int) -> float:
    """Median seconds of one of `count` nodes that `run` computes.

    One graph holds so many that what it costs to start a graph is little beside them.
    """
    rounds = -(-bench.settings.nodes_per_graph // count)

    def several() -> None:
        for _ in range(rounds):
            run()

    samples = bench.clock.samples(captured(several, bench.device), bench.settings.kernel_repeats, _WARMUP)
    return samples.median / (rounds * count)


def _alike(plan: Plan, op: str) -> tuple[PlanStep, ...]:
    """Steps of one op that launch something and differ in nothing but weights and cache slot."""
    steps = [step for step in gpu_of(plan).steps.decode if step.node.op == op and step.launch is not None]
    first = _without_slot(steps[0].node.attrs) if steps else None
    return tuple(step for step in steps if _without_slot(step.node.attrs) == first)


def _without_slot(attrs: Attrs) -> Attrs:
    return replace(attrs, slot=0) if isinstance(attrs, QkvRopeAttrs | AttentionAttrs) else attrs


def _rotated(bench: Bench, spec: ModelSpec) -> ModelSpec:
    """`spec` with so many layers that the weights of one kind of node are more than a cache holds."""
    layer = spec.layers[0]
    attention, mlp = layer.attention, layer.mlp
    assert isinstance(attention, Attention)
    if mlp is None:
        least = 2 * attention.kv_size * attention.in_size
        if attention.o is not None:
            least = min(
                least + attention.q_size * attention.in_size, attention.o.in_features * attention.o.out_features
            )
    else:
        assert isinstance(mlp, MLP)
        least = 3 * mlp.up.in_features * mlp.up.out_features
    # the last layer's nodes are others: the tail divides them
    return deep(spec, 1 + -(-bench.settings.rotated_bytes // (least * bench.torch_dtype.itemsize)))
