"""How many threads the C++ executor takes when nobody says: affinity and the quota of the cgroup."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pyruntime.errors import UsageError
from pyruntime.ops import _native


def quota_tree(root: Path, version: int) -> tuple[str, str]:
    membership = root / "membership"
    if version == 2:
        membership.write_text("0::/outer/inner\n")
        base = root
        (base / "outer/inner").mkdir(parents=True)
        (base / "outer/cpu.max").write_text("150000 100000\n")
        (base / "outer/inner/cpu.max").write_text("max 100000\n")
    else:
        membership.write_text("5:memory:/outer\n4:cpu,cpuacct:/outer\n")
        base = root / "cpu,cpuacct"
        (base / "outer").mkdir(parents=True)
        (base / "cpu.cfs_quota_us").write_text("-1\n")
        (base / "outer/cpu.cfs_quota_us").write_text("150000\n")
        (base / "outer/cpu.cfs_period_us").write_text("100000\n")
    return str(membership), str(root)


@pytest.mark.parametrize("version", [1, 2])
def test_the_cgroup_quota_limits_the_threads(tmp_path: Path, version: int) -> None:
    assert _native.load().module.cgroup_cpus(*quota_tree(tmp_path, version)) == 2


def test_no_cgroup_file_means_no_limit(tmp_path: Path) -> None:
    assert _native.load().module.cgroup_cpus(str(tmp_path / "absent"), str(tmp_path)) == 0


def test_the_default_number_of_threads_respects_affinity(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYRUNTIME_NUM_THREADS", raising=False)
    native = _native.load()
    assert 1 <= native.module.num_threads() <= len(os.sched_getaffinity(0))
    assert native.num_threads == native.module.num_threads()


@pytest.mark.parametrize("value", ["0", "-1", "1025", "two", ""])
def test_an_impossible_number_of_threads_is_refused(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYRUNTIME_NUM_THREADS", value)
    with pytest.raises(UsageError, match=f"is '{value}'; expected an integer from 1 to 1024") as caught:
        _native.load()
    assert caught.value.code == "ENV"


def test_fewer_threads_than_were_asked_for_are_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PYRUNTIME_NUM_THREADS", "3")
    assert _native.load().num_threads == 3
    assert caplog.text == ""
    monkeypatch.setattr(_native.load().module, "start_team", lambda num_threads: num_threads - 1)
    assert _native.load().num_threads == 2
    assert "2 of 3 threads could be started" in caplog.text


@pytest.mark.parametrize("num_threads", [0, 1025])
def test_a_team_of_an_impossible_size_is_refused(num_threads: int) -> None:
    with pytest.raises(ValueError, match=f"num_threads is {num_threads}; expected 1 to 1024"):
        _native.load().module.start_team(num_threads)
