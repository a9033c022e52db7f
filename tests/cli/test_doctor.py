"""`pyruntime doctor`: what it prints and how it ends."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pyruntime.bench.selfcheck import Backend, OpCheck, Verdict
from pyruntime.cli import doctor
from pyruntime.cli.main import run

CPU = Backend("cpu", (torch.device("cpu"),), {"threads": 1})
ABSENT = Backend("cuda", (), {"driver": None}, "there is no NVIDIA driver on this machine")


def check_of(verdict: Verdict, reason: str = "") -> OpCheck:
    return OpCheck("mlp", "cpu", "float32", verdict, 0.25, 1e-6, reason)


@pytest.fixture
def machine_with(monkeypatch: pytest.MonkeyPatch) -> Any:
    def make(*checks: OpCheck) -> None:
        monkeypatch.setattr(doctor, "backends", lambda: (CPU, ABSENT))
        monkeypatch.setattr(doctor, "check_target", lambda *arguments: checks)

    return make


def test_the_cpu_of_this_machine_is_checked(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    cpu_only = tuple(each for each in doctor.backends() if each.target != "cuda")
    monkeypatch.setattr(doctor, "backends", lambda: (*cpu_only, ABSENT))
    assert run(["doctor", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert {each["verdict"] for each in said["checks"]} == {"passed"}
    assert {each["target"] for each in said["checks"]} == {"cpu"}
    assert {each["op"] for each in said["checks"]} >= {"mlp", "attention", "sample"}
    assert next(each for each in said["backends"] if each["target"] == "cuda")["missing"] == ABSENT.missing
    assert {each["target"] for each in said["left_to_the_reference"]} == {"cpu"}
    assert list(tmp_path.iterdir()) == []


def test_a_failed_check_is_shown_with_its_reason_and_ends_with_1(
    capsys: pytest.CaptureFixture[str], machine_with: Any
) -> None:
    machine_with(check_of(Verdict.FAILED, "layers.0.mlp: off [by] much"))
    assert run(["doctor"]) == 1
    said = " ".join(capsys.readouterr().out.split())
    # what looks like markup is text
    assert "✗ 2e-01" in said and "off [by] much" in said


def test_a_passed_check_ends_with_0_and_says_why_there_is_no_gpu(
    capsys: pytest.CaptureFixture[str], machine_with: Any
) -> None:
    machine_with(check_of(Verdict.PASSED))
    assert run(["doctor"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "✓ 2e-01" in said and str(ABSENT.missing) in said


def test_json_of_a_failed_check_ends_with_1_too(capsys: pytest.CaptureFixture[str], machine_with: Any) -> None:
    machine_with(check_of(Verdict.FAILED, "wrong"))
    assert run(["doctor", "--json"]) == 1
    (check,) = json.loads(capsys.readouterr().out)["checks"]
    assert (check["verdict"], check["reason"], check["device"]) == ("failed", "wrong", "cpu")
