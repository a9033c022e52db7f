"""Merges of skipless models equal the unmerged model, in float64, for every make of model and every kind."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from pyruntime.checkpoint import Model
from pyruntime.cli.folding import attention_streams
from pyruntime.errors import RunError, UsageError
from pyruntime.passes.merge import Form, GateMode, MergeKind, MergeOptions, MergeReport, merge
from pyruntime.spec import MLP, Activation, Attention, ModelSpec, MoE, NormKind, Replacement, weight_shapes
from tests.naive import logits
from tests.passes.skipless import (
    ROPE,
    TINY_EPS,
    arrays_of,
    attention,
    lin,
    mlp,
    model_of,
    rms,
    skipless,
    weights_of,
)

IDS = [5, 11, 3, 60, 0, 7, 7, 42, 19]


def report_of(model: Model) -> MergeReport:
    report = model.reports[-1]
    assert isinstance(report, MergeReport)
    return report


def worst_cond(report: MergeReport) -> float:
    measured = [each for row in report.layers for each in (row.entry_measured, row.output_measured)]
    return max([each.cond for each in measured if each is not None and each.cond is not None], default=1.0)


def check(
    spec: ModelSpec, kind: MergeKind, seed: int = 0, entries: int | None = None, outputs: int | None = None
) -> Model:
    """Merge with every layer taking part, unless said otherwise, and compare with the unmerged model."""
    weights = weights_of(spec, seed)
    model = model_of(spec, weights)
    merged = merge(model, MergeOptions(kind=kind, streams=attention_streams(model, "float64")))
    report = report_of(merged)
    count = len(spec.layers)
    assert sum(row.entry is not None for row in report.layers) == (count if entries is None else entries), report.notes
    assert sum(row.output is not None for row in report.layers) == (count if outputs is None else outputs), report.notes
    expected = logits(spec, weights, IDS)
    found = logits(merged.spec, arrays_of(merged), IDS)
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    assert error < 1e-12 + 1e-15 * worst_cond(report)
    sizes = {name: tuple(weight.read().shape) for name, weight in merged.weights.items()}
    assert sizes == weight_shapes(merged.spec)
    # folded gains are saved too, and belong to no layer
    assert report.read_before - report.read_after >= sum(row.num_weights for row in report.layers) > 0
    return merged


def three(parts: Any) -> list[Any]:
    return [parts] * 3


LINEAR = lin(24, 24, True)
BASE: dict[str, ModelSpec] = {
    "gqa, glu": skipless(three((attention(), mlp()))),
    "mqa, plain mlp": skipless(three((attention(kv=1), mlp(gated=False)))),
    "mha": skipless(three((attention(kv=4), mlp()))),
    "biases": skipless(three((attention(bias=True), mlp(bias=True)))),
    "biases, plain mlp": skipless(three((attention(bias=True), mlp(bias=True, gated=False)))),
    "bias of q alone": skipless(three((attention(q=lin(24, 24, True)), mlp()))),
    "tied head": skipless(three((attention(), mlp())), tied=True),
    "tied head, biases": skipless(three((attention(bias=True), mlp(bias=True))), tied=True),
    "learned positions": skipless(three((attention(bias=True, rope=None), mlp())), positions=64),
    "window, softcap": skipless(three((attention(window=3, softcap=2.0), mlp()))),
    "no norm at all": skipless(three((attention(), mlp())), final_norm=False),
    "qk norms": skipless(three((attention(q_norm=rms(6), k_norm=rms(6)), mlp()))),
    "shaped": skipless(three((attention(shaped=True), mlp()))),
    "norm before the output projection": skipless(three((attention(sub=rms(24)), mlp()))),
    "alibi": skipless(three((attention(rope=None, alibi=True), mlp()))),
    # it takes P in from the one side and the next Q from the other
    "linear maps in place of MLPs": skipless(three((attention(bias=True), Replacement(linear=LINEAR, residual=False)))),
    "odd sizes": skipless(three((attention(d=21, heads=3, kv=1, head_dim=7), mlp(d=21, ffn=31)))),
    "one layer": skipless([(attention(), mlp())]),
}


@pytest.mark.parametrize("kind", [MergeKind.Q_P, MergeKind.PIVOTED, MergeKind.AUTO])
@pytest.mark.parametrize("name", BASE)
def test_merging_q_and_p_changes_nothing(name: str, kind: MergeKind) -> None:
    merged = check(BASE[name], kind)
    for layer in merged.spec.layers:
        assert isinstance(layer.attention, Attention)
        assert layer.attention.q is None
        assert layer.attention.o is None


# width of the heads -> a layer that looks queries, keys and values up, before one that computes them
TABLES: dict[int, ModelSpec] = {
    heads * 6: skipless(
        [(attention(heads=heads, kv=1, q=None, k=None, v=None, table=True), mlp()), (attention(), mlp())]
    )
    for heads in (4, 5)
}


@pytest.mark.parametrize("kind", [MergeKind.Q_P, MergeKind.PIVOTED, MergeKind.P, MergeKind.AUTO])
@pytest.mark.parametrize("width", TABLES)
def test_an_attention_with_a_table_loses_p_where_that_leaves_the_stream_its_width(width: int, kind: MergeKind) -> None:
    wide = width != 24
    merged = check(TABLES[width], kind, entries=int(kind is not MergeKind.P), outputs=2 - wide)
    report = report_of(merged)
    assert (report.layers[0].output is None) == wide
    assert any("table" in note for note in report.layers[0].notes) or not wide


@pytest.mark.parametrize("kind", [MergeKind.K_P, MergeKind.V_P])
@pytest.mark.parametrize("bias", [False, True])
def test_merging_k_or_v_of_multi_head_attention_changes_nothing(kind: MergeKind, bias: bool) -> None:
    merged = check(skipless(three((attention(kv=4, bias=bias), mlp(bias=bias)))), kind)
    attentions = [each for _, each in merged.spec.attentions()]
    assert all(getattr(each, kind.value[0]) is None and each.q is not None for each in attentions)


@pytest.mark.parametrize("bias", [False, True])
def test_p_and_q_merge_alone(bias: bool) -> None:
    spec = skipless(three((attention(bias=bias), mlp(bias=bias))))
    assert all(each.o is None for _, each in check(spec, MergeKind.P, entries=0).spec.attentions())
    assert all(each.o is not None for _, each in check(spec, MergeKind.Q, outputs=0).spec.attentions())


def test_q_and_p_save_two_squares_a_layer() -> None:
    # table 1 of arXiv 2404.12362: 2 d^2 of each layer
    report = report_of(check(BASE["gqa, glu"], MergeKind.Q_P))
    assert [row.num_weights for row in report.layers] == [2 * 24 * 24] * 3
    assert report.num_weights == 3 * 2 * 24 * 24 == report.read_before - report.read_after
    assert report.weight_bytes == 8 * report.num_weights


def test_pivoted_columns_save_as_much_as_merging_q() -> None:
    report = report_of(check(BASE["gqa, glu"], MergeKind.PIVOTED))
    assert [row.num_weights for row in report.layers] == [2 * 24 * 24] * 3


def test_a_tied_head_keeps_the_old_table() -> None:
    spec = BASE["tied head"]
    weights = weights_of(spec)
    merged = merge(model_of(spec, weights))
    assert not merged.spec.head.tied
    np.testing.assert_array_equal(merged.weights["head.weight"].read().numpy(), weights["embedding.weight"])
    report = report_of(merged)
    assert report.num_weights == 3 * 2 * 24 * 24 - 61 * 24
    assert report.read_before - report.read_after == 3 * 2 * 24 * 24
    assert any("no longer tied" in note for note in report.notes)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", [MergeKind.Q, MergeKind.Q_P, MergeKind.PIVOTED])
def test_parallel_layers_lose_q_and_keep_p(kind: MergeKind, bias: bool) -> None:
    spec = skipless(three((attention(bias=bias), mlp(bias=bias))), parallel=True)
    merged = check(spec, kind, outputs=0)
    assert all(each.q is None and each.o is not None for _, each in merged.spec.attentions())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("final_norm", [False, True])
def test_parallel_layers_lose_p_and_keep_q(bias: bool, final_norm: bool) -> None:
    spec = skipless(three((attention(bias=bias), mlp(bias=bias))), parallel=True, final_norm=final_norm)
    merged = check(spec, MergeKind.P, entries=0, outputs=2 if final_norm else 3)
    assert all(each.q is not None for _, each in merged.spec.attentions())


def test_queries_wider_than_the_stream_merge_where_that_saves() -> None:
    # 30 query values on a stream of 24: Q* is a right inverse, and the stream becomes 30 wide
    wide = attention(heads=5, kv=1)
    saves = skipless(three((wide, mlp(ffn=10))))
    check(saves, MergeKind.Q_P)
    # a wider down projection costs more than Q weighs, a table of single rows nothing; gate and up of 30 inputs cost
    # more than P weighs
    costs = skipless(three((wide, mlp(ffn=200))))
    report = report_of(check(costs, MergeKind.Q_P, entries=1, outputs=0))
    assert report.layers[0].entry is Form.Q
    # 200 x 6 more in down, 2 x 6 x 6 more in K and V, 24 x 30 less
    assert f"Q: a token would read {200 * 6 + 2 * 6 * 6 - 24 * 30} weights more" in report.layers[1].notes
    # 2 x 200 x 6 more in gate and up, 30 x 24 less
    assert f"P: a token would read {2 * 200 * 6 - 30 * 24} weights more" in report.layers[1].notes


@pytest.mark.parametrize("heads", [3, 5])
def test_pivoted_columns_keep_the_width_of_the_stream(heads: int) -> None:
    spec = skipless(three((attention(heads=heads, kv=1 if heads == 5 else 3), mlp(ffn=200))))
    merged = check(spec, MergeKind.PIVOTED, outputs=0 if heads == 5 else 3)
    assert all(each.in_size == 24 for _, each in merged.spec.attentions())


NORMED: dict[str, ModelSpec] = {
    "rms": skipless(three((attention(pre=rms(24)), mlp(pre=rms(24))))),
    "rms one plus": skipless(
        three((attention(pre=rms(24, kind=NormKind.RMS_ONE_PLUS)), mlp(pre=rms(24, kind=NormKind.RMS_ONE_PLUS))))
    ),
    "weightless rms, biases": skipless(
        three((attention(pre=rms(24, weight=False), bias=True), mlp(pre=rms(24, weight=False), bias=True)))
    ),
    "layer norm": skipless(
        three((
            attention(pre=rms(24, kind=NormKind.LAYER, bias=True), bias=True),
            mlp(pre=rms(24, kind=NormKind.LAYER, bias=True), bias=True),
        ))
    ),
    "rms, tied, positions": skipless(three((attention(pre=rms(24)), mlp(pre=rms(24)))), tied=True, positions=64),
}  # fmt: skip


@pytest.mark.parametrize("kind", [MergeKind.TRIANGULAR, MergeKind.AUTO])
@pytest.mark.parametrize("name", NORMED)
def test_triangular_maps_are_exact_behind_norms(name: str, kind: MergeKind) -> None:
    merged = check(NORMED[name], kind)
    for layer in merged.spec.layers:
        assert isinstance(layer.attention, Attention) and isinstance(layer.mlp, MLP)
        assert layer.attention.q is not None and layer.attention.q.triangular
        assert layer.attention.o is not None and layer.attention.o.triangular
        assert layer.attention.pre == replace(rms(24), weight=False) == layer.mlp.pre


def test_triangular_maps_save_half_of_two_squares() -> None:
    spec = skipless(three((attention(pre=rms(24, weight=False)), mlp(pre=rms(24, weight=False)))))
    report = report_of(check(spec, MergeKind.TRIANGULAR))
    assert [row.num_weights for row in report.layers] == [24 * 23] * 3


def test_a_parallel_layer_behind_a_norm_has_a_triangular_q() -> None:
    spec = skipless(three((attention(pre=rms(24, weight=False)), mlp(pre=rms(24, weight=False)))), parallel=True)
    check(spec, MergeKind.TRIANGULAR, outputs=0)


def test_norms_of_queries_keys_and_values_cancel_the_one_before_them() -> None:
    inner: dict[str, Any] = {f"{role}_norm": rms(6, eps=TINY_EPS) for role in "qkv"}
    part = attention(pre=rms(24, eps=TINY_EPS), **inner)
    merged = check(skipless(three((part, mlp()))), MergeKind.Q_P)
    assert all(each.q is None and each.pre is None for _, each in merged.spec.attentions())


def test_a_norm_whose_epsilon_matters_is_not_cancelled() -> None:
    inner: dict[str, Any] = {f"{role}_norm": rms(6, eps=0.5) for role in "qkv"}
    spec = skipless(three((attention(pre=rms(24), **inner), mlp())))
    model = model_of(spec, weights_of(spec))
    with pytest.raises(RunError, match="epsilon") as caught:
        merge(model, MergeOptions(streams=attention_streams(model, "float64")))
    assert caught.value.code == "MERGE_ILL_CONDITIONED"


def test_a_mixture_of_norms_and_none_merges_layer_by_layer() -> None:
    spec = skipless([(attention(), mlp()), (attention(pre=rms(24)), mlp(pre=rms(24))), (attention(), mlp())])
    report = report_of(check(spec, MergeKind.AUTO))
    assert report.layers[1].entry is Form.TRIANGULAR
    assert all(row.entry in (Form.Q, Form.PIVOTED) for row in report.layers[::2])


def test_layers_that_cannot_merge_stay_and_say_why() -> None:
    spec = skipless([
        (attention(), mlp()),
        (attention(residual=True), mlp()),
        (attention(), mlp(post=rms(24))),
        (attention(), None),
        (attention(), mlp()),
        (None, mlp(residual=True)),
        (attention(), mlp()),
    ])  # fmt: skip
    report = report_of(check(spec, MergeKind.Q_P, entries=3, outputs=4))
    notes = {row.index: " / ".join(row.notes) for row in report.layers}
    assert "residual" in notes[1]
    assert "norms its output" in notes[3] and "no MLP follows" in notes[3]
    assert "no attention" in notes[5]
    assert "mlp of layer 5 adds" in notes[6]
    assert notes[0] == notes[2] == notes[4] == ""


def test_serial_and_parallel_layers_meet_in_one_stream() -> None:
    spec = skipless(three((attention(bias=True), mlp(bias=True))))
    mixed = replace(spec, layers=tuple(replace(each, parallel=each.index == 1) for each in spec.layers))
    report = report_of(check(mixed, MergeKind.Q_P, outputs=2))
    assert "not both" in report.layers[1].notes[0]


def test_parallel_sublayers_with_norms_of_their_own_keep_q() -> None:
    spec = skipless(three((attention(pre=rms(24, weight=False)), mlp())), parallel=True)
    with pytest.raises(UsageError, match="norm their input differently"):
        merge(model_of(spec, weights_of(spec)), MergeOptions(kind=MergeKind.TRIANGULAR))


def test_experts_take_nothing_in() -> None:
    experts = MoE(
        num_experts=2, top_k=1, router=lin(24, 2), gate=lin(24, 8), up=lin(24, 8), down=lin(8, 24),
        activation=Activation.SILU, residual=False,
    )  # fmt: skip
    spec = skipless([(attention(), experts), (attention(), mlp())])
    report = report_of(merge(model_of(spec, weights_of(spec))))
    assert [(row.entry, row.output) for row in report.layers] == [(Form.Q, None), (None, Form.P)]
    assert [len([note for note in row.notes if "mixture of experts" in note]) for row in report.layers] == [1, 1]


def test_a_model_with_residuals_is_refused_by_layer() -> None:
    parts = (attention(residual=True, pre=rms(24)), mlp(residual=True, pre=rms(24)))
    spec = skipless(three(parts))
    for kind in MergeKind:
        if kind in (MergeKind.K_P, MergeKind.V_P):
            continue
        with pytest.raises(UsageError, match=r"layer 0: .*residual.*skipless.*pyruntime fold") as caught:
            merge(model_of(spec, weights_of(spec)), MergeOptions(kind=kind))
        assert caught.value.exit_code == 2


@pytest.mark.parametrize("kind", [MergeKind.K_P, MergeKind.V_P])
def test_k_and_v_of_grouped_heads_are_refused_with_q_as_advice(kind: MergeKind) -> None:
    spec = BASE["gqa, glu"]
    with pytest.raises(UsageError, match=r"layer 0: .*12 values, fewer than the stream's 24.*only Q can be merged"):
        merge(model_of(spec, weights_of(spec)), MergeOptions(kind=kind))


@pytest.mark.parametrize("kind", [MergeKind.K_P, MergeKind.V_P])
def test_layers_whose_k_and_v_are_not_square_stay_beside_others(kind: MergeKind) -> None:
    # grouped heads, square ones, wide ones: 30 keys on a stream of 24 have a right inverse
    wide = attention(heads=5, kv=5)
    spec = skipless(
        [(attention(), mlp()), (attention(kv=4), mlp()), (wide, mlp(ffn=10)), (attention(residual=True), mlp())]
    )
    report = report_of(check(spec, kind, entries=2, outputs=3))
    assert [row.entry for row in report.layers] == [None, Form(kind.value[0]), Form(kind.value[0]), None]
    assert "12 values, fewer than the stream's 24" in report.layers[0].notes[0]


@pytest.mark.parametrize("kind", [MergeKind.K_P, MergeKind.V_P])
def test_k_and_v_wider_than_the_stream_have_a_right_inverse(kind: MergeKind) -> None:
    check(skipless(three((attention(heads=5, kv=5), mlp(ffn=4)))), kind)


def test_a_kind_that_fits_no_layer_is_refused_with_one_that_does() -> None:
    spec = NORMED["rms"]
    with pytest.raises(UsageError, match=r"layer 0: Q: a norm stands before .*triangular.*--kind auto"):
        merge(model_of(spec, weights_of(spec)))


def test_a_merged_model_is_not_merged_again() -> None:
    merged = check(BASE["gqa, glu"], MergeKind.Q_P)
    with pytest.raises(UsageError, match="nothing can be merged"):
        merge(merged)


def test_a_layer_that_does_not_fit_into_memory_is_refused_beforehand() -> None:
    spec = BASE["gqa, glu"]
    with pytest.raises(RunError, match="GiB") as caught:
        merge(model_of(spec, weights_of(spec)), MergeOptions(max_memory=10_000))
    assert caught.value.exit_code == 7


def test_rope_is_left_alone() -> None:
    merged = check(BASE["gqa, glu"], MergeKind.PIVOTED)
    assert all(each.rope == ROPE for _, each in merged.spec.attentions())


def test_force_is_said() -> None:
    spec = BASE["gqa, glu"]
    weights = weights_of(spec)
    # a row that is nearly the sum of others
    weights["layers.1.attention.q.weight"][0] = weights["layers.1.attention.q.weight"][1:4].sum(0) + 1e-13
    model = model_of(spec, weights)
    with pytest.raises(RunError, match="layer 1"):
        merge(model)
    forced = report_of(merge(model, MergeOptions(gate=GateMode.FORCE)))
    assert [row.forced for row in forced.layers] == [False, True, False]
    assert "layer 1: forced through the gate" in forced.notes
