"""gpu-check's arithmetic: floors against published ones, bars, tables and choice tables of made-up measurements."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import kernels, report
from benchmarks.gpu.bars import bars
from benchmarks.gpu.decode import memory_of
from benchmarks.gpu.record import CUT, DONE, FAILED
from benchmarks.gpu.settings import VARIANTS, full, variant
from pyruntime.bench import shape_spec
from pyruntime.graph import Cost, SequenceWork, build, cost_of, fuse
from pyruntime.ops.gpu.choose import choices_of, load_table
from pyruntime.ops.gpu.device import GpuInfo

# milliseconds at 4.3 TB/s and 790 TFLOP/s, and what half the attentions dropped, Q and P merged, and both allow:
# computed from the published shapes by hand, before this project existed
FLOORS = [
    ("llama-2-7b", 1, 512, 3.14, (1.20, 1.19, 1.33)),
    ("llama-2-7b", 8, 4096, 7.07, (1.55, 1.08, 1.64)),
    ("llama-2-7b", 64, 512, 7.07, (1.55, 1.08, 1.64)),
    ("llama-2-13b", 1, 512, 6.08, (1.20, 1.19, 1.33)),
    ("llama-3-8b", 1, 512, 3.51, (1.10, 1.17, 1.19)),
    ("llama-3-8b", 8, 512, 3.62, (1.12, 1.16, 1.21)),
    ("llama-3-8b", 64, 4096, 11.5, (1.60, 1.05, 1.66)),
    ("mistral-7b", 1, 4096, 3.43, (1.12, 1.17, 1.22)),
    ("qwen2.5-7b", 64, 4096, 6.78, (1.40, 1.05, 1.45)),
    ("llama-3.2-1b", 1, 512, 0.58, (1.08, 1.12, 1.14)),
    ("llama-3.2-1b", 1, 4096, 0.61, (1.10, 1.11, 1.17)),
    ("qwen2.5-0.5b", 1, 512, 0.23, (1.05, 1.08, 1.09)),
    ("qwen2.5-0.5b", 1, 4096, 0.24, (1.07, 1.08, 1.12)),
]


def step_cost(name: str, form: str, batch: int, context: int) -> Cost:
    nodes = fuse(build(variant(shape_spec(name), form))).nodes
    return sum(cost_of(nodes, [SequenceWork(context - 1, 1)], 2, copies=batch).values(), Cost())


@pytest.mark.parametrize(("name", "batch", "context", "milliseconds", "allowed"), FLOORS)
def test_bytes_of_a_step_are_those_of_the_published_shape(
    name: str, batch: int, context: int, milliseconds: float, allowed: tuple[float, float, float]
) -> None:
    costs = {form: step_cost(name, form, batch, context) for form in VARIANTS}
    # as many digits as were written down
    assert costs["dense"].num_bytes / 4.3e12 * 1e3 == pytest.approx(milliseconds, rel=0.005, abs=0.005)
    for form, ratio in zip(VARIANTS[1:], allowed, strict=True):
        assert costs["dense"].num_bytes / costs[form].num_bytes == pytest.approx(ratio, abs=0.0051), form


@pytest.mark.parametrize(
    ("name", "form", "batch", "context", "fits"),
    [
        ("llama-2-7b", "dense", 8, 4096, True),
        ("llama-2-7b", "dense", 64, 4096, False),
        ("llama-2-7b", "half", 64, 4096, True),
        ("llama-2-7b", "half", 64, 32768, False),
        ("llama-3-8b", "dense", 64, 4096, True),
        ("llama-3-8b", "half", 64, 32768, False),
    ],
)
def test_cells_that_do_not_fit_are_known_before(name: str, form: str, batch: int, context: int, fits: bool) -> None:
    weights, cache = memory_of(variant(shape_spec(name), form), batch, context, 2)
    assert (weights + cache <= 0.95 * 139 * 2**30) is fits


def test_every_model_of_the_full_run_has_room_behind_its_longest_context() -> None:
    settings = full()
    room = settings.warmup + settings.replays + 2
    for spec in settings.models.values():
        assert spec.max_position >= max(settings.contexts) + room
    assert len(settings.tail.layers) == 80
    assert settings.models["llama-3-8b"].max_position >= max(settings.prefill_lengths)


def step(model: str, form: str, batch: int, context: int, seconds: float, floor: float) -> dict[str, Any]:
    where = {"model": model, "variant": form, "batch": batch, "context": context}
    return {**where, "seconds": [[seconds * 0.99, seconds], [seconds, seconds * 1.01]], "floor_seconds": floor}


def made_up(**sections: Any) -> dict[str, Any]:
    filled = {name: {"status": DONE, "cut": [], "rows": [], **each} for name, each in sections.items()}
    return {"sections": filled}


MEASURED = made_up(
    ceilings={
        "rows": [
            {"name": "copy", "seconds": 2e-3, "bytes_per_second": 4.3e12},
            {"name": "read", "seconds": 2e-3, "bytes_per_second": 4.5e12},
            {"name": "multiply", "seconds": 1e-3, "flops_per_second": 790e12},
            {"name": "graph node", "seconds": 1.3e-6},
            {"name": "graph node, dependent launch", "seconds": None, "why": "the chip has none"},
        ]
    },
    decode={
        "rows": [
            step("llama-3-8b", "dense", 1, 512, 4.0e-3, 3.51e-3),
            # 1.081 of 1.10 allowed: 98.3 %
            step("llama-3-8b", "half", 1, 512, 3.7e-3, 3.51e-3 / 1.10),
            # 1.111 of 1.17: 95 %
            step("llama-3-8b", "merged", 1, 512, 3.6e-3, 3.51e-3 / 1.17),
            step("qwen2.5-0.5b", "dense", 1, 512, 0.5e-3, 0.23e-3),
        ]
    },
    baselines={
        "rows": [
            {"peer": "compiled", "model": "llama-3-8b", "variant": "dense", "context": 512, "seconds": [[4.6e-3]]},
            {"peer": "compiled", "model": "qwen2.5-0.5b", "variant": "dense", "context": 512, "seconds": [[0.6e-3]]},
            {"peer": "transformers", "model": "llama-3-8b", "variant": "dense", "context": 512, "seconds": [[28e-3]]},
            {"peer": "transformers", "model": "llama-3-8b", "variant": "half", "context": 512, "seconds": [[20e-3]]},
        ]
    },
    prefill={
        "rows": [
            # 600 of 790 TFLOP/s; 99 % of the other
            {"model": "llama-3-8b", "length": 4096, "seconds": [0.1], "torch_seconds": [0.099], "flops": 60e12}
        ]
    },
    tail={
        "measured": 1.6,
        "predicted": 1.75,
        "layers": 80,
        "kept": 45,
        "rows": [{"variant": "dense", "seconds": [0.16]}, {"variant": "dropped", "seconds": [0.1]}],
    },
    long={"rows": [step("llama-2-7b", form, 32, 4096, t, t) for form, t in (("dense", 0.018), ("half", 0.01))]},
    kernels={
        "rows": [
            {"shape": "llama-3-8b", "label": "attention", "op": "attention", "rows": 16, "context": 1024}
            | {"bytes": 67108864, "seconds": {"triton": 67108864 / 4.05e12, "torch": 1e-6}},
            # small enough to be no part of the bar
            {"shape": "llama-3-8b", "label": "attention", "op": "attention", "rows": 1, "context": 512}
            | {"bytes": 2097152, "seconds": {"triton": 5e-6}},
        ]
    },
)


def test_bars_are_met_missed_or_not_measured() -> None:
    found = {(each["bar"], each["wanted"]): (each["measured"], each["met"]) for each in bars(MEASURED)}
    by_name = {name: value for (name, _), value in found.items()}
    assert by_name["Llama-3-8B dense, batch 1, context 512"] == ("4.00 ms", True)
    beside = " dense beside the compiled PyTorch decoder"
    assert by_name[f"llama-3-8b{beside}"] == ("1.15x", True)
    assert by_name[f"qwen2.5-0.5b{beside}"] == ("1.20x", False)
    assert by_name[f"llama-3.2-1b{beside}"] == (None, None)
    where = "llama-3-8b batch 1 context 512"
    assert by_name["half the attentions dropped"] == (f"1 of 1 cells; worst 98% ({where})", True)
    assert by_name["Q and P merged away"] == (f"0 of 1 cells; worst 95% ({where})", False)
    assert by_name["decode attention from 64 MB of keys and values on"] == ("90% to 90%", True)
    prompts = [value for (name, _), value in found.items() if name.startswith("prefill")]
    assert prompts == [("99%", True), ("76%", True)]
    assert ("1.60x of 1.75x: 91%", False) in found.values()
    assert by_name["Llama-2-7B, batch 32, context 4096, half the attentions dropped"] == ("1.80x", True)
    assert all(each["met"] is None and each["measured"] is None for each in bars(made_up()))


def test_tables_say_what_was_measured_beside_what_is_allowed() -> None:
    text = report.printed(report.tables({**MEASURED, "bars": bars(MEASURED)}))
    words = re.sub(r" {2,}", " | ", text)
    assert "llama-3-8b | 1 | 512 | 4 (3.98-4.02) | 88% | 3.7, 1.08x of 1.10x | 3.6, 1.11x of 1.17x" in words
    assert "transformers, eager | llama-3-8b | half | 20 (20-20) | 1.40x | 3.7 | 5.41x" in words
    assert "llama-3-8b | 4096 | 100 | 600 | 76% | 99 | 0.99x" in words
    assert "graph node, dependent launch | the chip has none" in words
    assert "graph node | 1.3 us" in words
    assert "80 | 35 | 160 | 100 | 1.60x | 1.75x" in words
    assert "llama-2-7b | 32 | 4096 | 18 (17.9-18.1) | 100% | 10, 1.80x of 1.80x" in words


def test_choice_table_names_the_fastest_backend_of_each_node_and_number_of_rows() -> None:
    node = {"op": "linear", "weights": 64, "outputs": 8, "inputs": 8}
    rows = [
        {**node, "rows": 1, "seconds": {"triton": 2e-6, "vendor": 3e-6, "torch": 1e-6}},
        {**node, "rows": 16, "seconds": {"triton": 4e-6, "vendor": 3e-6, "torch": 1e-6}},
        # Triton is faster once, and slower by more the other time
        {**node, "op": "attention", "rows": 1, "seconds": {"triton": 2e-6, "cuda": 4e-6, "torch": 1e-6}},
        {**node, "op": "attention", "rows": 64, "seconds": {"triton": 90e-6, "cuda": 80e-6}},
        # nothing to choose from
        {**node, "op": "head", "rows": 1, "seconds": {"triton": 2e-6, "torch": 1e-6}},
    ]
    attention = {"op": "attention", "weights": 0, "max_rows": None, "backend": "cuda"}
    assert kernels.choices(rows) == [
        {**attention, "microseconds": {"cuda": 84.0, "triton": 92.0}},
        {**node, "max_rows": 1, "backend": "triton", "microseconds": {"triton": 2.0, "vendor": 3.0}},
        {**node, "max_rows": 16, "backend": "vendor", "microseconds": {"triton": 4.0, "vendor": 3.0}},
        {**node, "max_rows": None, "backend": "vendor", "microseconds": {}},
    ]


def test_sections_that_are_not_whole_are_told() -> None:
    data = made_up(decode={"status": CUT, "cut": ["a", "b"]}, tail={"status": FAILED, "error": "RuntimeError: full"})
    data["build"] = {"note": "there is no nvcc"}
    assert report.state(data) == ["there is no nvcc", "decode cut: no time for a, b", "tail failed: RuntimeError: full"]


def test_choice_table_is_read_by_plans(tmp_path: Path) -> None:
    node = {"op": "linear", "weights": 64, "outputs": 8, "inputs": 8}
    lines = kernels.choices([{**node, "rows": 4, "seconds": {"triton": 3e-6, "cuda": 2e-6, "vendor": 4e-6}}])
    (tmp_path / "some-card.json").write_text(json.dumps({"choices": lines}))
    info = GpuInfo("Some Card", 90, 132)
    found = choices_of("linear", 60, info, load_table(info, tmp_path))
    assert found is not None
    assert [found.at(rows).backend for rows in (1, 4, 5, 1000)] == ["cuda", "cuda", "vendor", "vendor"]
