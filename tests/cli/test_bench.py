"""`pyruntime bench` through `run`: every field against independent sums, and what people read; no time is required."""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from pyruntime import DropPlan
from pyruntime.bench import ceilings, shapes
from pyruntime.cli.main import run
from pyruntime.graph import Cost, SequenceWork
from tests.helpers import make_plan

TextModel = tuple[Path, Any]
Capture = pytest.CaptureFixture[str]


def succeed(capsys: Capture, *arguments: object) -> str:
    """Standard output of a command that must succeed and say nothing on standard error."""
    code = run([str(each) for each in arguments])
    out, err = capsys.readouterr()
    assert (code, err) == (0, "")
    return out


def stored_sizes(folder: Path) -> dict[str, int]:
    """Number of values of every tensor, as the safetensors library reads the file."""
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name).numel() for name in file.keys()}  # noqa: SIM118 - no mapping


@pytest.fixture
def small_ceiling(monkeypatch: pytest.MonkeyPatch) -> None:
    """The probe reads two megabytes, not a gigabyte, and is quick."""
    monkeypatch.setattr(ceilings, "_BUFFER_BYTES", 1 << 21)
    monkeypatch.setattr(ceilings, "_SECONDS", 1e-3)


SHARED_FIELDS = (
    "model_filename model_type model_size model_n_params n_threads commit read_probe multiply_probe dtype target "
    "n_layer drop_attn_list drop_mlp_list plan_steps "
    "kv_bytes_per_token gate_nmse gate_limit gate_oracle device test_time command "
    "cpu_info gpu_info num_cores torch python pyruntime"
).split()


def check_shared(found: dict[str, Any], folder: Path) -> None:
    assert set(SHARED_FIELDS) <= set(found)
    assert found["model_filename"] == str(folder)
    assert (found["n_layer"], found["drop_attn_list"], found["dtype"]) == (4, [1], "float32")
    assert 0 <= found["gate_nmse"] <= found["gate_limit"]


def check_fractions(found: dict[str, Any], seconds: list[float]) -> None:
    """Each sample beside the ceilings around it, the median of both."""
    for what, ceiling, fraction, per_second in (
        ("bytes", "read_bandwidth", "fraction_of_read_bandwidth", "read_bandwidth_bytes_per_second"),
        ("flops", "multiply_rate", "fraction_of_matmul_rate", "matmul_flops_per_second"),
    ):
        rates = found[f"samples_{ceiling}"]
        assert found[per_second] == statistics.median(rates)
        fractions = [found[what] / each / rate for each, rate in zip(seconds, rates, strict=True)]
        assert found[fraction] == pytest.approx(statistics.median(fractions))
        assert found[f"p20_{fraction}"] <= found[f"p50_{fraction}"] <= found[f"p80_{fraction}"]
        assert found[f"p50_{fraction}"] == pytest.approx(found[fraction])


def check_moved(found: dict[str, Any], folder: Path, seconds: list[float], num_prompts: int) -> None:
    """The whole load of prompts of four tokens, three new tokens each: the prompts, then two decode steps."""
    plan = make_plan(folder, DropPlan(attention=(1,)))
    costs = [plan.total_cost([SequenceWork(0, 4)] * num_prompts)]
    costs += [plan.decode_cost(num_prompts, context) for context in (4, 5)]
    assert found["bytes"] == sum(cost.num_bytes for cost in costs)
    assert found["flops"] == sum(cost.flops for cost in costs)
    check_fractions(found, seconds)


@pytest.mark.usefixtures("small_ceiling")
def test_bench_latency(capsys: Capture, text_model: TextModel, tmp_path: Path) -> None:
    sizes = ["--input-len", 4, "--output-len", 3, "--batch-size", 2, "--num-iters", 3, "--num-iters-warmup", 1]
    command = ["bench", "latency", text_model[0], *sizes, "--drop-attn", "1", "--output-json", tmp_path / "out.json"]
    found = json.loads(succeed(capsys, *command, "--json"))
    check_shared(found, text_model[0])
    assert json.loads((tmp_path / "out.json").read_text()) == found
    assert len(found["latencies"]) == 3
    assert found["avg_latency"] == pytest.approx(sum(found["latencies"]) / 3)
    assert list(found["percentiles"]) == ["10", "25", "50", "75", "90", "99"]
    assert found["percentiles"]["50"] == sorted(found["latencies"])[1]
    assert (found["input_len"], found["output_len"]) == (4, 3)
    assert found["p20_latency"] <= found["p50_latency"] == found["percentiles"]["50"] <= found["p80_latency"]
    check_moved(found, text_model[0], found["latencies"], 2)
    text = succeed(capsys, *command)
    assert text.startswith("gate: NMSE ")
    assert "Avg latency: " in text
    assert f"Must move {found['bytes'] / 1e6:.2f} MB and compute {found['flops'] / 1e6:.1f} MFLOP: " in text


