"""gpu-check without a GPU: all of it in Triton's interpreter, and what stops it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import build as build_module
from benchmarks.gpu import check as check_program
from benchmarks.gpu import correctness, kernels
from benchmarks.gpu.background import Background
from benchmarks.gpu.record import CUT, DONE, FAILED, WRONG, Deadline, Record, Section
from benchmarks.gpu.settings import VARIANTS
from pyruntime.errors import RunError

ROOT = Path(__file__).parents[2]
SECTIONS = ["ceilings", "correctness", "kernels", "decode", "baselines", "prefill", "tail", "long"]
ARGUMENTS = ["--device", "cpu", "--tiny", "--no-build", "--deadline", "1500"]
# what an MLP adds to the stream is a twentieth too large: an NMSE of 0.0025 where 0.0005 is allowed, which the stream
# itself would hide
PLANTED = """
import sys
from pyruntime.ops.gpu import mlp

honest = mlp.on_gpu

def planted(attrs, node):
    launch = honest(attrs, node)

    def wrong(frame):
        launch(frame)
        frame.outputs[0].add_(0.05 * (frame.outputs[0] - frame.inputs[1]))

    return wrong

mlp.on_gpu = planted
from benchmarks.gpu import check
sys.exit(check.main())
"""


def interpreted(folder: Path, *arguments: str, program: str | None = None) -> subprocess.CompletedProcess[str]:
    """gpu-check in a process whose Triton is interpreted, with its result file in `folder`."""
    command = ["-m", "benchmarks.gpu.check"] if program is None else ["-c", program]
    return subprocess.run(
        [sys.executable, *command, *ARGUMENTS, "--out", str(folder), *arguments],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=1600,
    )


def result(folder: Path) -> dict[str, Any]:
    """The one result file."""
    (path,) = folder.glob("interpreter/*.json")
    found: dict[str, Any] = json.loads(path.read_text())
    return found


@pytest.mark.gpu
@pytest.mark.slow
def test_every_section_runs_and_is_told(tmp_path: Path) -> None:
    done = interpreted(tmp_path)
    assert done.returncode == 0, done.stderr
    data = result(tmp_path)
    assert data["correct"] is True
    assert {name: data["sections"][name]["status"] for name in SECTIONS} == dict.fromkeys(SECTIONS, DONE)
    rows = {name: data["sections"][name]["rows"] for name in SECTIONS}
    tests = next(row for row in rows["correctness"] if row["check"] == "tests")
    assert tests["exit_code"] == 0 and tests["passed"] > 0
    # every kind of node by our kernels and the vendor's, each with the error that was found
    assert {row["label"] for row in rows["kernels"]} >= {"qkv_rope", "merged qkv_rope", "linear", "mlp", "mlp_chain"}
    assert all({"triton", "vendor", "torch"} <= set(row["seconds"]) for row in rows["kernels"] if row["op"] == "mlp")
    assert all(0 < error < 5e-4 for row in rows["kernels"] for error in row["nmse"].values())
    assert [row["variant"] for row in rows["decode"]] == list(VARIANTS)
    assert {(row["peer"], row["variant"]) for row in rows["baselines"]} == {
        (peer, form) for peer in ("compiled", "transformers") for form in ("dense", "half")
    }
    assert data["sections"]["tail"]["predicted"] > 1
    for title in ("Bars", "Ceilings", "Decode steps", "Others, the same weights", "Prompts", "Nodes by themselves"):
        assert title in done.stdout
    assert kernels.choices(rows["kernels"])


@pytest.mark.gpu
@pytest.mark.slow
def test_wrong_kernel_ends_the_run_without_a_time(tmp_path: Path) -> None:
    done = interpreted(tmp_path, program=PLANTED)
    assert done.returncode == 1
    assert done.stdout == ""
    assert "error[NUMERICS]: tiny mlp, 3 rows, triton has an NMSE of " in done.stderr
    data = result(tmp_path)
    assert data["correct"] is False
    assert list(data["sections"]) == ["ceilings", "correctness"]
    assert "tables" not in data and "bars" not in data


def test_run_without_time_for_its_checks_prints_no_time(tmp_path: Path) -> None:
    done = interpreted(tmp_path, "--deadline", "0.001")
    assert done.returncode == 1
    assert done.stdout == ""
    assert "ceilings: there was no time for it" in done.stderr
    assert result(tmp_path)["sections"] == {"ceilings": {"status": CUT, "rows": [], "cut": ["everything"]}}


class Time:
    """A clock that is told what it shows."""

    now = 0.0

    def __call__(self) -> float:
        """Seconds."""
        return self.now


@pytest.fixture
def time() -> Time:
    return Time()


@pytest.fixture
def record(tmp_path: Path, time: Time) -> Record:
    return Record(tmp_path, "2026-01-02-abc", {"kind": "gpu"}, Deadline(100.0, time))


def test_parts_that_would_end_too_late_are_named(record: Record, time: Time) -> None:
    seen = []

    def parts(section: Section) -> None:
        # the second part takes 20 s: 15 s are left for the fourth
        for name, seconds in (("a", 5.0), ("b", 20.0), ("c", 10.0), ("d", 1.0)):
            if section.fits(name):
                time.now += seconds
                section.add({"name": name})
                seen.append(name)

    assert record.section("first", 0.5, parts) == CUT
    assert seen == ["a", "b", "c"]
    found = json.loads(record.path.read_text())["sections"]["first"]
    assert (found["status"], found["cut"], found["seconds"]) == (CUT, ["d"], 35.0)
    assert found["rows"] == [{"name": name} for name in "abc"]


def test_section_behind_its_share_of_the_time_does_not_begin(record: Record, time: Time) -> None:
    time.now = 61.0
    assert record.section("late", 0.6, lambda section: pytest.fail("it began")) == CUT
    assert json.loads(record.path.read_text())["sections"]["late"]["cut"] == ["everything"]


def test_failure_is_recorded_and_the_next_section_runs(record: Record) -> None:
    def failing(section: Section) -> None:
        section.add({"name": "before"})
        raise ValueError("no such kernel")

    assert record.section("first", 1.0, failing) == FAILED
    assert record.section("second", 1.0, lambda section: section.add({"name": "after"})) == DONE
    data = json.loads(record.path.read_text())
    assert data["sections"]["first"]["error"] == "ValueError: no such kernel"
    assert data["sections"]["first"]["rows"] == [{"name": "before"}]
    assert data["correct"] is None


def test_wrong_result_makes_the_whole_run_incorrect(record: Record) -> None:
    def wrong(section: Section) -> None:
        raise RunError("NUMERICS", "off by one")

    assert record.section("first", 1.0, wrong) == WRONG
    assert json.loads(record.path.read_text())["correct"] is False


def test_result_files_are_never_overwritten(tmp_path: Path) -> None:
    paths = [Record(tmp_path, "day-commit", {"number": i}, Deadline(1.0)).path for i in range(3)]
    assert [path.name for path in paths] == ["day-commit.json", "day-commit-2.json", "day-commit-3.json"]
    assert [json.loads(path.read_text())["number"] for path in paths] == [0, 1, 2]


def background(folder: Path, program: str) -> Background:
    return Background.start([sys.executable, "-c", program], folder / "log")


PYTEST_SAID = "print('tests/gpu/test_a.py::test_one PASSED'); print('[gw1] [ 50%] {} tests/gpu/test_a.py::test_two')"


@pytest.mark.parametrize(
    ("program", "wrong"),
    [
        (PYTEST_SAID.format("PASSED"), None),
        (PYTEST_SAID.format("SKIPPED"), None),
        (PYTEST_SAID.format("FAILED") + "; raise SystemExit(1)", "the tests of the kernels failed"),
        # a file that cannot be imported is no test
        (PYTEST_SAID.format("PASSED") + "; raise SystemExit(2)", "the tests of the kernels failed"),
        ("raise SystemExit(5)", "the tests of the kernels failed"),
        ("import time; time.sleep(60)", "no test of the kernels passed"),
    ],
)
def test_tests_of_the_kernels_must_pass(tmp_path: Path, record: Record, program: str, wrong: str | None) -> None:
    def check(section: Section) -> None:
        running = background(tmp_path, program)
        section.add({"check": "tests", **correctness.outcome(running, 2.0 if "sleep" in program else 60.0)})
        correctness.judge(section)

    status = record.section("correctness", 1.0, check)
    assert status == (DONE if wrong is None else WRONG)
    assert wrong is None or wrong in record.data["sections"]["correctness"]["error"]


def test_tests_that_did_not_end_are_told(tmp_path: Path, record: Record) -> None:
    program = "import time; print('tests/gpu/test_a.py::test_one PASSED', flush=True); time.sleep(60)"

    def check(section: Section) -> None:
        running = background(tmp_path, program)
        while "PASSED" not in running.text():
            assert running.process.poll() is None
        section.add({"check": "tests", **correctness.outcome(running, 0.0)})
        correctness.judge(section)

    assert record.section("correctness", 1.0, check) == CUT
    assert record.data["sections"]["correctness"]["cut"] == ["tests of the kernels behind the first 1"]


@pytest.mark.parametrize(("code", "status"), [(0, DONE), (99, WRONG), (1, DONE)])
def test_what_a_sanitizer_finds_is_wrong_and_that_it_cannot_run_is_not(
    tmp_path: Path, record: Record, code: int, status: str
) -> None:
    def check(section: Section) -> None:
        running = background(tmp_path, f"print('Device not supported'); raise SystemExit({code})")
        section.add({"check": "memcheck", **correctness.sanitized(running, 60.0)})
        section.add({"check": "racecheck", **correctness.sanitized(None, 60.0)})
        correctness.judge(section)

    assert record.section("correctness", 1.0, check) == status
    first, second = record.data["sections"]["correctness"]["rows"]
    assert (first["exit_code"], first["said"]) == (code, ["Device not supported"])
    assert (second["exit_code"], second["found"]) == (None, False)


def test_program_that_takes_too_long_is_stopped_with_its_children(tmp_path: Path) -> None:
    child = "import os, sys, time; print(os.getpid(), flush=True); time.sleep(60)"
    running = background(tmp_path, f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])")
    while not running.text().strip():
        assert running.process.poll() is None
    assert running.wait(0.0) is None
    gone = Path("/proc", running.text().strip())
    # a dead child of nobody is collected at once or a little later
    assert any(not gone.exists() for _ in range(1_000_000))


@pytest.mark.parametrize("program", ["raise SystemExit(1)", "import time; time.sleep(60)"])
def test_module_of_an_earlier_build_is_gone_where_this_one_failed(tmp_path: Path, program: str) -> None:
    module = tmp_path / "module.so"
    module.write_text("other sources")
    facts = build_module.finish(background(tmp_path, program), 60.0 if "Exit" in program else 0.0, module)
    assert not module.exists()
    assert facts["note"] == "the extensions were not built (log): Triton and the vendor's kernels run alone"


def test_module_that_was_built_stays(tmp_path: Path) -> None:
    module = tmp_path / "module.so"
    module.write_text("these sources")
    assert build_module.finish(background(tmp_path, "pass"), 60.0, module)["exit_code"] == 0
    assert module.exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_machine_without_a_gpu_is_told_so_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check_program.main(["--no-build", "--out", str(tmp_path)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"error[DEVICE]: torch {torch.__version__} finds no GPU it can use")
    assert captured.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
