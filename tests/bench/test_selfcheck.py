"""The self-check: it meets every op, passes what is right, and finds what is wrong."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pyruntime.bench.selfcheck import (
    OpCheck,
    Verdict,
    backends,
    check_gpu_and_remember,
    check_target,
    failures,
    refusals,
)
from pyruntime.bench.selfcheck import check as check_module
from pyruntime.bench.selfcheck.judge import Found
from pyruntime.bench.selfcheck.models import graphs, model_of
from pyruntime.bench.selfcheck.walk import check_plan
from pyruntime.checkpoint import InMemory, Model
from pyruntime.ops.gpu import trust
from pyruntime.ops.gpu.device import GpuInfo
from pyruntime.ops.table import OPS
from pyruntime.plan import Plan, PlanStep, lower

CPU = torch.device("cpu")
INFO = GpuInfo("Some GPU", 90, 132)


def test_every_op_that_another_target_runs_is_met() -> None:
    met = {node.op for _, graph in graphs() for node in graph.nodes}
    assert met == {op for op, found in OPS.items() if any(each.target != "reference" for each in found)}


def test_every_op_of_the_cpu_passes_in_every_dtype() -> None:
    checks = check_target("cpu", CPU)
    assert {(each.op, each.dtype) for each in checks} == {
        (op, dtype)
        for op in (*(op for op, found in OPS.items() if any(each.target == "cpu" for each in found)), "sample")
        for dtype in ("float32", "bfloat16")
    }
    assert [each for each in checks if each.verdict is not Verdict.PASSED] == []
    assert all(each.nmse is not None and each.limit is not None and each.nmse <= each.limit for each in checks)


def lowered(model: Model, number: int = 0) -> Plan:
    return lower(graphs()[number][1], model, target="cpu")


def test_wrong_weights_are_found_in_the_op_that_has_them() -> None:
    spec, graph = graphs()[0]
    model = model_of(spec, torch.float32)
    (name,) = (key for node in graph.nodes if node.op == "linear" for _, key in node.weights if ".3." in key)
    wrong = model.weights[name].read().clone()
    wrong[3, 5] += 0.5
    found = Found()
    plan = lowered(replace(model, weights={**model.weights, name: InMemory(wrong)}))
    check_plan(plan, graph, model, found)
    assert set(found.wrong) == {"linear"}
    assert "at most 1e-06" in found.wrong["linear"]
    assert found.nmse["linear"] > 1e-6 > found.nmse["mlp"]


def test_a_nan_fails_and_hides_behind_no_number() -> None:
    found = Found()
    found.saw("mlp", float("nan"), 1e-6, "layers.0")
    found.saw("mlp", 1e-9, 1e-6, "layers.1")
    assert found.nmse["mlp"] == float("inf")
    assert found.wrong["mlp"].startswith("layers.0")


def test_a_step_that_raises_fails_its_op(monkeypatch: pytest.MonkeyPatch) -> None:
    spec, graph = graphs()[0]
    model = model_of(spec, torch.float32)
    plan = lowered(model)
    honest = Plan.run

    def run(self: Plan, step: Any, watch: Any = None) -> Any:
        def watch_and_stop(each: PlanStep, outputs: Any) -> None:
            if each.node.op == "mlp_chain":
                raise RuntimeError("no kernel image")
            watch(each, outputs)

        return honest(self, step, watch_and_stop)

    monkeypatch.setattr(Plan, "run", run)
    found = Found()
    check_plan(plan, graph, model, found)
    (reason,) = found.wrong.values()
    assert set(found.wrong) == {"mlp_chain"} and "no kernel image" in reason


def test_refusals_are_told_with_their_dtypes() -> None:
    told = refusals("cpu")
    assert {each.op for each in told if "float16" in each.dtypes} == set(OPS)
    slim = [each for each in told if "slim attention" in each.reason]
    assert {each.op for each in slim} == {"attention", "qkv_rope"}
    assert all(each.dtypes == ("float32", "bfloat16") for each in slim)
    # experts have the reference alone
    assert {each.op for each in told if len(each.dtypes) == 4} == {"moe"}


def test_backends_say_what_is_missing() -> None:
    found = {each.target: each for each in backends()}
    assert list(found) == ["reference", "cpu", "cuda"]
    for each in found.values():
        assert (each.missing is None) == bool(each.devices)
    assert set(found["cuda"].facts) >= {"driver", "GPUs", "Triton", "interpreter"}


def check_of(verdict: Verdict) -> tuple[OpCheck, ...]:
    passed = OpCheck("norm", "cuda", "bfloat16", Verdict.PASSED, 1e-6, 5e-4)
    return (passed, OpCheck("mlp", "cuda", "bfloat16", verdict, 0.5, 5e-4, "layers.0: NMSE 0.5"))


def test_failures_on_a_gpu_are_remembered_until_a_check_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "not there yet"))
    monkeypatch.setattr(check_module, "gpu_info", lambda device: INFO)
    left: list[dict[str, str]] = []

    def check(verdict: Verdict) -> None:
        def found(*arguments: Any) -> tuple[OpCheck, ...]:
            # a kernel that failed before must be lowered again to be checked again
            left.append(trust.failed_kernels(INFO))
            return check_of(verdict)

        monkeypatch.setattr(check_module, "check_target", found)
        check_gpu_and_remember(torch.device("cuda"))

    check(Verdict.FAILED)
    assert trust.failed_kernels(INFO) == {"mlp": "bfloat16: layers.0: NMSE 0.5"}
    assert failures(check_of(Verdict.FAILED)) == trust.failed_kernels(INFO)
    check(Verdict.PASSED)
    assert trust.failed_kernels(INFO) == {}
    assert left == [{}, {}]


def test_a_cache_that_cannot_be_written_is_told_and_the_check_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "pyruntime").write_text("a file in the folder's place")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(check_module, "gpu_info", lambda device: INFO)
    monkeypatch.setattr(check_module, "check_target", lambda *arguments: check_of(Verdict.FAILED))
    assert check_gpu_and_remember(torch.device("cuda")) == check_of(Verdict.FAILED)
    assert "not remembered" in caplog.text


def test_a_target_that_cannot_be_lowered_fails_every_op(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_kernels(*arguments: Any, **options: Any) -> Plan:
        raise ImportError("libcuda.so.1 is missing")

    monkeypatch.setattr(check_module, "lower", no_kernels)
    checks = check_target("cpu", CPU)
    failed = failures(checks)
    assert set(failed) == {each.op for each in checks} - {"sample"}
    assert set(failed.values()) == {"float32: ImportError: libcuda.so.1 is missing"}
    assert all(each.nmse is None for each in checks)
