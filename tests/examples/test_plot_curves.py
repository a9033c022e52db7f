"""The picture of the learning curves names every run and its figure."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.examples.training import script


def a_log(skipless: bool, norm: str, kv_heads: int, bits: float) -> dict[str, Any]:
    curve = [{"step": step, "held_out_bits_per_byte": bits + 1 / step} for step in (1, 2, 4)]
    config = {"skipless": skipless, "norm": norm, "heads": 4, "kv_heads": kv_heads}
    return {"config": config, "figures": {"held_out_bits_per_byte": bits}, "curve": curve}


def test_each_run_is_named_with_its_figure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    logs = [a_log(True, "none", 2, 2.125), a_log(True, "rms", 4, 2.0625), a_log(False, "rms", 2, 1.9375)]
    paths = [tmp_path / f"{i}.json" for i in range(len(logs))]
    for path, log in zip(paths, logs, strict=True):
        path.write_text(json.dumps(log), encoding="utf-8")
    out = tmp_path / "curves.svg"
    monkeypatch.setattr("sys.argv", ["plot_curves.py", *map(str, paths), "-o", str(out)])
    script(monkeypatch, "plot_curves").main()
    picture = out.read_text(encoding="utf-8")
    places = [
        picture.index(label)
        for label in ("no skips, no norm, GQA: 2.125", "no skips, RMSNorm, MHA: 2.062", "skips, RMSNorm, GQA: 1.938")
    ]
    assert places == sorted(places)
