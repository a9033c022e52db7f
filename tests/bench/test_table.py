"""The README's table and the ledger from crafted result files, and that those of this checkout are up to date."""

from __future__ import annotations

import csv
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
GPU_MARKERS = "<!-- gpu:begin -->\nold too\n<!-- gpu:end -->\n"
RESULT_MARKERS = "<!-- results:begin -->\nold\n<!-- results:end -->\n"
README = f"# Title\n\ntext before\n\n{RESULT_MARKERS}\ntext between\n\n{GPU_MARKERS}\ntext behind\n"
NOT_MEASURED = "<!-- gpu:begin -->\n\nNot yet measured.\n\n<!-- gpu:end -->\n"
MACHINE = {"cpu_info": "A Processor", "num_cores": 4, "memory_bytes": 16 << 30, "gpu_info": ["A Card"]}
DECODE = {"case": "decode, batch 1, context 8", "dtype": "float32"}
PREFILL = {"case": "prefill, 64 tokens", "dtype": "float32"}
# p20, p50 and p80 of five: between neighbours by a fifth; the ratios of neighbours are 6, 3, 2, 3 and 40
FAST = [0.001, 0.002, 0.003, 0.004, 0.005]
SLOW = [0.006, 0.006, 0.006, 0.012, 0.2]
ROWS: dict[str, list[dict[str, Any]]] = {
    "drops": [
        {**DECODE, "pattern": "last:2", "pruned_seconds": FAST, "dense_seconds": SLOW, "predicted": 1.5}
        | {"fraction_of_read_bandwidth": 0.25}
    ],
    "transformers": [
        {**DECODE, "model": "/somewhere/model-a", "target": "cpu", "drop_attn_list": [1, 2]}
        | {"pyruntime_seconds": FAST, "transformers_seconds": SLOW, "fractions_of_read_bandwidth": [0.5, 0.1]},
        {**PREFILL, "model": "shape-a", "target": "cpu", "drop_attn_list": [], "pyruntime_seconds": SLOW}
        | {"transformers_seconds": FAST, "fractions_of_read_bandwidth": [0.5, 0.1]}
        | {"fractions_of_multiply_rate": [0.75, 0.2]},
    ],
    "sample": [
        {"case": "top-p 0.9", "vocab": 32000, "rows": 8, "native_seconds": FAST, "reference_seconds": SLOW, "bytes": 1}
    ],
    "shapes": [
        {**DECODE, "model": "shape-b", "target": "cpu", "dense_seconds": FAST, "fraction_of_ceiling": 0.9},
        {**PREFILL, "model": "shape-b", "target": "cpu", "dense_seconds": SLOW, "pruned_seconds": FAST}
        | {"pattern": "0-3", "predicted": 2.0, "fraction_of_ceiling": 0.4},
    ],
}


@pytest.fixture(scope="module")
def table() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmarks_table", ROOT / "benchmarks" / "table.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    (tmp_path / "README.md").write_text(README)
    return tmp_path


def result(root: Path, name: str, rows: list[dict[str, Any]], **other: Any) -> Path:
    path = root / "benchmarks" / "results" / f"{name}.json"
    command = ["/home/someone/checkout/benchmarks/models/bench.py", "models/model-b", "--out", "/tmp/x y"]
    about = {"commit": "abc1234", "command": command, "time": "2026-01-02T03:04:05+00:00", "machine": MACHINE}
    path.write_text(json.dumps({**about, "rows": rows, **other}))
    return path


def written(table: ModuleType, root: Path) -> str:
    """README.md after a run that must succeed and leave nothing to do."""
    assert table.main([], root) == 0
    assert table.main(["--check"], root) == 0
    return (root / "README.md").read_text()


def test_this_checkout_is_up_to_date(table: ModuleType) -> None:
    assert table.main(["--check"]) == 0


