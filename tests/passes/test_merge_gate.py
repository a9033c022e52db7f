"""The gate: every planted ill-conditioned, singular or non-finite matrix is caught, in the dtype that will run."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from pyruntime.cli.folding import attention_streams
from pyruntime.errors import RunError, UsageError
from pyruntime.passes.merge import Form, GateMode, MergeKind, MergeOptions, MergeReport, merge
from pyruntime.passes.merge.algebra import Factored, pivot_columns, upper_first
from tests.naive import Array, logits
from tests.passes.skipless import Arrays, arrays_of, attention, lin, mlp, model_of, rms, skipless, weights_of
from tests.passes.test_merge import report_of, three

SPEC = skipless(three((attention(), mlp())))
Q1 = "layers.1.attention.q.weight"


def with_cond(size: int, cond: float, seed: int = 0) -> Array:
    """A random matrix with this condition number and singular values in geometric order, of unit mean square a row."""
    rng = np.random.default_rng(seed)
    left, right = (torch.linalg.qr(torch.from_numpy(rng.normal(size=(size, size)))).Q.numpy() for _ in range(2))
    spectrum = np.geomspace(1, 1 / cond, size)
    return np.asarray(left * spectrum @ right / np.sqrt((spectrum**2).mean()), dtype=np.float64)


def planted(name: str, matrix: Array) -> Arrays:
    return {**weights_of(SPEC), name: matrix}


def merged_report(weights: Arrays, **options: object) -> MergeReport:
    return report_of(merge(model_of(SPEC, weights), MergeOptions(**options)))  # type: ignore[arg-type]


def refusal(weights: Arrays, **options: object) -> RunError:
    with pytest.raises(RunError) as caught:
        merged_report(weights, **options)
    assert caught.value.code == "MERGE_ILL_CONDITIONED"
    assert caught.value.exit_code == 4
    return caught.value


def singular(fault: str) -> Array:
    matrix = weights_of(SPEC)[Q1]
    match fault:
        case "zero row":
            matrix[3] = 0.0
        case "zero column":
            matrix[:, 3] = 0.0
        case "two rows alike":
            matrix[3] = matrix[4]
        case "rank n-1":
            # numpy inverts this without an error
            matrix[3] = matrix[5] + matrix[7] / 3 - matrix[11] * 0.7
            assert np.isfinite(np.linalg.inv(matrix)).all()
        case "rank 0":
            matrix[:] = 0.0
        case "NaN":
            matrix[2, 9] = np.nan
        case "infinity":
            matrix[2, 9] = np.inf
        case _:
            raise AssertionError(fault)
    return matrix


SINGULAR = ("zero row", "zero column", "two rows alike", "rank n-1", "rank 0", "NaN", "infinity")


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize("fault", SINGULAR)
def test_a_singular_q_is_refused_in_every_dtype(fault: str, dtype: str) -> None:
    error = refusal(planted(Q1, singular(fault)), dtype=dtype, kind=MergeKind.Q)
    # the wide dtypes reach the planted layer, the narrow ones may stop at an earlier one
    assert str(error).startswith("layer 1: Q: ") or dtype.endswith("16")


@pytest.mark.parametrize("fault", SINGULAR)
def test_a_singular_q_cannot_be_forced(fault: str) -> None:
    assert "cannot be forced" in str(refusal(planted(Q1, singular(fault)), gate=GateMode.FORCE))


@pytest.mark.parametrize("fault", SINGULAR[:5])
def test_a_singular_q_falls_back_to_other_columns(fault: str) -> None:
    weights = planted(Q1, singular(fault))
    merged = merge(model_of(SPEC, weights), MergeOptions(gate=GateMode.FALL_BACK))
    report = report_of(merged)
    assert [row.entry for row in report.layers] == [Form.Q, Form.PIVOTED, Form.Q]
    assert "condition number" in report.layers[1].notes[0]
    ids = [4, 9, 1, 33]
    np.testing.assert_allclose(logits(merged.spec, arrays_of(merged), ids), logits(SPEC, weights, ids), rtol=1e-9)


@pytest.mark.parametrize("kind", [MergeKind.PIVOTED, MergeKind.Q_P, MergeKind.AUTO])
def test_a_stream_that_q_k_and_v_do_not_read_whole_is_not_merged(kind: MergeKind) -> None:
    weights = weights_of(SPEC)
    for role in "qkv":
        weights[f"layers.1.attention.{role}.weight"][:, 5] = 0.0
    error = refusal(weights, kind=kind, gate=GateMode.REFUSE)
    assert str(error).startswith("layer 1: ")
    report = merged_report(weights, kind=kind, gate=GateMode.FALL_BACK)
    assert [row.entry is None for row in report.layers] == [False, True, False]
    assert [row.output for row in report.layers] == [Form.P] * 3


@pytest.mark.parametrize(
    "name", ["layers.0.mlp.down.weight", "layers.1.attention.k.weight", "layers.1.attention.o.weight"]
)
@pytest.mark.parametrize("kind", [MergeKind.Q_P, MergeKind.PIVOTED])
def test_nan_in_what_a_merge_touches_is_refused(kind: MergeKind, name: str) -> None:
    weights = weights_of(SPEC)
    weights[name][1, 2] = np.nan
    refusal(weights, kind=kind)


@pytest.mark.parametrize(
    ("dtype", "passing", "refused"),
    [("float64", 1e10, 1e14), ("float32", 1e5, 1e7), ("float16", 1e2, 1e5), ("bfloat16", 3.0, 1e4)],
)
def test_condition_numbers_pass_up_to_a_bound_of_the_dtype(dtype: str, passing: float, refused: float) -> None:
    weights = weights_of(SPEC)
    for index in range(3):
        weights[f"layers.{index}.attention.q.weight"] = with_cond(24, passing, index)
    measured = merged_report(weights, dtype=dtype).layers[1].entry_measured
    assert measured is not None and measured.cond == pytest.approx(passing, rel=0.05)
    weights[Q1] = with_cond(24, refused)
    assert str(refusal(weights, dtype=dtype)).startswith("layer 1: Q: condition number ")


@pytest.mark.parametrize("exponent", range(4, 17))
def test_planted_condition_numbers_are_all_refused_in_bfloat16(exponent: int) -> None:
    weights = weights_of(SPEC)
    weights["layers.0.attention.q.weight"] = with_cond(24, 10.0**exponent)
    assert str(refusal(weights, dtype="bfloat16", kind=MergeKind.Q)).startswith("layer 0: ")


@pytest.mark.parametrize(("cond", "refused"), [(600.0, True), (2.0, False)])
@pytest.mark.parametrize("bias", [None, 10.0, 30.0])
def test_a_bias_of_keys_and_values_leaves_the_verdict_as_it_is(bias: float | None, cond: float, refused: bool) -> None:
    own = lin(64, 32, bias is not None)
    spec = skipless(three((attention(d=64, heads=4, kv=2, head_dim=16, k=own, v=own), mlp(d=64))))
    weights = weights_of(spec)
    for index in range(3):
        weights[f"layers.{index}.attention.q.weight"] = with_cond(64, cond, index)
        for role in "kv" if bias is not None else "":
            weights[f"layers.{index}.attention.{role}.bias"][:] = bias
    options = MergeOptions(kind=MergeKind.Q, dtype="bfloat16", gate=GateMode.FORCE)
    report = report_of(merge(model_of(spec, weights), options))
    assert [row.forced for row in report.layers] == [refused] * 3


@pytest.mark.parametrize(("scale", "refused"), [(1.0, False), (1000.0, True)])
def test_the_first_block_is_measured_on_scaled_tokens_with_their_positions(scale: float, refused: bool) -> None:
    # keys and values read what positions add, and nothing of the tokens: a merge mixes both into every value, so that
    # large tokens take the place of the positions in bfloat16
    spec = skipless([(attention(), mlp())], positions=64, scale=scale)
    weights = weights_of(spec)
    weights["embedding.weight"][:, :12] = 0.0
    weights["embedding.position.weight"][:, 12:] = 0.0
    weights["layers.0.attention.q.weight"] = with_cond(24, 1.0)
    for role in "kv":
        weights[f"layers.0.attention.{role}.weight"][:, 12:] = 0.0
    options = MergeOptions(kind=MergeKind.Q, dtype="bfloat16", gate=GateMode.FORCE)
    assert [row.forced for row in report_of(merge(model_of(spec, weights), options)).layers] == [refused]


HEADS: dict[str, Any] = {f"{role}_norm": rms(6, eps=1e-6) for role in "qkv"}
DRIFTING = skipless(three((attention(pre=rms(24, eps=1e-6), **HEADS), mlp())))


def small_streams() -> Arrays:
    """Weights that leave a stream of a hundredth behind each MLP, so that the epsilon behind it matters."""
    weights = weights_of(DRIFTING)
    for index in range(3):
        weights[f"layers.{index}.mlp.up.weight"] *= 0.01
    return weights


def test_a_cancelled_norm_is_judged_on_the_streams_of_the_model() -> None:
    weights = small_streams()
    model = model_of(DRIFTING, weights)
    streams = attention_streams(model, "float64")
    for dtype in ("float32", "float16", "bfloat16"):
        with pytest.raises(RunError, match=r"layer \d: Q: .*epsilon") as caught:
            merge(model, MergeOptions(kind=MergeKind.Q, dtype=dtype, streams=streams))
        assert caught.value.code == "MERGE_ILL_CONDITIONED"
    forced = merge(model, MergeOptions(kind=MergeKind.Q, gate=GateMode.FORCE, streams=streams))
    ids = [4, 9, 1, 33]
    expected = logits(DRIFTING, weights, ids)
    error = np.linalg.norm(logits(forced.spec, arrays_of(forced), ids) - expected) / np.linalg.norm(expected)
    assert error > 1e-3


def test_a_norm_stays_where_nothing_is_known_of_its_input() -> None:
    model = model_of(DRIFTING, weights_of(DRIFTING))
    for gate in GateMode:
        report = report_of(merge(model, MergeOptions(gate=gate)))
        assert [row.entry for row in report.layers] == [None] * 3
        assert all("streams" in row.notes[0] for row in report.layers)


@pytest.mark.parametrize(("dtype", "change", "refused"), [
    ("float32", 1e-7, False), ("float32", 1e-5, True), ("float16", 1e-5, False), ("float16", 5e-4, True),
    ("bfloat16", 5e-4, False), ("bfloat16", 5e-3, True),
])  # fmt: skip
def test_what_an_epsilon_may_change_depends_on_the_dtype(dtype: str, change: float, refused: bool) -> None:
    # a stream of mean square 1/2 through an orthogonal Q: the change is about eps |1/2 - 1| / (2 / 2)
    heads: dict[str, Any] = {f"{role}_norm": rms(6, eps=2 * change) for role in "qkv"}
    spec = skipless([(attention(kv=4, pre=rms(24, eps=1e-30, weight=False), **heads), mlp())])
    weights = weights_of(spec)
    for role in "qkv":
        weights[f"layers.0.attention.{role}.weight"] = np.eye(24)
    streams = {0: torch.full((3, 24), 0.5**0.5)}
    options = MergeOptions(kind=MergeKind.Q, dtype=dtype, gate=GateMode.FORCE, streams=streams)
    (row,) = report_of(merge(model_of(spec, weights), options)).layers
    assert row.entry_measured is not None
    assert row.entry_measured.drift == pytest.approx(change, rel=0.05)
    assert row.forced == refused


def test_an_overflow_is_answered_with_a_wider_dtype_to_store() -> None:
    weights = weights_of(SPEC)
    weights["layers.1.attention.o.weight"] *= 300.0
    weights["layers.1.mlp.up.weight"] *= 300.0
    for gate in (GateMode.REFUSE, GateMode.FORCE):
        advice = str(refusal(weights, kind=MergeKind.P, dtype="float16", store_dtype="float16", gate=gate))
        assert "wider --store-dtype" in advice
        assert "--kind p" not in advice and "inverse" not in advice


def test_auto_takes_q_only_where_it_is_about_as_accurate_as_the_pivoted_form() -> None:
    weights = weights_of(SPEC)
    weights["layers.0.attention.q.weight"] = with_cond(24, 1.0)
    # this one passes too, at a hundred times the error
    weights[Q1] = with_cond(24, 100.0)
    rows = merged_report(weights, kind=MergeKind.AUTO, dtype="float32").layers
    assert [row.entry for row in rows[:2]] == [Form.Q, Form.PIVOTED]
    assert rows[0].num_weights == rows[1].num_weights
    alone = merged_report(weights, kind=MergeKind.Q_P, dtype="float32").layers
    assert not any(row.forced for row in alone)


# NMSE of h (O Q) (Q^-1 K) against h O K, n = 512, geometric spectrum, measured by other code
PUBLISHED = {
    "float32": {1e2: 1e-11, 1e4: 4e-8, 1e6: 2e-4},
    "float16": {1e1: 4e-7, 1e3: 5e-4},
    "bfloat16": {1e1: 3e-5, 1e2: 7e-4, 1e3: 3e-2},
}


@pytest.mark.parametrize("dtype", PUBLISHED)
def test_measured_errors_agree_with_an_independent_measurement(dtype: str) -> None:
    size = 512
    spec = skipless(
        [(attention(d=size, heads=8, kv=8, head_dim=64), None), (None, mlp(d=size, ffn=16))], vocab=256
    )  # fmt: skip
    weights = weights_of(spec)
    for cond, expected in PUBLISHED[dtype].items():
        weights["layers.0.attention.q.weight"] = with_cond(size, cond)
        options = MergeOptions(kind=MergeKind.Q, dtype=dtype, gate=GateMode.FORCE)
        measured = report_of(merge(model_of(spec, weights), options)).layers[0].entry_measured
        assert measured is not None
        assert expected / 5 < measured.nmse < expected * 5


def test_what_is_measured_is_what_the_stored_weights_do() -> None:
    # the gate's own arithmetic against the weights as they come out, on other inputs
    spec = skipless(three((attention(d=96, heads=4, kv=2, head_dim=24), mlp(d=96, ffn=256))))
    weights = weights_of(spec, 3)
    merged = merge(model_of(spec, weights), MergeOptions(kind=MergeKind.Q, store_dtype="bfloat16", gate=GateMode.FORCE))
    measured = report_of(merged).layers[1].entry_measured
    assert measured is not None
    rows = torch.randn(200, 256, generator=torch.Generator().manual_seed(9)).bfloat16().double().numpy()
    stored = arrays_of(merged)
    stream = rows @ stored["layers.0.mlp.down.weight"].T
    stream = torch.from_numpy(stream).bfloat16().double().numpy()
    worst = 0.0
    for role in "kv":
        name = f"layers.1.attention.{role}.weight"
        expected = rows @ weights["layers.0.mlp.down.weight"].T @ weights[name].T
        worst = max(worst, float(((stream @ stored[name].T - expected) ** 2).sum() / (expected**2).sum()))
    assert worst / 2 < measured.nmse < worst * 2


def test_values_that_the_store_dtype_cannot_hold_are_refused() -> None:
    weights = weights_of(SPEC)
    # P M has values beyond 65504
    weights["layers.1.attention.o.weight"] *= 300.0
    weights["layers.1.mlp.up.weight"] *= 300.0
    merged_report(weights, kind=MergeKind.P, dtype="bfloat16")
    refusal(weights, kind=MergeKind.P, dtype="float16", store_dtype="float16")


def test_orthogonal_rotations_pass_in_bfloat16() -> None:
    spec = skipless(three((attention(pre=rms(24)), mlp(pre=rms(24)))))
    weights = weights_of(spec)
    weights[Q1] = singular("rank n-1")
    report = report_of(merge(model_of(spec, weights), MergeOptions(kind=MergeKind.TRIANGULAR, dtype="bfloat16")))
    assert all(row.entry is Form.TRIANGULAR for row in report.layers)
    measured = [row.entry_measured for row in report.layers]
    assert all(each is not None and each.cond is None and each.nmse < 3 * each.unmerged for each in measured)


def test_unknown_dtypes_are_refused() -> None:
    for options in ({"dtype": "int8"}, {"store_dtype": "fp8"}):
        with pytest.raises(UsageError, match="expected one of"):
            merged_report(weights_of(SPEC), **options)


def test_pivots_are_those_of_greedy_orthogonalisation() -> None:
    rng = np.random.default_rng(0)
    for d, n in ((1, 3), (7, 12), (63, 100), (64, 190), (100, 170)):
        x = rng.normal(size=(d, n)) * np.geomspace(1, 1e-3, n)
        left = x.copy()
        chosen: list[int] = []
        for _ in range(d):
            norms = (left**2).sum(0)
            norms[chosen] = -1
            chosen.append(int(norms.argmax()))
            unit = x[:, chosen[-1]] if not chosen[:-1] else left[:, chosen[-1]]
            unit = unit / np.linalg.norm(unit)
            left = left - np.outer(unit, unit @ left)
        assert pivot_columns(torch.from_numpy(x)) == tuple(sorted(chosen))


def test_fewer_independent_columns_have_no_pivots() -> None:
    rng = np.random.default_rng(0)
    low = rng.normal(size=(20, 12)) @ rng.normal(size=(12, 50))
    assert pivot_columns(torch.from_numpy(low)) is None
    assert pivot_columns(torch.zeros(4, 9, dtype=torch.float64)) is None
    low[3, 3] = np.nan
    assert pivot_columns(torch.from_numpy(low)) is None


@pytest.mark.parametrize("cond", [1.0, 1e2, 1e5, 1e9, 1e13])
def test_condition_numbers_are_found_without_all_singular_values(cond: float) -> None:
    matrix = torch.from_numpy(with_cond(60, cond))
    assert Factored.of(matrix).condition() == pytest.approx(cond, rel=0.03)


def test_a_wide_map_has_its_right_inverse() -> None:
    wide = torch.randn(20, 33, dtype=torch.float64)
    found = Factored.of(wide).solve(torch.eye(20, dtype=torch.float64))
    torch.testing.assert_close(found, torch.linalg.pinv(wide))


@pytest.mark.parametrize("size", [1, 5, 64])
def test_an_upper_triangle_comes_first(size: int) -> None:
    matrix = torch.randn(size, size, dtype=torch.float64)
    upper, rotation = upper_first(matrix)
    torch.testing.assert_close(upper @ rotation, matrix)
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(size, dtype=torch.float64))
    assert float(upper.tril(-1).abs().max()) == 0.0


def test_grouped_heads_fall_back_without_k_and_v() -> None:
    # with fewer key-value heads than the stream is wide neither K nor V has an inverse, whatever the gate says
    weights = weights_of(SPEC)
    for role in "qkv":
        weights[f"layers.1.attention.{role}.weight"][:, 5] = 0.0
    notes = " / ".join(merged_report(weights, gate=GateMode.FALL_BACK).layers[1].notes)
    assert "K: k gives 12 values, fewer than the stream's 24" in notes
