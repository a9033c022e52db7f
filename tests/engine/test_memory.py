"""Free memory from fake files of the kernel: the machine's, and the limits of cgroups of both versions."""

from __future__ import annotations

from pathlib import Path

import pytest

from pyruntime.engine.memory import available_memory, check_memory
from pyruntime.errors import RunError


def machine(folder: Path, files: dict[str, str], membership: str, available_kib: int = 1000) -> int | None:
    """What is available where the kernel shows these files."""
    meminfo = "" if available_kib < 0 else f"MemTotal: 9999 kB\nMemFree: 7 kB\nMemAvailable: {available_kib} kB\n"
    for name, text in {"meminfo": meminfo, "membership": membership, **files}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return available_memory(folder / "meminfo", folder / "membership", folder / "cgroup")


def group(path: str, limit: object, usage: int, version: int = 2, cache: int = 0) -> dict[str, str]:
    """The files of one cgroup."""
    if version == 2:
        names, stat, root = ("memory.max", "memory.current"), f"inactive_file {cache}\n", "cgroup"
    else:
        names, root = ("memory.limit_in_bytes", "memory.usage_in_bytes"), "cgroup/memory"
        stat = f"inactive_file 999\ntotal_inactive_file {cache}\n"
    folder = f"{root}/{path}"
    return {f"{folder}/{names[0]}": f"{limit}\n", f"{folder}/{names[1]}": f"{usage}\n", f"{folder}/memory.stat": stat}


V1_UNLIMITED = 9223372036854771712


def test_without_cgroups_the_machine_alone_counts(tmp_path: Path) -> None:
    assert machine(tmp_path, {}, "") == 1000 * 1024
    assert machine(tmp_path, {}, "0::/gone\n4:memory:/gone\n3:cpu\n\n") == 1000 * 1024


@pytest.mark.parametrize("version", [1, 2])
def test_the_tightest_cgroup_up_to_the_root_counts(tmp_path: Path, version: int) -> None:
    line = "0::/a/b/c\n" if version == 2 else "5:cpu:/\n4:cpuset,memory:/a/b/c\n0::/\n"
    unlimited = "max" if version == 2 else V1_UNLIMITED
    files = {**group("a/b/c", unlimited, 5, version), **group("a/b", 900, 300, version), **group("a", 800, 90, version)}
    assert machine(tmp_path, files, line) == 600
    files = {**group("a/b", 90_000_000, 300, version), **group("a", unlimited, 90, version)}
    assert machine(tmp_path, files, line) == 1000 * 1024
    # in a container the limit is at the root of what it sees
    assert machine(tmp_path, {**group("a/b", unlimited, 3, version), **group("", 700, 300, version)}, line) == 400


@pytest.mark.parametrize("version", [1, 2])
def test_idle_file_cache_is_free_and_overuse_is_nothing(tmp_path: Path, version: int) -> None:
    line = "0::/a\n" if version == 2 else "4:memory:/a\n"
    assert machine(tmp_path, group("a", 900, 800, version, cache=300), line) == 400
    assert machine(tmp_path, group("a", 900, 1000, version), line) == 0


def test_a_machine_that_says_nothing_is_not_limited(tmp_path: Path) -> None:
    assert machine(tmp_path, {}, "", available_kib=-1) is None
    assert machine(tmp_path, group("a", 900, 800), "0::/a\n", available_kib=-1) == 100
    assert available_memory(*[tmp_path / "missing"] * 3) is None


def test_what_does_not_fit_is_refused_with_both_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyruntime.engine.memory.available_memory", lambda: 2**30)
    check_memory(2**30, "loading x")
    with pytest.raises(RunError, match=r"loading x needs 2.00 GiB; 1.00 GiB are available") as caught:
        check_memory(2**31, "loading x")
    assert (caught.value.code, caught.value.exit_code) == ("MEMORY", 7)