@pytest.mark.parametrize(
    ("kind", "lines"),
    [
        (
            "drops",
            [
                "| model | case | ms p50 (p20-p80) | dense ms | ratio | predicted | of ceiling |",
                "|---|---|---:|---:|---:|---:|---:|",
                "| model-b float32 | decode, batch 1, context 8, attention last:2 dropped | 3 (1.8-4.2) | 6 (6-49.6) "
                "| 3.00x | 1.50x | 25% read |",
            ],
        ),
        (
            "transformers",
            [
                "| model | case | ms p50 (p20-p80) | transformers ms | ratio | of ceiling |",
                "|---|---|---:|---:|---:|---:|",
                "| model-a float32 cpu | decode, batch 1, context 8, attention 1, 2 dropped | 3 (1.8-4.2) | 6 (6-49.6) "
                "| 3.00x | 50% read |",
                "| shape-a float32 cpu | prefill, 64 tokens | 6 (6-49.6) | 3 (1.8-4.2) | 0.33x | 75% multiply |",
            ],
        ),
        (
            "sample",
            [
                "| model | case | ms p50 (p20-p80) | reference ms | ratio |",
                "|---|---|---:|---:|---:|",
                "| sampler float32 cpu | top-p 0.9, 8 x 32000 logits | 3 (1.8-4.2) | 6 (6-49.6) | 3.00x |",
            ],
        ),
        (
            "shapes",
            [
                "| model | case | ms p50 (p20-p80) | dense ms | ratio | predicted | of ceiling |",
                "|---|---|---:|---:|---:|---:|---:|",
                "| shape-b float32 cpu | decode, batch 1, context 8 | 3 (1.8-4.2) |  |  |  | 90% read |",
                "| shape-b float32 cpu | prefill, 64 tokens, attention 0-3 dropped | 3 (1.8-4.2) | 6 (6-49.6) "
                "| 3.00x | 2.00x | 40% multiply |",
            ],
        ),
    ],
)
def test_each_kind_has_its_table(table: ModuleType, root: Path, kind: str, lines: list[str]) -> None:
    result(root, f"2026-01-02-abc1234-{kind}-model-float32-2", ROWS[kind])
    text = written(table, root)
    assert text.startswith("# Title\n\ntext before\n\n<!-- results:begin -->\n")
    assert text.endswith(f"\n<!-- results:end -->\n\ntext between\n\n{NOT_MEASURED}\ntext behind\n")
    assert "old" not in text
    assert "\n".join(lines) in text
    # the machine, the commit and the command, without the folders of whoever ran it
    assert "(A Processor, 4 cores, 16 GiB, A Card; commit abc1234; 2026-01-02)" in text
    assert "`python benchmarks/models/bench.py models/model-b --out 'x y'`" in text
    assert "/home" not in text


def test_the_table_has_the_newest_run_of_a_command_and_the_ledger_all(table: ModuleType, root: Path) -> None:
    old = [{**ROWS["drops"][0], "predicted": 7.0}]
    result(root, "2026-01-03-abc1234-drops", ROWS["drops"], time="2026-01-03T00:00:00+00:00")
    result(root, "2026-01-02-bbb1234-drops", old, commit="bbb1234")
    result(root, "2026-01-02-unknown-drops", old, commit="", command=["benchmarks/models/bench.py", "other"])
    text = written(table, root)
    assert text.count("**A pruned model") == 2
    assert "commit bbb1234" not in text
    assert "commit unknown" in text
    with (root / "benchmarks" / "results" / "ledger.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["date"], row["commit"], row["model"]) for row in rows] == [
        ("2026-01-02", "bbb1234", "model-b"),
        ("2026-01-02", "", "other"),
        ("2026-01-03", "abc1234", "model-b"),
    ]
    last = rows[-1]
    assert (last["kind"], last["case"]) == ("drops", "decode, batch 1, context 8, attention last:2 dropped")
    assert [float(last[f"p{percent}_seconds"]) for percent in (20, 50, 80)] == pytest.approx([0.0018, 0.003, 0.0042])
    assert (last["against"], float(last["ratio"]), float(last["predicted"])) == ("dense", 3.0, 1.5)
    assert (last["fraction"], last["ceiling"]) == ("0.25", "read")
    assert last["machine"] == "A Processor, 4 cores, 16 GiB, A Card"


