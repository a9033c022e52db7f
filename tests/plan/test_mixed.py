"""Plans that two targets share: a node that C++ refuses falls to the reference, is named with its reason, and fits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from pyruntime.errors import UsageError
from pyruntime.graph import build, fuse
from pyruntime.ops import _native
from pyruntime.ops.step import SequenceSlice, make_step
from pyruntime.ops.table import OPS
from pyruntime.plan import Plan, lower
from tests.helpers import all_logits, nmse, relative_error
from tests.specs import ATTENTION, ODD_MODELS, PLAIN_MLP, model_of, random_model

SPEC = model_of(
    [(ATTENTION, PLAIN_MLP, False), (ATTENTION, None, False), (ATTENTION, PLAIN_MLP, True), (None, PLAIN_MLP, False)]
)
CHAIN = model_of([(ATTENTION, PLAIN_MLP, False), (None, PLAIN_MLP, False), (ATTENTION, None, False)])
SEQUENCES = [[(5 * i * i + seed) % 37 for i in range(length)] for seed, length in enumerate((37, 1, 17))]
# ops that C++ can run too
BOTH = [op for op, found in OPS.items() if len(found) > 1]
REASON = "this machine is too small"


def refuse(monkeypatch: pytest.MonkeyPatch, *ops: str) -> None:
    """Make the C++ target refuse these ops."""
    for op in ops:
        reference, cpu = OPS[op][:2]
        monkeypatch.setitem(OPS, op, (reference, replace(cpu, refuses=lambda attrs, dtype: REASON)))


def plan_of(spec: Any, fused: bool = True, **options: Any) -> Plan:
    model = random_model(spec, torch.float32)
    return lower(fuse(build(spec)) if fused else build(spec), model, **options)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "unfused"])
@pytest.mark.parametrize("op", BOTH)
def test_a_refused_op_falls_to_the_reference_and_the_logits_stay(
    op: str, fused: bool, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = 0
    for spec in (SPEC, CHAIN):
        whole = plan_of(spec, fused, target="cpu", dtype=dtype)
        expected = [all_logits(whole, SEQUENCES, chunk) for chunk in (64, 5)]
        with monkeypatch.context() as patch:
            refuse(patch, op)
            plan = plan_of(spec, fused, target="cpu", dtype=dtype)
        for step in plan.steps:
            assert (step.native is None) == (step.node.op == op)
            assert step.implementation.target == ("reference" if step.node.op == op else "cpu")
            ran += step.native is None
        for chunk, right in zip((64, 5), expected, strict=True):
            for found, logits in zip(all_logits(plan, SEQUENCES, chunk), right, strict=True):
                assert relative_error(found, logits) < 1e-5 if dtype == "float32" else nmse(found, logits) < 5e-4
    # unfused graphs have no chain; fused ones need no norm of its own here
    assert ran > 0 or (op, fused) in {("mlp_chain", False), ("norm", True), ("add", True)}


def test_explain_says_which_node_fell_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(monkeypatch, "attention", "mlp")
    lines = plan_of(SPEC, target="cpu").explain().splitlines()
    for line in lines[:-1]:
        if line.split()[1] in ("attention", "mlp"):
            assert line.endswith(f"reference (cpu refused: {REASON})")
        else:
            assert line.endswith("cpu (asked for)")
    assert sum(REASON in line for line in lines) == 6


@pytest.mark.parametrize("wanted", [[0], [3, 36], []])
def test_a_mixed_tail_computes_the_wanted_rows(wanted: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    expected = plan_of(SPEC, target="cpu")
    refuse(monkeypatch, "attention", "gather", "head")
    plan = plan_of(SPEC, target="cpu")
    logits = []
    for each in (expected, plan):
        slices = [SequenceSlice(SEQUENCES[0], 0, [2, 0, 1], wanted), SequenceSlice([1, 2], 0, [3], [])]
        logits.append(each.run(make_step(slices, each.new_cache(4, 16))))
    assert logits[1].shape == (len(wanted), 37)
    if wanted:
        assert relative_error(logits[1], logits[0]) < 1e-5


@pytest.mark.parametrize("dtype", ["float16", "float64"])
def test_the_cpu_target_refuses_other_dtypes_by_name(dtype: str) -> None:
    with pytest.raises(UsageError, match=f"float32 and bfloat16, not {dtype}") as caught:
        plan_of(SPEC, target="cpu", dtype=dtype)
    assert caught.value.code == "TARGET"


@pytest.mark.parametrize(
    "dtype, target",
    [("float32", "cpu"), ("bfloat16", "cpu"), ("float16", "reference"), ("float64", "reference")],
)
def test_auto_takes_what_runs_the_whole_plan_and_says_why(
    dtype: str, target: str, caplog: pytest.LogCaptureFixture
) -> None:
    plan = plan_of(SPEC, target="auto", dtype=dtype)
    assert plan.target == target
    assert {step.implementation.target for step in plan.steps} == {target}
    said = [(each.name, each.levelname) for each in caplog.records]
    if target == "cpu":
        assert "cpu (auto)" in plan.explain()
        assert said == []
    else:
        why = f"its kernels take float32 and bfloat16, not {dtype}"
        assert f"auto: target cpu refused: {why}" in plan.explain()
        assert said == [("pyruntime", "WARNING")]
        assert why in caplog.text
        expected = all_logits(plan_of(SPEC, target="reference", dtype=dtype), SEQUENCES, 64)
        assert all(torch.equal(a, b) for a, b in zip(all_logits(plan, SEQUENCES, 64), expected, strict=True))


def test_auto_without_the_extension_says_so_and_runs(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def missing() -> None:
        raise UsageError("NATIVE", "pyruntime._C cannot be imported")

    monkeypatch.setattr(_native, "load", missing)
    plan = plan_of(SPEC, target="auto")
    assert plan.target == "reference"
    assert "auto: pyruntime._C is not built" in plan.explain()
    assert "the C++ target is missing" in caplog.text
    with pytest.raises(UsageError, match="cannot be imported"):
        plan_of(SPEC, target="cpu")


def test_the_default_target_is_the_reference() -> None:
    plan = plan_of(SPEC)
    assert plan.target == "reference"
    assert plan.program is None


def test_the_cpu_target_refuses_another_device() -> None:
    with pytest.raises(UsageError, match="target cpu cannot run on device meta"):
        plan_of(SPEC, target="cpu", device="meta")


@pytest.mark.parametrize("name", ODD_MODELS)
def test_one_call_runs_all_neighbours(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan that C++ runs alone is one segment; a refused node splits it in two and itself."""
    plan = plan_of(ODD_MODELS[name], target="cpu")
    assert [len(segment) for segment in plan.segments] == [len(plan.steps)]
    refuse(monkeypatch, "gather")
    split = plan_of(ODD_MODELS[name], target="cpu")
    (at,) = (i for i, step in enumerate(split.steps) if step.node.op == "gather")
    assert [len(segment) for segment in split.segments] == [at, 1, len(split.steps) - at - 1]
