"""What a model is beside its dense form, as facts for programs and lines for people; no weight is read."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, Final

from pyruntime.checkpoint import Model, PassReport
from pyruntime.checkpoint.dialects.declared import in_words, layers_in_words, plan_of
from pyruntime.graph import Cost, Graph, SequenceWork, build, cost_of, fuse
from pyruntime.passes import kv_values_per_token
from pyruntime.spec import MLP, Attention, Cached, DropPlan, ModelSpec, MoE, Replacement, linear_names, weight_shapes

# what may differ from layer to layer: (name, sublayer, size); None where a sublayer has no such size
_SIZES: Final[tuple[tuple[str, str, Callable[[Any], int | None]], ...]] = (
    ("query heads", "attention", lambda attention: attention.num_heads),
    ("KV heads", "attention", lambda attention: attention.num_kv_heads),
    ("head sizes", "attention", lambda attention: attention.head_dim),
    ("MLP widths", "mlp", lambda mlp: mlp.up.out_features if isinstance(mlp, MLP) else None),
    ("experts", "mlp", lambda mlp: mlp.num_experts if isinstance(mlp, MoE) else None),
)


def summary(model: Model, itemsize: int, batch: int, context: int) -> dict[str, Any]:
    """Facts about `model` beside its dense form, JSON-ready; bytes at `itemsize` bytes a value.

    Where layers were built different, nobody here knows the dense form: what is compared with it is None. So are the
    predictions where no sublayer is left to speed up. `unread_bytes` are as stored in the files.
    """
    spec, dense = model.spec, model.dense_spec
    known = _is_even(dense)
    left = any(True for layer in spec.layers for _ in layer.sublayers())
    graph, dense_graph = fuse(build(spec)), fuse(build(dense))
    decode, prefill = SequenceWork(context, 1), SequenceWork(0, max(context, 1))

    def against_dense(value: float) -> float | None:
        return value if known else None

    def predicted(value: float) -> float | None:
        return value if known and left else None

    return {
        "model_type": spec.family,
        "n_layer": len(spec.layers),
        "drop_attn_list": list(spec.dropped("attention")),
        "drop_mlp_list": list(spec.dropped("mlp")),
        "linear": [
            f"{kind} {layer.index}" for layer in spec.layers for kind, each in layer.sublayers() if _linear(each)
        ],
        "sizes_by_layer": _sizes_by_layer(spec),
        "forms": _forms(spec),
        "declared": [*model.declared, *(line for report in model.reports for line in _asked_for(report))],
        "unread_bytes": model.unread_bytes + sum(report.weight_bytes for report in model.reports),
        "plan_steps": len(graph.nodes),
        "dense_plan_steps": against_dense(len(dense_graph.nodes)),
        "num_weights": num_weights(spec),
        "dense_num_weights": against_dense(num_weights(dense)),
        "weight_bytes": num_weights(spec) * itemsize,
        "dense_weight_bytes": against_dense(num_weights(dense) * itemsize),
        "kv_bytes_per_token": kv_values_per_token(spec) * itemsize,
        "dense_kv_bytes_per_token": against_dense(kv_values_per_token(dense) * itemsize),
        "max_position": spec.max_position,
        "batch_size": batch,
        "context": context,
        "predicted_decode_speedup": predicted(
            _total(dense_graph, decode, itemsize, batch).num_bytes / _total(graph, decode, itemsize, batch).num_bytes
        ),
        "predicted_prefill_speedup": predicted(
            _total(dense_graph, prefill, itemsize, 1).flops / _total(graph, prefill, itemsize, 1).flops
        ),
        "notes": list(model.notes),
        "reports": [_report(report, itemsize) for report in model.reports],
    }


def describe(model: Model, facts: dict[str, Any]) -> list[str]:
    """`facts` as lines for people, with a picture of the layers."""
    spec = model.spec
    return [
        f"{facts['model_type']}: {facts['n_layer']} layers, hidden {spec.embedding.size}, {_heads(model.dense_spec)}, "
        f"vocabulary {spec.vocab_size}, context {facts['max_position']}",
        "",
        *_picture(spec),
        "",
        f"kept                {_kept(spec)} of {facts['n_layer']} layers, {facts['plan_steps']} plan steps"
        + ("" if facts["dense_plan_steps"] is None else f" (dense {facts['dense_plan_steps']})"),
        f"gone                {layers_in_words(DropPlan(spec.dropped('attention'), spec.dropped('mlp')))}",
        *(f"said by             {line}" for line in facts["declared"]),
        *(f"differ by layer     {name}: {_counted(sizes)}" for name, sizes in facts["sizes_by_layer"].items()),
        *(f"{name:<20}{text}" for name, text in facts["forms"].items()),
        _saved("weights", facts["weight_bytes"], facts["dense_weight_bytes"]),
        _saved("KV cache per token", facts["kv_bytes_per_token"], facts["dense_kv_bytes_per_token"]),
        *_predicted(facts),
        *map(_pass_line, facts["reports"]),
        *(f"note                {note}" for note in (*_own_notes(facts), *facts["notes"])),
    ]


def _is_even(dense: ModelSpec) -> bool:
    """Whether all layers were built alike, so that `dense` is what anything was dropped from."""
    sublayers = [getattr(layer, kind) for layer in dense.layers for kind in ("attention", "mlp")]
    return all(isinstance(each, Attention | MLP | MoE) for each in sublayers) and not _sizes_by_layer(dense)


def _linear(sublayer: object) -> bool:
    return isinstance(sublayer, Replacement)


def _sizes_by_layer(spec: ModelSpec) -> dict[str, list[tuple[int, int]]]:
    """By name, the (size, number of layers) of what differs between the sublayers that are there; commonest first."""
    found = {}
    for name, kind, size in _SIZES:
        there = (each for layer in spec.layers for own, each in layer.sublayers() if own == kind and not _linear(each))
        counted = Counter(each for each in map(size, there) if each is not None)
        if len(counted) > 1:
            found[name] = counted.most_common()
    return found


def _forms(spec: ModelSpec) -> dict[str, str]:
    """By name, what rewrites left that an ordinary model does not have; in words."""
    attentions = [attention for _, attention in spec.attentions()]
    plain = [each for each in attentions if each.columns is None and not each.table]
    gone = Counter(name for each in plain for name in "qkvo" if getattr(each, name) is None)
    slim = Counter(each.cached for each in attentions if each.cached is not Cached.KEYS_VALUES)
    columns = sum(each.columns is not None for each in attentions)
    tables = [index for index, each in spec.attentions() if each.table]
    maps = [
        getattr(each, name) for layer in spec.layers for _, each in layer.sublayers() for name in linear_names(each)
    ]
    triangular = sum(linear is not None and linear.triangular for linear in maps)
    found = {
        "merged away": ", ".join(f"{name} of {_count(gone[name], 'attention')}" for name in "qkvo" if gone[name]),
        "column map": f"{_count(columns, 'attention')} with columns of the input as q, k, v" if columns else "",
        "triangular": _count(triangular, "map") if triangular else "",
        "table": ", ".join(f"attention {index}: a row of q, k, v for each token" for index in tables),
        "slim cache": ", ".join(f"{cached} only, {_count(count, 'attention')}" for cached, count in slim.items()),
    }
    return {name: text for name, text in found.items() if text}


def _counted(sizes: Iterable[tuple[int, int]]) -> str:
    return ", ".join(f"{size} (x{count})" for size, count in sizes)


def _heads(dense: ModelSpec) -> str:
    attentions = [attention for _, attention in dense.attentions()]
    if not attentions:
        return "no attention"
    query = _span(attention.num_heads for attention in attentions)
    kv = _span(attention.num_kv_heads for attention in attentions)
    return f"{query} query / {kv} key-value heads of {_span(attention.head_dim for attention in attentions)}"


def _span(sizes: Iterable[int]) -> str:
    found = sorted(set(sizes))
    return f"{found[0]}" if len(found) == 1 else f"{found[0]} to {found[-1]}"


def _kept(spec: ModelSpec) -> str:
    there = Counter("linear" if _linear(each) else kind for layer in spec.layers for kind, each in layer.sublayers())
    names = {"attention": "attention", "mlp": "MLP", "linear": "linear map"}
    counts = [_count(there[key], name) for key, name in names.items() if there[key] or key != "linear"]
    return f"{', '.join(counts[:-1])} and {counts[-1]}"


def _count(number: int, name: str) -> str:
    return f"{number} {name}{'' if number == 1 else 's'}"


def _asked_for(report: PassReport) -> tuple[str, ...]:
    removed = (each.split(" ") for each in report.removed)
    return in_words(report.name, plan_of((int(index), kind) for kind, index in removed))


def _predicted(facts: dict[str, Any]) -> list[str]:
    if facts["dense_num_weights"] is None:
        return []
    if facts["predicted_decode_speedup"] is None:
        return ["predicted           nothing: no sublayer is left to run faster"]
    return [
        f"predicted decode    {facts['predicted_decode_speedup']:.2f}x of dense by bytes moved "
        f"(batch {facts['batch_size']}, context {facts['context']})",
        f"predicted prefill   {facts['predicted_prefill_speedup']:.2f}x of dense by operations "
        f"({max(facts['context'], 1)} tokens, one wanted)",
    ]


def _own_notes(facts: dict[str, Any]) -> list[str]:
    notes = []
    if facts["unread_bytes"]:
        notes.append(f"the files also hold {_bytes(facts['unread_bytes'])} of dropped sublayers, which are not read")
    if facts["dense_weight_bytes"] is None:
        notes.append("the layers were built different: what a dense parent weighed is unknown, so is what was saved")
    return notes


def _report(report: PassReport, itemsize: int) -> dict[str, Any]:
    return {
        "name": report.name,
        "removed": list(report.removed),
        "num_weights": report.num_weights,
        "weight_bytes": report.num_weights * itemsize,
        "kv_bytes_per_token": report.kv_values_per_token * itemsize,
        "notes": list(report.notes),
    }


def _pass_line(report: dict[str, Any]) -> str:
    saved = f"{_bytes(report['weight_bytes'])} of weights, {_bytes(report['kv_bytes_per_token'])} of KV cache per token"
    # which ones stand under "gone" already
    removed = f"{report['name']} removed {_count(len(report['removed']), 'sublayer')}"
    return f"{'pass':<20}{'; '.join([removed, f'saved {saved}', *report['notes']])}"


def _picture(spec: ModelSpec) -> list[str]:
    """One mark a layer: # kept, . gone; L where a linear map stands in."""
    count = len(spec.layers)
    rows = [f"{'layer':<12}" + "".join(f"{index:<10}" for index in range(0, count, 10)).rstrip()]
    for kind in ("attention", "mlp"):
        marks = ""
        for layer in spec.layers:
            sublayer = getattr(layer, kind)
            marks += "." if sublayer is None else "L" if _linear(sublayer) else "#"
        rows.append(f"{kind:<12}{marks}")
    linear = ", L a linear map in its place" if any("L" in row[12:] for row in rows[1:]) else ""
    return [*rows, f"{'':<12}(# kept, . gone{linear})"]


def _saved(name: str, now: int, dense: int | None) -> str:
    if dense is None:
        return f"{name:<20}{_bytes(now)}"
    share = 1 - now / dense if dense else 0.0
    return f"{name:<20}{_bytes(now)} of {_bytes(dense)} ({share:.1%} saved)"


def _bytes(count: int) -> str:
    return f"{count} B" if count < 10_000 else f"{count / 1e6:.2f} MB" if count < 1e9 else f"{count / 1e9:.2f} GB"


def num_weights(spec: ModelSpec) -> int:
    """Values of all weights; a head that is tied to the embedding counts once."""
    return sum(math.prod(shape) for shape in weight_shapes(spec).values())


def _total(graph: Graph, work: SequenceWork, itemsize: int, batch: int) -> Cost:
    return sum(cost_of(graph.nodes, [work], itemsize, copies=batch).values(), Cost())