@pytest.mark.usefixtures("small_ceiling")
def test_bench_throughput(capsys: Capture, text_model: TextModel) -> None:
    sizes = ["--input-len", 4, "--output-len", 3, "--num-prompts", 5, "--num-iters", 3]
    command = ["bench", "throughput", text_model[0], *sizes, "--drop-attn", "1"]
    found = json.loads(succeed(capsys, *command, "--json"))
    check_shared(found, text_model[0])
    assert (found["num_requests"], found["total_num_tokens"]) == (5, 35)
    assert found["requests_per_second"] == pytest.approx(5 / found["elapsed_time"])
    assert found["tokens_per_second"] == pytest.approx(35 / found["elapsed_time"])
    assert found["output_tokens_per_second"] == pytest.approx(15 / found["elapsed_time"])
    assert found["elapsed_time"] == sorted(found["elapsed_times"])[1] == found["p50_elapsed_time"]
    check_moved(found, text_model[0], found["elapsed_times"], 5)
    gate, line, seconds, moved = succeed(capsys, *command).splitlines()
    assert gate.startswith("gate: NMSE ")
    assert line.startswith("Throughput: ")
    assert line.endswith(" output tokens/s")
    assert seconds.startswith("Seconds p20 / p50 / p80: ")
    assert moved.startswith("Must move ")


FORWARD = ["-p", "6,9", "-n", 3, "-b", 1, "-b", 2, "-d", 11, "-r", 4]


@pytest.mark.usefixtures("small_ceiling")
def test_bench_forward(capsys: Capture, text_model: TextModel) -> None:
    plan = make_plan(text_model[0], DropPlan(attention=(1,)))
    command = ["bench", "forward", text_model[0], *FORWARD, "--drop-attn", "1", "--json"]
    results = json.loads(succeed(capsys, *command))
    assert [each["test"] for each in results] == ["pp6", "pp9", "tg3 @ d11", "tg3 b2 @ d11"]
    costs = [plan.prefill_cost(6), plan.prefill_cost(9)]
    costs += [sum((plan.decode_cost(batch, 11 + i) for i in range(3)), Cost()) for batch in (1, 2)]
    for found, num_tokens, cost in zip(results, (6, 9, 3, 6), costs, strict=True):
        check_shared(found, text_model[0])
        assert len(found["samples_ns"]) == len(found["samples_ts"]) == 4
        assert found["avg_ns"] == pytest.approx(sum(found["samples_ns"]) / 4, abs=1)
        middle = sum(sorted(found["samples_ns"])[1:3]) / 2
        assert found["median_ts"] == pytest.approx(num_tokens / middle * 1e9, rel=1e-3)
        assert found["p20_ts"] <= found["median_ts"] <= found["p80_ts"]
        assert (found["bytes"], found["flops"]) == (cost.num_bytes, cost.flops)
        check_fractions(found, [num_tokens / per_second for per_second in found["samples_ts"]])
    facts = [tuple(each[f"n_{name}"] for name in ("prompt", "gen", "depth", "batch")) for each in results]
    assert facts == [(6, 0, 0, 1), (9, 0, 0, 1), (0, 3, 11, 1), (0, 3, 11, 2)]
    gone = ("layers.1.self_attn", "layers.1.input_layernorm")
    sizes = stored_sizes(text_model[0])
    kept = sum(size for name, size in sizes.items() if not any(part in name for part in gone))
    for each in results:
        assert each["model_n_params"] == kept
        # a target may pad what it lays out anew
        assert 4 * kept <= each["model_size"] <= 4.4 * kept


