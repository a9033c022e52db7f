"""The report of a trade-off: gamma against the papers' table, saving and resuming, tables and pictures."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from pyruntime.errors import UsageError
from pyruntime.evaluate.plot import save_tradeoff, x_limits
from pyruntime.evaluate.tradeoff import Point, TradeoffReport, as_csv, gamma

ABOUT = {"key": "k", "model": "m"}


def point(target: str, count: int, speedup: float, perplexity: float, **more: Any) -> Point:
    layers = tuple(range(count))
    values: dict[str, Any] = {
        "target": target,
        "num_dropped": count,
        "drop_attn_list": layers if target != "mlp" else (),
        "drop_mlp_list": layers if target in ("mlp", "block") else (),
        "perplexity": perplexity,
        "perplexity_stderr": 1.0,
        "perplexity_change": perplexity / 20 - 1,
        "perplexity_change_stderr": 0.01,
        "bits_per_byte": 1.5,
        "accuracy": None,
        "accuracy_change": None,
        "tasks": {},
        "speedup": speedup,
        "speedup_p20": speedup - 0.02,
        "speedup_p80": speedup + 0.03,
        "predicted": speedup,
        "tokens_per_second": 100 * speedup,
        "dense_tokens_per_second": 100.0,
        "gate_nmse": 1e-9,
    }
    return Point(**values | more)


POINTS = [
    point("dense", 0, 1.0, 20.0),
    point("attn", 2, 1.1, 20.4),
    point("attn", 4, 1.25, 22.0),
    point("mlp", 2, 1.05, 24.0),
    point("mlp", 4, 1.2, 500.0),
    point("block", 2, 1.2, 30.0),
    point("joint", 3, 1.3, 23.0),
]


@pytest.mark.parametrize(
    ("dense", "pruned", "speedup", "printed"),
    # He et al. 2024, tables 1 to 3: Llama-2-13B Attn-8 and Attn-20, Mistral-7B MLP-8, Llama-3-70B Attn-40
    [(68.2, 68.1, 1.13, 0.01), (68.2, 64.9, 1.40, 0.08), (70.3, 53.4, 1.06, 2.82), (75.1, 73.3, 1.43, 0.04)],
)
def test_gamma_is_that_of_the_paper(dense: float, pruned: float, speedup: float, printed: float) -> None:
    assert gamma(dense - pruned, speedup) == pytest.approx(printed, abs=0.006)


def test_gamma_of_no_gain_is_none() -> None:
    assert gamma(1.0, 1.0) is None
    assert gamma(1.0, 0.9) is None


def test_gammas_of_a_point_are_in_percent() -> None:
    each = point("attn", 2, 1.25, 22.0, accuracy=0.60, accuracy_change=-0.05)
    # ten percent of perplexity, five points of accuracy, twenty-five percent of speed
    assert each.gamma_perplexity == pytest.approx(10 / 25)
    assert each.gamma == pytest.approx(5 / 25)
    assert POINTS[1].gamma is None


def test_a_killed_run_goes_on_and_measures_nothing_twice(tmp_path: Path) -> None:
    first = TradeoffReport(tmp_path, ABOUT)
    for each in POINTS[:3]:
        assert first.known(each.plan) is None
        first.add(each)
    # killed here; the next run asks for other points first
    second = TradeoffReport(tmp_path, ABOUT)
    assert second.known(POINTS[2].plan) == POINTS[2]
    second.add(POINTS[3])
    third = TradeoffReport(tmp_path, ABOUT)
    assert [third.known(each.plan) for each in POINTS[:4]] == POINTS[:4]
    third.add(POINTS[1])
    third.finish()
    saved = json.loads((tmp_path / "tradeoff.json").read_text())
    assert [each["num_dropped"] for each in saved["points"]] == [2]
    assert saved["points"][0]["gamma_perplexity"] == pytest.approx(2 / 10)


def test_a_report_of_another_model_text_or_setting_is_refused(tmp_path: Path) -> None:
    TradeoffReport(tmp_path, ABOUT).add(POINTS[1])
    with pytest.raises(UsageError, match=r"holds a report of .*; choose another folder, or remove it") as caught:
        TradeoffReport(tmp_path, {"key": "other"})
    assert caught.value.code == "OUTPUT"


@pytest.mark.parametrize(
    ("name", "content"),
    [("tradeoff.json", content) for content in ("", "{", "[]", '{"format": "pyruntime-tradeoff"}')]
    + [("tradeoff.csv", "a,b"), ("tradeoff.svg", "<svg/>")],
)
def test_a_foreign_file_is_refused_and_kept(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UsageError, match=f"{name}.*; choose another folder, or remove it"):
        TradeoffReport(tmp_path, ABOUT)
    assert (tmp_path / name).read_text() == content


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("speedup", "'fast'"),
        ("speedup", "1e999"),
        ("speedup", "true"),
        ("perplexity", "null"),
        ("num_dropped", "1.5"),
        ("num_dropped", "-1"),
        ("drop_attn_list", "[-1]"),
        ("drop_attn_list", '"01"'),
        ("drop_mlp_list", "3"),
        ("tasks", "[]"),
        ("tasks", '{"a": "b"}'),
        ("target", "3"),
    ],
)
def test_points_with_other_values_than_were_written_are_refused(tmp_path: Path, name: str, value: str) -> None:
    TradeoffReport(tmp_path, ABOUT).add(POINTS[1])
    path = tmp_path / "tradeoff.json"
    whole = json.loads(path.read_text())
    whole["points"][0][name] = "HERE"
    path.write_text(json.dumps(whole).replace('"HERE"', value.replace("'", '"')))
    with pytest.raises(UsageError, match=r"tradeoff.json .*choose another folder, or remove it"):
        TradeoffReport(tmp_path, ABOUT)


def test_the_csv_has_a_line_a_point_and_a_column_a_task() -> None:
    tasks = [
        dataclasses.replace(each, tasks={"endings": 0.4}, accuracy=0.4, accuracy_change=0.0) for each in POINTS[:2]
    ]
    rows = list(csv.DictReader(io.StringIO(as_csv([*tasks, *POINTS[2:]]))))
    assert len(rows) == len(POINTS)
    assert [row["acc_endings"] for row in rows[:3]] == ["0.4", "0.4", ""]
    assert rows[5]["drop_attn_list"] == rows[5]["drop_mlp_list"] == "0 1"
    assert float(rows[2]["speedup"]) == 1.25


def test_the_picture_names_its_curves_and_what_it_leaves_out(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra plot)")
    save_tradeoff(POINTS, tmp_path, title="a model", speed="decode, batch 8")
    assert (tmp_path / "tradeoff.png").read_bytes().startswith(b"\x89PNG")
    svg = (tmp_path / "tradeoff.svg").read_bytes()
    texts = [each for each in ElementTree.fromstring(svg).iter() if each.tag.endswith("text")]  # noqa: S314 - our own
    words = " ".join("".join(each.itertext()) for each in texts)
    for name in ("attention 4", "MLP 2", "block 2", "joint 3", "dense", "perplexity", "speed-up, decode, batch 8"):
        assert name in words
    assert "not drawn, perplexity above 4 times the dense one: MLP 4" in words
    # the same points give the same bytes, so that a committed picture changes with its figures alone
    save_tradeoff(POINTS, tmp_path, title="a model", speed="decode, batch 8")
    assert (tmp_path / "tradeoff.svg").read_bytes() == svg


def test_a_noisy_point_does_not_squeeze_the_others() -> None:
    noisy = dataclasses.replace(POINTS[1], speedup_p20=0.2, speedup_p80=9.0)
    assert x_limits([*POINTS, noisy]) == x_limits(POINTS)
    low, high = x_limits(POINTS)
    # all medians, and the line of the dense model
    assert 0.9 < low < 1.0 and 1.3 < high < 1.5


def test_accuracy_has_a_panel_of_its_own(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra plot)")
    points = [dataclasses.replace(each, accuracy=0.5, accuracy_change=0.0) for each in POINTS]
    save_tradeoff(points, tmp_path, title="a model", speed="decode")
    assert b"accuracy in %" in (tmp_path / "tradeoff.svg").read_bytes()
