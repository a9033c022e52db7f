"""Scores against brute force on transformers models, and the two ways of running against each other."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from pyruntime.checkpoint import Model, read_model
from pyruntime.errors import UsageError
from pyruntime.prune import Calibration, ScoreOptions, Scores, score
from pyruntime.spec import ModelSpec
from tests import families
from tests.families import VARIANTS
from tests.prune import naive_streams, oracle
from tests.specs import (
    ATTENTION,
    ATTENTIONS,
    MLPS,
    ODD_MODELS,
    PLAIN_MLP,
    as_arrays,
    model_of,
    random_model,
    random_weights,
)

Make = Callable[..., tuple[Path, Any]]
TEXT = [(7 * i * i + 3 * i) % 61 for i in range(40)]
SEQUENCES = [TEXT[:17], TEXT[3:5], TEXT[::-1][:31], TEXT]
# how each variant is built, as tests/prune/oracle.py knows it
KINDS = {
    "mistral": "pre",
    "qwen3": "pre",
    "gemma2": "sandwich",
    "gemma3": "sandwich",
    "mixtral": "pre",
    "gpt_neox": "parallel",
    "gpt_neox serial, no biases": "pre",
}
# float64 throughout, sums in another order
EXACT = 1e-12
# transformers rounds inside norms and rotary tables to float32, whatever the model's dtype
ROUNDED = 1e-7
# float32 streams of four layers against float64
LIMIT = 5e-6


def calibration(sequences: Sequence[Sequence[int]] = SEQUENCES) -> Calibration:
    return Calibration(sequences=tuple(map(tuple, sequences)), source="test", text_sha256="0" * 64)


def check(found: Scores, streams: oracle.Streams, limit: float) -> None:
    for metric, kinds in oracle.expected(streams).items():
        for kind, values in kinds.items():
            assert found.of(metric, kind) == pytest.approx(values, abs=limit), (metric, kind)
    for length in range(1, found.num_layers + 1):
        for metric, values in oracle.run_distances(streams, length).items():
            assert found.run(metric, length) == pytest.approx(values, abs=limit)


@pytest.fixture(scope="module", params=list(KINDS))
def judged(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, oracle.Streams]:
    variant = VARIANTS[request.param]
    folder = tmp_path_factory.mktemp("family")
    hf_model = families.make(variant, folder)
    kind = KINDS[request.param]
    if "serial" in request.param:
        # its modules are called as those of the parallel form
        return read_model(folder), serial_neox(hf_model)
    return read_model(folder), oracle.streams(hf_model, variant.layers, kind, SEQUENCES)


def serial_neox(hf_model: Any) -> oracle.Streams:
    """The serial form reads the MLP's stream before `post_attention_layernorm`."""
    for layer in hf_model.gpt_neox.layers:
        layer.self_attn = layer.attention
    return oracle.streams(hf_model, "gpt_neox.layers", "pre", SEQUENCES)


def test_scores_equal_brute_force_in_float64(judged: tuple[Model, oracle.Streams]) -> None:
    model, streams = judged
    check(score(model, calibration(), ScoreOptions(dtype="float64", target="reference")), streams, ROUNDED)


@pytest.mark.parametrize("target", ["reference", "cpu"])
def test_scores_equal_brute_force_in_float32(judged: tuple[Model, oracle.Streams], target: str) -> None:
    model, streams = judged
    check(score(model, calibration(), ScoreOptions(dtype="float32", target=target)), streams, LIMIT)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_layer_by_layer_gives_the_same_bits(judged: tuple[Model, oracle.Streams], dtype: str) -> None:
    model, _ = judged
    lengths = tuple(range(1, 5))
    whole = score(model, calibration(), ScoreOptions(dtype=dtype, target="reference", runs=lengths))
    # one sequence at a time, some, and all at once
    for room in (0, 40_000, None):
        options = ScoreOptions(dtype=dtype, layer_by_layer=True, runs=lengths, state_bytes=room)
        parts = score(model, calibration(), options)
        assert (parts.values, parts.runs) == (whole.values, whole.runs)


def test_llama_equals_brute_force(make_llama: Make) -> None:
    folder, hf_model = make_llama()
    found = score(read_model(folder), calibration(), ScoreOptions(dtype="float64", target="reference"))
    check(found, oracle.streams(copy.deepcopy(hf_model), "model.layers", "pre", SEQUENCES), ROUNDED)


SPECS = {
    "what is gone has no score": model_of(
        [(ATTENTION, None, False), (None, None, False), (None, PLAIN_MLP, False), (ATTENTION, PLAIN_MLP, False)]
    ),
    "nothing at all, and something": model_of([(None, None, False), (ATTENTION, PLAIN_MLP, True)]),
    "replaced": model_of([(ATTENTIONS["replaced"], PLAIN_MLP, False), (ATTENTION, MLPS["replaced"], False)]),
    "norms everywhere": model_of([(ATTENTIONS["sub and post norm"], MLPS["sub and post norm"], False)] * 2),
    "without residual": model_of(
        [(ATTENTION, PLAIN_MLP, False), (ATTENTIONS["no residual"], PLAIN_MLP, False), (ATTENTION, PLAIN_MLP, False)]
    ),
    **ODD_MODELS,
}


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("by_layer", [False, True], ids=["whole", "layer by layer"])
def test_scores_of_any_model_equal_the_formulas(name: str, by_layer: bool) -> None:
    spec = SPECS[name]
    sequences = [[(5 * i * i + i) % 37 for i in range(length)] for length in (2, 33, 19)]
    lengths = tuple(range(1, len(spec.layers) + 1))
    options = ScoreOptions(dtype="float64", target="reference", layer_by_layer=by_layer, runs=lengths)
    if by_layer and any(attention.table for _, attention in spec.attentions()):
        with pytest.raises(UsageError, match="precomputed"):
            score(random_model(spec), calibration(sequences), options)
        return
    found = score(random_model(spec), calibration(sequences), options)
    streams = naive_streams.streams(spec, as_arrays(random_weights(spec)), sequences)
    for metric, kinds in oracle.expected(streams).items():
        for kind, values in kinds.items():
            for layer, value in enumerate(values):
                there = droppable(spec, kind, layer)
                assert found.of(metric, kind)[layer] == (pytest.approx(value, abs=EXACT) if there else None)
    for length in lengths:
        for metric, values in oracle.run_distances(streams, length).items():
            for i, value in enumerate(values):
                there = all(droppable(spec, "block", i + j) for j in range(length))
                assert found.run(metric, length)[i] == (pytest.approx(value, abs=EXACT) if there else None)
    assert found.not_droppable == tuple(
        f"{kind} {each.index}"
        for each in spec.layers
        for kind, _ in each.sublayers()
        if not droppable(spec, kind, each.index)
    )


def droppable(spec: ModelSpec, kind: str, layer: int) -> bool:
    parts = dict(spec.layers[layer].sublayers())
    asked = list(parts.values()) if kind == "block" else [parts[kind]] if kind in parts else []
    return bool(asked) and all(part.residual and part.shortcut is None for part in asked)
