"""The skipless models that ship with the project are what their cards promise, and can be merged."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from pyruntime.checkpoint import Model
from pyruntime.engine.load import load
from pyruntime.evaluate import perplexity, windows
from tests import naive
from tests.examples.training import EXAMPLES
from tests.helpers import all_logits, relative_error

HELD_OUT = EXAMPLES / "held_out.txt"
FOLDERS = ["skipless-gqa", "skipless-mha", "skipless-rms"]


def weights_of(model: Model) -> dict[str, naive.Array]:
    return {name: weight.read().double().numpy() for name, weight in model.weights.items()}


@pytest.mark.parametrize("name", FOLDERS)
def test_it_has_no_residual_connections_and_takes_at_most_6_megabytes(name: str) -> None:
    spec = load(EXAMPLES / name).model.spec
    assert not any(part.residual for layer in spec.layers for _, part in layer.sublayers())
    grouped = [attention.num_kv_heads < attention.num_heads for _, attention in spec.attentions()]
    assert grouped == [name != "skipless-mha"] * len(spec.layers)
    norms = [part.pre for layer in spec.layers for _, part in layer.sublayers()] + [spec.final_norm]
    assert [norm is not None for norm in norms] == [name == "skipless-rms"] * len(norms)
    assert sum(path.stat().st_size for path in (EXAMPLES / name).iterdir()) <= 6_000_000


@pytest.mark.parametrize("name", FOLDERS)
def test_its_square_maps_can_be_inverted_in_float32(name: str) -> None:
    weights = weights_of(load(EXAMPLES / name).model)
    found = [
        {part: np.linalg.cond(weights[f"layers.{i}.attention.{part}.weight"]) for part in ("q", "o")}
        for i in range(sum(key.endswith("attention.q.weight") for key in weights))
    ]
    log = json.loads((EXAMPLES / name / "training_log.json").read_text(encoding="utf-8"))
    for each, logged in zip(found, log["condition_numbers"], strict=True):
        assert each == pytest.approx(logged, rel=0.01)
        assert max(each.values()) < 1e4


@pytest.mark.parametrize("name", FOLDERS)
def test_it_reads_what_it_was_not_trained_on(name: str) -> None:
    loaded = load(EXAMPLES / name, dtype="float32")
    assert loaded.tokenizer is not None
    text = HELD_OUT.read_text(encoding="utf-8")
    ids = loaded.tokenizer.encode(text)
    pieces = windows(ids[1:], loaded.model.spec.max_position, bos=ids[0])
    log = json.loads((EXAMPLES / name / "training_log.json").read_text(encoding="utf-8"))
    bits = perplexity(loaded.plan, pieces).bits_per_byte(len(text.encode()))
    # passages of all ten novels; the log is of eight times as much text
    assert bits == pytest.approx(log["figures"]["held_out_bits_per_byte"], rel=0.03)
    expected = naive.logits(loaded.model.spec, weights_of(loaded.model), ids[:40])
    (found,) = all_logits(loaded.plan, [ids[:40]], 16)
    assert relative_error(found, torch.from_numpy(expected)) < 1e-4


def test_the_curves_of_all_runs_are_there() -> None:
    paths = [*(EXAMPLES / name / "training_log.json" for name in FOLDERS), EXAMPLES / "skipless-ordinary.json"]
    logs = [json.loads(Path(path).read_text(encoding="utf-8")) for path in paths]
    assert len({log["figures"]["steps"] for log in logs}) == 1
    assert [log["config"]["skipless"] for log in logs] == [True, True, True, False]
    assert (EXAMPLES / "skipless-curves.svg").stat().st_size < 100_000
