"""Merged models run as the unmerged ones do: prefill, cached decode and ragged batches, on every target."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pyruntime.checkpoint import Model
from pyruntime.cli.folding import attention_streams
from pyruntime.graph import build, fuse
from pyruntime.passes.merge import MergeKind, MergeOptions, merge
from pyruntime.plan import Plan, lower
from pyruntime.spec import ModelSpec
from tests import naive
from tests.helpers import all_logits
from tests.passes.skipless import TINY_EPS, attention, mlp, model_of, rms, skipless, weights_of
from tests.passes.test_merge import BASE, NORMED, TABLES, report_of, three, worst_cond

# ragged, and longer than a page of either target
SEQUENCES = [[5, 11, 3, 60, 0, 7, 7, 42, 19, 8, 8, 1, 30, 29, 2, 17, 4, 4, 51], [9, 60, 2], [33]]
PARALLEL = skipless(three((attention(bias=True), mlp(bias=True))), parallel=True)
HEAD_NORM = rms(6, eps=TINY_EPS)
NORMED_HEADS = attention(pre=rms(24, eps=TINY_EPS), q_norm=HEAD_NORM, k_norm=HEAD_NORM, v_norm=HEAD_NORM)
CASES: dict[str, tuple[ModelSpec, MergeKind]] = {
    **{f"{name}, q+p": (spec, MergeKind.Q_P) for name, spec in BASE.items()},
    **{f"{name}, pivoted": (spec, MergeKind.PIVOTED) for name, spec in BASE.items()},
    **{f"{name}, triangular": (spec, MergeKind.TRIANGULAR) for name, spec in NORMED.items()},
    **{f"table of {width}, q+p": (spec, MergeKind.Q_P) for width, spec in TABLES.items()},
    "mha, k+p": (BASE["mha"], MergeKind.K_P),
    "mha, v+p": (BASE["mha"], MergeKind.V_P),
    "biases, p": (BASE["biases"], MergeKind.P),
    "wide queries, q+p": (skipless(three((attention(heads=5, kv=1), mlp(ffn=10)))), MergeKind.Q_P),
    "narrow queries, pivoted": (skipless(three((attention(heads=3, kv=3), mlp()))), MergeKind.PIVOTED),
    "parallel, q": (PARALLEL, MergeKind.Q),
    "parallel, pivoted": (PARALLEL, MergeKind.PIVOTED),
    "parallel, p": (PARALLEL, MergeKind.P),
    "parallel, triangular": (
        skipless(three((attention(pre=rms(24, weight=False)), mlp(pre=rms(24, weight=False)))), parallel=True),
        MergeKind.TRIANGULAR,
    ),
    "norms of q, k and v": (skipless(three((NORMED_HEADS, mlp()))), MergeKind.Q_P),
}


def plan_of(model: Model, dtype: str, target: str) -> Plan:
    return lower(fuse(build(model.spec)), model, dtype=dtype, target=target)


@pytest.mark.parametrize("name", CASES)
def test_a_merged_model_runs_as_the_unmerged_one_in_float64(name: str) -> None:
    spec, kind = CASES[name]
    weights = weights_of(spec)
    model = model_of(spec, weights)
    merged = merge(model, MergeOptions(kind=kind, streams=attention_streams(model, "float64")))
    plan = plan_of(merged, "float64", "reference")
    limit = 1e-12 + 1e-15 * worst_cond(report_of(merged))
    expected = [naive.logits(spec, weights, ids) for ids in SEQUENCES]
    # whole sequences at once, in pieces, token by token
    for chunk in (19, 7, 1):
        for found, own in zip(all_logits(plan, SEQUENCES, chunk), expected, strict=True):
            assert np.linalg.norm(found.numpy() - own) < limit * np.linalg.norm(own)


@pytest.mark.parametrize("name", CASES)
def test_a_merged_model_runs_on_the_cpu_target(name: str) -> None:
    spec, kind = CASES[name]
    weights = weights_of(spec)
    model = model_of(spec, weights)
    streams = attention_streams(model, "float64")
    merged = merge(model, MergeOptions(kind=kind, dtype="float32", streams=streams))
    plan = plan_of(merged, "float32", "cpu")
    # float32 rounds at 6e-8; a matrix of condition number c lets c times that through, for each of three layers
    limit = 1e-6 * (10 + worst_cond(report_of(merged)))
    for chunk in (19, 1):
        for found, ids in zip(all_logits(plan, SEQUENCES, chunk), SEQUENCES, strict=True):
            own = naive.logits(spec, weights, ids)
            assert np.linalg.norm(found.double().numpy() - own) < limit * np.linalg.norm(own)


@pytest.mark.parametrize("kind", [MergeKind.Q_P, MergeKind.PIVOTED])
def test_a_merged_attention_has_no_output_step_and_no_query_weights(kind: MergeKind) -> None:
    spec = BASE["gqa, glu"]
    merged = merge(model_of(spec, weights_of(spec)), MergeOptions(kind=kind))
    graph = fuse(build(merged.spec))
    assert not any(node.name.endswith("attention.o") for node in graph.nodes)
    read = sum(np.prod(shape) for node in graph.nodes for shape in node.attrs.weight_shapes().values())
    before = fuse(build(spec))
    unmerged = sum(np.prod(shape) for node in before.nodes for shape in node.attrs.weight_shapes().values())
    assert unmerged - read == 3 * 2 * 24 * 24


@pytest.mark.parametrize("spec", [BASE["gqa, glu"], PARALLEL], ids=["serial", "parallel"])
@pytest.mark.parametrize("kind", [MergeKind.Q_P, MergeKind.PIVOTED])
def test_reading_a_merged_model_computes_each_factorisation_once(
    kind: MergeKind, spec: ModelSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    merged = merge(model_of(spec, weights_of(spec)), MergeOptions(kind=kind))
    calls = 0
    qr = torch.linalg.qr

    def counted(matrix: torch.Tensor) -> object:
        nonlocal calls
        calls += 1
        return qr(matrix)

    monkeypatch.setattr(torch.linalg, "qr", counted)
    for weight in merged.weights.values():
        weight.read()
    assert calls == len(spec.layers)