def test_what_is_stale_is_named_and_not_touched(
    table: ModuleType, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result(root, "2026-01-02-abc1234-drops", ROWS["drops"])
    assert table.main(["--check"], root) == 1
    err = capsys.readouterr().err
    assert "README.md is not up to date; run python benchmarks/table.py" in err
    assert "ledger.csv is not up to date" in err
    assert (root / "README.md").read_text() == README
    text = written(table, root)
    for stale in (text.replace("3.00x", "2.00x"), text.replace("abc1234", "abc1235")):
        (root / "README.md").write_text(stale)
        assert table.main(["--check"], root) == 1
    # text around the markers is nobody's business
    (root / "README.md").write_text(text.replace("text behind", "other text"))
    assert table.main(["--check"], root) == 0


def test_without_results_the_table_is_empty(table: ModuleType, root: Path) -> None:
    assert "<!-- results:begin -->\n\n\n\n<!-- results:end -->" in written(table, root)


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("2026-01-02-abc1234-guesses", {}, "is of the unknown kind 'guesses'; expected one of transformers, drops, "),
        ("drops", {}, "has no DATE-COMMIT-KIND name"),
        ("2026-01-02-abc1234-drops", {"rows": [{}]}, "is no result file (KeyError: "),
        ("2026-01-02-abc1234-drops", {"rows": [{**ROWS["drops"][0], "pruned_seconds": []}]}, "a row without samples"),
        ("2026-01-02-abc1234-drops", {"rows": 3}, "is no result file (TypeError: "),
        ("2026-01-02-abc1234-drops", {"command": []}, "is no result file (IndexError: "),
        ("2026-01-02-abc1234-drops", {"machine": {}}, "is no result file (KeyError: 'memory_bytes'"),
    ],
)
def test_a_bad_result_file_is_named(
    table: ModuleType, root: Path, capsys: pytest.CaptureFixture[str], name: str, change: dict[str, Any], said: str
) -> None:
    result(root, name, **{"rows": ROWS["drops"], **change})
    for flags in ([], ["--check"]):
        assert table.main(flags, root) == 2
        err = capsys.readouterr().err
        assert err.startswith(f"error[RESULTS]: {name}.json ")
        assert said in err
        assert err.count("\n") == 1
    assert (root / "README.md").read_text() == README


@pytest.mark.parametrize(
    "readme",
    [
        GPU_MARKERS,
        f"<!-- results:begin -->{GPU_MARKERS}",
        f"<!-- results:end --> <!-- results:begin -->{GPU_MARKERS}",
        README + README,
    ],
)
def test_markers_that_are_not_there_once_are_said(
    table: ModuleType, root: Path, capsys: pytest.CaptureFixture[str], readme: str
) -> None:
    (root / "README.md").write_text(readme)
    assert table.main([], root) == 2
    assert capsys.readouterr().err.startswith("error[README]: README.md does not have <!-- results:begin --> and")
    assert (root / "README.md").read_text() == readme


