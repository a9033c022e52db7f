"""What is measured is what is meant: consecutive steps, both plans of a comparison, and where the figures come from."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import pyruntime
from pyruntime.bench import (
    Ceiling,
    Ceilings,
    Comparison,
    Samples,
    ceilings,
    commit,
    compare_plans,
    decode_case,
    machine,
    prefill_case,
    step_runner,
    steps_runner,
)
from pyruntime.graph import Cost, SequenceWork
from pyruntime.spec import DropPlan
from tests.helpers import all_logits, make_plan

MakeLlama = Callable[..., tuple[Path, Any]]
PATTERN = DropPlan(attention=(1, 2), mlp=(3,))


@pytest.mark.parametrize("pattern", [DropPlan(), PATTERN, DropPlan(attention=(0, 1, 2, 3))])
def test_steps_in_a_row_continue_their_sequences(make_llama: MakeLlama, pattern: DropPlan) -> None:
    plan = make_plan(make_llama()[0], pattern)
    run = steps_runner(plan, [[SequenceWork(0, 3)] * 2, [SequenceWork(3, 1)] * 2, [SequenceWork(4, 1)] * 2])
    # the tokens are the positions; two runs of the same steps are the same
    (expected,) = all_logits(plan, [[0, 1, 2, 3, 4]], 5)
    for _ in range(2):
        torch.testing.assert_close(run(), expected[-1:].expand(2, -1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(step_runner(plan, [SequenceWork(0, 5)])(), expected[-1:], rtol=1e-5, atol=1e-5)


def test_a_comparison_says_bytes_operations_and_ceilings(make_llama: MakeLlama) -> None:
    folder, _ = make_llama()
    dense, pruned = make_plan(folder), make_plan(folder, PATTERN)
    readings = iter(range(1, 100))
    cases = [decode_case(2, 5), prefill_case(7)]
    found = compare_plans(dense, pruned, cases, 3, lambda: Ceiling(next(readings), 1.0))
    for each, case in zip(found, cases, strict=True):
        assert (each.dense_cost, each.pruned_cost) == (dense.total_cost(case.work), pruned.total_cost(case.work))
        assert len(each.dense.seconds) == len(each.pruned.seconds) == len(each.dense.ceilings) == 3
    # seven readings a case: before the first sample and behind each of six
    assert [ceiling.read_bandwidth for ceiling in found[0].dense.ceilings] == [1.5, 3.5, 5.5]
    assert [ceiling.read_bandwidth for ceiling in found[1].pruned.ceilings] == [9.5, 11.5, 13.5]
    (without,) = compare_plans(dense, pruned, cases[:1], 2)
    assert without.dense.ceilings == ()


def test_the_spread_of_a_ratio_is_that_of_neighbours() -> None:
    dense, pruned = Samples((2.0, 40.0, 3.0)), Samples((1.0, 10.0, 1.0))
    case = prefill_case(1)
    found = Comparison(case=case, predicted=1, dense=dense, pruned=pruned, dense_cost=Cost(), pruned_cost=Cost())
    assert found.measured == 3.0
    # 2, 4 and 3
    assert [found.measured_percentile(percent) for percent in (0, 50, 100)] == [2.0, 3.0, 4.0]


def test_the_commit_is_that_of_the_checkout(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package = tmp_path / "checkout" / "pyruntime" / "__init__.py"
    package.parent.mkdir(parents=True)
    monkeypatch.setattr(pyruntime, "__file__", str(package))
    assert commit() == ""
    root = package.parents[1]

    def git(*arguments: str) -> str:
        who = ["-c", "user.name=somebody", "-c", "user.email=somebody@example.org"]
        done = subprocess.run(["git", "-C", root, *who, *arguments], check=True, capture_output=True, text=True)
        return done.stdout.strip()

    git("init", "-q")
    # somebody else's repository around an installed package
    assert commit() == ""
    (root / "pyproject.toml").write_text("")
    git("add", ".")
    git("commit", "-q", "-m", "all")
    assert commit() == git("rev-parse", "--short", "HEAD") != ""
    (root / "pyproject.toml").write_text("changed")
    assert commit() == git("rev-parse", "--short", "HEAD") + "-dirty"
    monkeypatch.setenv("PATH", "")
    assert commit() == ""


def test_the_machine_is_named() -> None:
    found = machine()
    assert found["cpu_info"]
    assert found["pyruntime"] == pyruntime.__version__
    assert found["memory_bytes"] > 1 << 28


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_the_ceilings_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings, "_BUFFER_BYTES", 1 << 26)
    found = Ceilings(torch.device("cuda"))
    reading = found.probe(torch.bfloat16)()
    assert 1e9 < reading.read_bandwidth < 1e14
    assert 1e9 < reading.multiply_rate < 1e17
    assert found.names(torch.bfloat16)["read_probe"] == "torch, sum over 0.0625 GiB"
