"""What a model is beside its dense form, as facts for programs and lines for people; no weight is read."""

from __future__ import annotations

import math
from typing import Any

from pyruntime.checkpoint import Model, PassReport
from pyruntime.graph import Cost, Graph, SequenceWork, build, cost_of, fuse
from pyruntime.passes import kv_values_per_token
from pyruntime.spec import ModelSpec, weight_shapes


def summary(model: Model, itemsize: int, batch: int, context: int) -> dict[str, Any]:
    """Facts about `model` beside its dense form, JSON-ready; bytes at `itemsize` bytes a value."""
    spec, dense = model.spec, model.dense_spec
    graph, dense_graph = fuse(build(spec)), fuse(build(dense))
    decode = [SequenceWork(context, 1)] * batch
    prefill = [SequenceWork(0, max(context, 1))]
    return {
        "model_type": spec.family,
        "n_layer": len(spec.layers),
        "drop_attn_list": list(spec.dropped("attention")),
        "drop_mlp_list": list(spec.dropped("mlp")),
        "plan_steps": len(graph.nodes),
        "dense_plan_steps": len(dense_graph.nodes),
        "num_weights": num_weights(spec),
        "dense_num_weights": num_weights(dense),
        "weight_bytes": num_weights(spec) * itemsize,
        "dense_weight_bytes": num_weights(dense) * itemsize,
        "kv_bytes_per_token": kv_values_per_token(spec) * itemsize,
        "dense_kv_bytes_per_token": kv_values_per_token(dense) * itemsize,
        "max_position": spec.max_position,
        "batch_size": batch,
        "context": context,
        "predicted_decode_speedup": _total(dense_graph, decode, itemsize).num_bytes
        / _total(graph, decode, itemsize).num_bytes,
        "predicted_prefill_speedup": _total(dense_graph, prefill, itemsize).flops
        / _total(graph, prefill, itemsize).flops,
        "notes": list(model.notes),
        "reports": [_report(report, itemsize) for report in model.reports],
    }


def describe(model: Model, facts: dict[str, Any]) -> list[str]:
    """`facts` as lines for people, with a picture of the layers."""
    spec = model.spec
    attention = next((a for _, a in model.dense_spec.attentions()), None)
    heads = (
        "no attention"
        if attention is None
        else (f"{attention.num_heads} query / {attention.num_kv_heads} key-value heads of {attention.head_dim}")
    )
    num_kept = {kind: facts["n_layer"] - len(facts[f"drop_{kind}_list"]) for kind in ("attn", "mlp")}
    kept = f"{num_kept['attn']} attentions and {num_kept['mlp']} MLPs"
    return [
        f"{facts['model_type']}: {facts['n_layer']} layers, hidden {spec.embedding.size}, {heads}, "
        f"vocabulary {spec.vocab_size}, context {facts['max_position']}",
        "",
        *_picture(spec),
        "",
        f"kept                {kept} of {facts['n_layer']} layers, {facts['plan_steps']} plan steps "
        f"(dense {facts['dense_plan_steps']})",
        f"gone                attention {_list(facts['drop_attn_list'])}; MLP {_list(facts['drop_mlp_list'])}",
        _saved("weights", facts["weight_bytes"], facts["dense_weight_bytes"]),
        _saved("KV cache per token", facts["kv_bytes_per_token"], facts["dense_kv_bytes_per_token"]),
        f"predicted decode    {facts['predicted_decode_speedup']:.2f}x of dense by bytes moved "
        f"(batch {facts['batch_size']}, context {facts['context']})",
        f"predicted prefill   {facts['predicted_prefill_speedup']:.2f}x of dense by operations "
        f"({max(facts['context'], 1)} tokens, one wanted)",
        *map(_pass_line, facts["reports"]),
        *(f"note                {note}" for note in facts["notes"]),
    ]


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
    count = len(report["removed"])
    removed = f"{report['name']} removed {count} sublayer{'' if count == 1 else 's'}"
    return f"{'pass':<20}{'; '.join([removed, f'saved {saved}', *report['notes']])}"


def _picture(spec: ModelSpec) -> list[str]:
    """One mark a layer: # kept, . gone; L where a linear map stands in."""
    count = len(spec.layers)
    rows = [f"{'layer':<12}" + "".join(f"{index:<10}" for index in range(0, count, 10)).rstrip()]
    for kind in ("attention", "mlp"):
        marks = ""
        for layer in spec.layers:
            sublayer = getattr(layer, kind)
            marks += "." if sublayer is None else "L" if type(sublayer).__name__ == "Replacement" else "#"
        rows.append(f"{kind:<12}{marks}")
    linear = ", L a linear map in its place" if any("L" in row[12:] for row in rows[1:]) else ""
    return [*rows, f"{'':<12}(# kept, . gone{linear})"]


def _list(layers: list[int]) -> str:
    return ", ".join(map(str, layers)) or "nothing"


def _saved(name: str, now: int, dense: int) -> str:
    share = 1 - now / dense if dense else 0.0
    return f"{name:<20}{_bytes(now)} of {_bytes(dense)} ({share:.1%} saved)"


def _bytes(count: int) -> str:
    return f"{count} B" if count < 10_000 else f"{count / 1e6:.2f} MB" if count < 1e9 else f"{count / 1e9:.2f} GB"


def num_weights(spec: ModelSpec) -> int:
    """Values of all weights; a head that is tied to the embedding counts once."""
    return sum(math.prod(shape) for shape in weight_shapes(spec).values())


def _total(graph: Graph, work: list[SequenceWork], itemsize: int) -> Cost:
    return sum(cost_of(graph.nodes, work, itemsize).values(), Cost())