def test_markers_of_the_gpu_table_that_are_missing_are_said(
    table: ModuleType, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (root / "README.md").write_text(README.replace(GPU_MARKERS, ""))
    assert table.main([], root) == 2
    assert capsys.readouterr().err.startswith("error[README]: README.md does not have <!-- gpu:begin --> and")


def decode(variant: str, seconds: list[list[float]], floor: float) -> dict[str, Any]:
    cell = {"model": "shape-c", "variant": variant, "batch": 8, "context": 512}
    return {**cell, "seconds": seconds, "floor_seconds": floor}


def gpu_result(root: Path, name: str, **other: Any) -> Path:
    """A result file of gpu-check."""
    folder = root / "benchmarks" / "results" / "a-card"
    folder.mkdir(exist_ok=True)
    shown = {"title": "Bars", "columns": ["bar", "measured", ""], "rows": [["fast", "4.00 ms", "met"]], "detail": False}
    hidden = {"title": "Kernels", "columns": ["us"], "rows": [["7.5"]], "detail": True}
    cells = [decode("dense", [[0.004, 0.005], [0.006]], 0.004), decode("half", [[0.002, 0.002], [0.003]], 0.0016)]
    data = {
        "kind": "gpu",
        "correct": True,
        "tiny": False,
        "time": "2026-01-02T03:04:05+00:00",
        "commit": "abc1234",
        "command": ["benchmarks/gpu/check.py"],
        "machine": {**MACHINE, "torch": "2.11", "triton": "3.6"},
        "sections": {"decode": {"status": "cut", "cut": ["shape-d dense"], "rows": cells}},
        "tables": [shown, hidden],
        "state": ["decode cut: no time for shape-d dense"],
        **other,
    }
    path = folder / f"{name}.json"
    path.write_text(json.dumps(data))
    return path


def test_gpu_table_is_what_the_newest_run_told(table: ModuleType, root: Path) -> None:
    gpu_result(root, "2026-01-01-aaa", time="2026-01-01T00:00:00+00:00", commit="aaa", tables=[])
    gpu_result(root, "2026-01-02-abc1234")
    text = written(table, root)
    begin, end = text.index("<!-- gpu:begin -->"), text.index("<!-- gpu:end -->")
    assert text[begin:end] == (
        "<!-- gpu:begin -->\n\n"
        "**A Processor, 4 cores, 16 GiB, A Card** (torch 2.11, triton 3.6; commit abc1234; 2026-01-02; "
        "`make gpu-check`)"
        "\n\nBars\n\n| bar | measured |  |\n| --- | --- | --- |\n| fast | 4.00 ms | met |\n\n"
        "Not all of it was done: decode cut: no time for shape-d dense.\n\n"
    )


def test_decode_steps_of_a_gpu_are_in_the_ledger(table: ModuleType, root: Path) -> None:
    gpu_result(root, "2026-01-02-abc1234")
    written(table, root)
    with (root / "benchmarks" / "results" / "ledger.csv").open() as file:
        dense, half = csv.DictReader(file)
    assert (dense["kind"], dense["model"], dense["case"]) == ("gpu", "shape-c", "decode, batch 8, context 512, dense")
    assert (dense["p50_seconds"], dense["fraction"], dense["ceiling"], dense["ratio"]) == ("0.005", "0.8", "copy", "")
    # neighbours are 2, 2.5 and 2 times as fast; the bytes allow 2.5
    assert (half["against"], half["against_p50_seconds"], half["ratio"]) == ("dense", "0.005", "2")
    assert (half["predicted"], half["fraction"]) == ("2.5", "0.8")


@pytest.mark.parametrize("other", [{"correct": False}, {"correct": None}, {"tiny": True}, {"without": "tables"}])
def test_runs_that_prove_nothing_are_not_shown(table: ModuleType, root: Path, other: dict[str, Any]) -> None:
    path = gpu_result(root, "2026-01-02-abc1234", **other)
    if "without" in other:
        data = json.loads(path.read_text())
        path.write_text(json.dumps({name: each for name, each in data.items() if name != other["without"]}))
    assert NOT_MEASURED in written(table, root)


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"kind": "guess"}, "ValueError: its kind is 'guess'"),
        ({"tables": [{"title": "x"}]}, "KeyError: 'detail'"),
        ({"sections": {"decode": {"rows": [{"model": "x"}]}}}, "KeyError: "),
        ({"machine": {}}, "KeyError: 'memory_bytes'"),
    ],
)
def test_a_bad_result_file_of_a_gpu_is_named(
    table: ModuleType, root: Path, capsys: pytest.CaptureFixture[str], other: dict[str, Any], said: str
) -> None:
    gpu_result(root, "2026-01-02-abc1234", **other)
    assert table.main([], root) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error[RESULTS]: a-card/2026-01-02-abc1234.json is no result file of gpu-check ({said}")
    assert err.count("\n") == 1
