"""`pyruntime merge`: what it prints, writes and refuses; the folder it leaves runs as the one it read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pyruntime.checkpoint import read_model
from pyruntime.checkpoint.writer import write_native
from pyruntime.cli.main import run
from pyruntime.spec import ModelSpec
from tests import naive
from tests.passes.skipless import Arrays, arrays_of, attention, mlp, model_of, rms, skipless, weights_of

Capture = pytest.CaptureFixture[str]
SPEC = skipless([(attention(), mlp())] * 3, tied=True)
IDS = [3, 1, 4, 1, 5, 9, 2, 6]


def write(folder: Path, spec: ModelSpec = SPEC, weights: Arrays | None = None, name: str = "model") -> Path:
    write_native(model_of(spec, weights or weights_of(spec)), folder / name, dtype="float32")
    return folder / name


def merge(*arguments: object) -> int:
    return run(["merge", *map(str, arguments)])


def facts_of(capsys: Capture, *arguments: object) -> dict[str, Any]:
    assert merge(*arguments, "--json") == 0
    out, err = capsys.readouterr()
    assert err == ""
    found = json.loads(out)
    assert isinstance(found, dict)
    return found


def difference(one: Path, other: Path) -> float:
    """Relative L2 distance of the logits of two folders."""
    models = [read_model(path) for path in (one, other)]
    expected, found = (naive.logits(each.spec, arrays_of(each), IDS) for each in models)
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("kind", ["q+p", "pivoted", "q", "p", "auto"])
def test_the_folder_written_computes_what_the_one_read_does(tmp_path: Path, capsys: Capture, kind: str) -> None:
    source, out = write(tmp_path), tmp_path / "out"
    facts = facts_of(capsys, source, out, "--kind", kind)
    # weights in float32 and condition numbers of some hundreds
    assert difference(source, out) < 1e-4
    merged = read_model(out)
    assert merged.num_values == read_model(source).num_values - facts["num_weights_saved"]
    assert facts["written_bytes"] == merged.weight_bytes
    assert run(["verify", str(out)]) == 0


def test_the_table_names_each_layer_and_the_totals(tmp_path: Path, capsys: Capture) -> None:
    source, out = write(tmp_path), tmp_path / "out"
    assert merge(source, out) == 0
    text = capsys.readouterr().out
    # the budget comes first
    assert text.startswith("memory ")
    rows = [line for line in text.splitlines() if " q " in line and " p " in line]
    assert len(rows) == 3 and all("1,152" in row for row in rows)
    table = 61 * 24
    # a layer: Q and P, K and V, gate, up and down
    read = 3 * (2 * 24 * 24 + 2 * 24 * 12 + 3 * 24 * 40) + table + 24
    left = read - 3 * 2 * 24 * 24
    assert f"read for a token    {left:,} of {read:,} weights: {read / left:.2f}x" in text
    saved = 3 * 2 * 24 * 24 - table
    assert f"weights             {saved:,} fewer, {4 * saved:,} bytes" in text
    assert "no longer tied" in text


def test_a_dry_run_writes_nothing(tmp_path: Path, capsys: Capture) -> None:
    source, out = write(tmp_path), tmp_path / "out"
    assert merge(source, out, "--dry-run") == 0
    assert f"nothing written to {out}" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_what_was_forced_is_in_the_manifest(tmp_path: Path, capsys: Capture) -> None:
    weights = weights_of(SPEC)
    q = weights["layers.1.attention.q.weight"]
    q[0] = q[1:4].sum(0) + 1e-5
    source = write(tmp_path, weights=weights)
    assert merge(source, tmp_path / "out", "--dtype", "bfloat16") == 4
    err = capsys.readouterr().err
    assert err.startswith("error[MERGE_ILL_CONDITIONED]: layer ") and len(err.splitlines()) == 1
    assert not (tmp_path / "out").exists()
    facts = facts_of(capsys, source, tmp_path / "out", "--dtype", "bfloat16", "--gate", "force")
    (manifest,) = (json.loads(path.read_text()) for path in (tmp_path / "out").glob("*manifest*.json"))
    made = manifest["made"]["merge"]
    assert made["gate"] == "force" and made["layers"] == facts["layers"]
    assert made["layers"][1]["forced"] is True
    assert any("forced through the gate" in note for note in made["notes"])


def test_auto_falls_back_layer_by_layer(tmp_path: Path, capsys: Capture) -> None:
    weights = weights_of(SPEC)
    weights["layers.1.attention.q.weight"][:, 2] = 0.0
    source, out = write(tmp_path, weights=weights), tmp_path / "out"
    facts = facts_of(capsys, source, out, "--kind", "auto")
    assert facts["layers"][1]["entry"] == "pivoted"
    assert "condition number" in facts["layers"][1]["notes"][0]
    assert difference(source, out) < 1e-4


def test_the_store_dtype_is_what_is_written(tmp_path: Path, capsys: Capture) -> None:
    source, out = write(tmp_path), tmp_path / "out"
    facts = facts_of(capsys, source, out, "--kind", "pivoted", "--store-dtype", "bfloat16")
    assert (facts["dtype"], facts["store_dtype"]) == ("bfloat16", "bfloat16")
    merged = read_model(out)
    assert merged.dtype == "bfloat16"
    assert {weight.read().dtype for weight in merged.weights.values()} == {torch.bfloat16}
    # not what float32 was narrowed by
    assert facts["weight_bytes_saved"] == 2 * (read_model(source).num_values - merged.num_values)


def test_a_norm_makes_triangular_maps(tmp_path: Path, capsys: Capture) -> None:
    source = write(tmp_path, skipless([(attention(pre=rms(24)), mlp(pre=rms(24)))] * 2))
    facts = facts_of(capsys, source, tmp_path / "out", "--kind", "triangular")
    assert {(row["entry"], row["output"]) for row in facts["layers"]} == {("triangular", "triangular")}
    assert difference(source, tmp_path / "out") < 1e-5


def test_ordinary_models_are_refused_with_the_layer_and_a_way_out(
    capsys: Capture, text_model: tuple[Path, Any]
) -> None:
    out = text_model[0].parent / "never"
    assert merge(text_model[0], out) == 2
    err = capsys.readouterr().err
    assert "layer 0" in err and "residual" in err and "pyruntime fold" in err
    assert not out.exists()


def test_a_target_that_cannot_be_written_is_found_before_the_work(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(tmp_path)
    (tmp_path / "there").mkdir()

    def never(*arguments: object) -> Any:
        raise AssertionError(arguments)

    monkeypatch.setattr("pyruntime.cli.merge.merge_model", never)
    for out in (source, source / "inside", tmp_path / "there"):
        assert merge(source, out) == 2
        assert "error[OUTPUT]" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "there"]


@pytest.mark.parametrize("shrink", [1.0, 0.01])
def test_norms_that_others_cancel_are_measured_on_the_stream(tmp_path: Path, capsys: Capture, shrink: float) -> None:
    heads: dict[str, Any] = {f"{role}_norm": rms(6, eps=1e-9) for role in "qkv"}
    spec = skipless([(attention(pre=rms(24), **heads), mlp())] * 3)
    weights = weights_of(spec)
    for index in range(3):
        weights[f"layers.{index}.mlp.up.weight"] *= shrink
    source, out = write(tmp_path, spec, weights), tmp_path / "out"
    status = merge(source, out, "--kind", "q", "--dtype", "float32", "--gate", "refuse")
    # float32 allows a change by 1e-6; a stream a hundredth as large lets the epsilon count ten thousand times as much
    assert status == (0 if shrink == 1.0 else 4)
    assert ("epsilon" in capsys.readouterr().err) == (shrink != 1.0)


def test_memory_is_bounded_beforehand(tmp_path: Path, capsys: Capture) -> None:
    assert merge(write(tmp_path), tmp_path / "out", "--max-memory", "0.00001") == 7
    assert "error[MEMORY]" in capsys.readouterr().err


def test_unknown_dtypes_are_named(tmp_path: Path, capsys: Capture) -> None:
    source = write(tmp_path)
    for option, value in (("--dtype", "int8"), ("--store-dtype", "float64")):
        assert merge(source, tmp_path / "out", option, value) == 2
        assert f"{option} '{value}' is not known; expected auto, " in capsys.readouterr().err