@pytest.mark.usefixtures("small_ceiling")
def test_bench_forward_prints_the_columns_of_llama_bench_and_ours(capsys: Capture, text_model: TextModel) -> None:
    command = ["bench", "forward", text_model[0], *FORWARD, "--drop-attn", "1", "--drop-mlp", "0,2"]
    lines = succeed(capsys, *command, "--target", "reference").splitlines()
    head, rule, *rows = lines[:6]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in (head, *rows)]
    assert cells[0][:7] == ["model", "size", "params", "backend", "threads", "test", "t/s"]
    assert cells[0][7:] == ["p20 / p50 / p80", "dropped", "KV B/token", "MB", "GFLOP", "of ceiling"]
    # a table for programs that read Markdown: all lines are as wide as the widest
    assert {len(line) for line in lines[:6]} == {len(rule)}
    assert set(rule) == set("|-:")
    assert [row[5] for row in cells[1:]] == ["pp6", "pp9", "tg3 @ d11", "tg3 b2 @ d11"]
    for row in cells[1:]:
        assert row[0] == f"llama {text_model[0].name} float32"
        assert (row[3], row[8], row[9]) == ("reference", "1 attn, 2 mlp", str(3 * 2 * 2 * 8 * 4))
        assert re.fullmatch(r"\d+\.\d\d ± \d+\.\d\d", row[6])
        assert re.fullmatch(r"[\d.]+% (read|multiply)", row[12])
    assert [row[12].split()[1] for row in cells[1:]] == ["multiply", "multiply", "read", "read"]
    assert lines[6] == ""
    assert lines[7].startswith("gate: NMSE ")
    assert re.match(r"ceilings: read [\d.]+-[\d.]+ GB/s \(.+\), multiply [\d.]+-[\d.]+ GFLOP/s \(", lines[8])


@pytest.mark.usefixtures("small_ceiling")
def test_bench_forward_prints_a_table_for_terminals_and_json(
    capsys: Capture, text_model: TextModel, tmp_path: Path
) -> None:
    command = ["bench", "forward", text_model[0], "-p", 6, "-n", 0, "-r", 2, "--output-json", tmp_path / "out.json"]
    text = succeed(capsys, *command, "-o", "table")
    assert "of read" in text
    # nothing is cut at the 80 columns of a pipe
    assert "…" not in text
    (found,) = json.loads((tmp_path / "out.json").read_text())
    assert (found["test"], found["n_gen"]) == ("pp6", 0)
    assert [each["test"] for each in json.loads(succeed(capsys, *command, "-o", "json"))] == ["pp6"]


@pytest.mark.usefixtures("small_ceiling")
def test_bench_forward_of_a_shape(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    path = Path(shapes.__file__).parent / "model_shapes" / "smollm2-135m.json"
    sizes = {"hidden_size": 32, "ffn_size": 48, "num_layers": 3, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8}
    rope = {"kind": "default", "dim": 8, "theta": 10000.0}
    shape = {**json.loads(path.read_text()), **sizes, "vocab_size": 61, "max_position": 32, "rope": rope}
    monkeypatch.setattr("pyruntime.bench.run.shape_spec", lambda name: shapes.parse_shape(shape).spec())
    command = ["bench", "forward", "--shape", "small", "-p", 5, "-n", 2, "-r", 2, "--drop-attn", "1", "--json"]
    for flags, dtype in (([], "bfloat16"), (["--dtype", "float32"], "float32")):
        results = json.loads(succeed(capsys, *command, *flags))
        assert [each["test"] for each in results] == ["pp5", "tg2"]
        assert {(each["model_filename"], each["dtype"], each["n_layer"]) for each in results} == {("small", dtype, 3)}
        assert [each["drop_attn_list"] for each in results] == [[1], [1]]


def test_bench_shapes_lists_what_forward_takes(capsys: Capture) -> None:
    found = {each["name"]: each for each in json.loads(succeed(capsys, "bench", "shapes", "--json"))}
    assert set(found) == set(shapes.shape_names())
    # its published number of parameters
    assert found["tinyllama-1.1b"]["n_params"] == 1_100_048_384
    lines = succeed(capsys, "bench", "shapes").splitlines()
    assert [line.split()[0] for line in lines] == list(shapes.shape_names())
    assert "1.10 B    2.05 GiB in bfloat16  22 layers" in next(line for line in lines if "tinyllama" in line)
