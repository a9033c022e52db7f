"""What a self-check left behind: read back for the same machine and versions, and never believed when it is broken."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from pyruntime.ops.gpu import trust
from pyruntime.ops.gpu.device import GpuInfo

INFO = GpuInfo("Some GPU", 90, 132)
FAILED = {"mlp": "bfloat16: layers.3.mlp: NMSE 1.0e+00, at most 5e-04"}


@pytest.fixture(autouse=True)
def cache_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def remember(text: str) -> Path:
    path = trust.file_of(INFO)
    assert path is not None
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return path


def test_what_was_written_is_read_for_the_same_gpu_only() -> None:
    remember(trust.as_text(INFO, FAILED))
    assert trust.failed_kernels(INFO) == FAILED
    assert trust.failed_kernels(GpuInfo("Other GPU", 90, 132)) == {}


def test_without_a_self_check_nothing_is_disabled_and_nothing_said(caplog: pytest.LogCaptureFixture) -> None:
    assert trust.failed_kernels(INFO) == {}
    assert caplog.records == []


@pytest.mark.parametrize("package", ["torch", "triton", "pyruntime-llm"])
def test_another_version_forgets(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    remember(trust.as_text(INFO, FAILED))
    honest = trust.importlib.metadata.version
    monkeypatch.setattr(trust.importlib.metadata, "version", lambda name: "0.0" if name == package else honest(name))
    assert trust.failed_kernels(INFO) == {}


def test_another_driver_forgets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    version = tmp_path / "version"
    version.write_text("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build\nGCC\n")
    monkeypatch.setattr(trust, "_DRIVER", version)
    assert trust.driver_version() == "580.65.06"
    remember(trust.as_text(INFO, FAILED))
    version.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54  Thu\n")
    assert trust.failed_kernels(INFO) == {}
    assert trust.driver_version() == "550.54"


BROKEN = {
    "no JSON": "{",
    "deep": "[" * 50_000,
    "list": "[]",
    "another machine's": trust.as_text(GpuInfo("Other GPU", 90, 132), FAILED),
    "no reasons": json.dumps({"identity": trust.identity(INFO), "failed": ["mlp"]}),
    "reasons of another type": json.dumps({"identity": trust.identity(INFO), "failed": {"mlp": 1}}),
    "too long": " " * 70_000,
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_counts_for_nothing_and_one_line_says_so(name: str, caplog: pytest.LogCaptureFixture) -> None:
    path = remember(BROKEN[name])
    with caplog.at_level(logging.WARNING, "pyruntime"):
        assert trust.failed_kernels(INFO) == {}
    (record,) = caplog.records
    assert str(path) in record.getMessage()
    assert "\n" not in record.getMessage()


def test_a_file_that_cannot_be_opened_counts_for_nothing(caplog: pytest.LogCaptureFixture) -> None:
    path = trust.file_of(INFO)
    assert path is not None
    path.mkdir(parents=True)
    assert trust.failed_kernels(INFO) == {}
    assert len(caplog.records) == 1


def test_a_reason_cannot_speak_to_the_terminal() -> None:
    remember(trust.as_text(INFO, {"mlp": "bad\x1b[2J"}))
    assert trust.failed_kernels(INFO) == {"mlp": "bad[2J"}


def test_the_interpreter_remembers_nothing() -> None:
    interpreter = GpuInfo("interpreter", 0, 4)
    path = trust.file_of(interpreter)
    assert path is not None
    path.parent.mkdir()
    path.write_text(trust.as_text(interpreter, FAILED))
    assert trust.failed_kernels(interpreter) == {}


def test_a_relative_cache_folder_is_ignored(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "here")
    monkeypatch.setenv("HOME", str(tmp_path))
    path = trust.file_of(INFO)
    assert path is not None and path.parent == tmp_path / ".cache" / "pyruntime"
