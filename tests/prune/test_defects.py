"""What the reference code of "What Matters in Transformers?" gets wrong in its scores, D1 to D3, each redone here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pyruntime.checkpoint import read_model
from pyruntime.prune import Calibration, ScoreOptions, Selection, score, select, select_iteratively
from pyruntime.spec import DropPlan, ModelSpec, drop_sublayers
from tests import families
from tests.families import VARIANTS
from tests.prune import naive_streams, oracle
from tests.specs import ATTENTION, PLAIN_MLP, as_arrays, model_of, random_model, random_weights

SEQUENCES = [[(5 * i * i + i + n) % 37 for i in range(20)] for n in range(3)]
SPEC = model_of([(ATTENTION, PLAIN_MLP, False)] * 6)
OPTIONS = ScoreOptions(dtype="float64", target="reference")
CALIBRATION = Calibration(sequences=tuple(map(tuple, SEQUENCES)))


def true_streams(spec: ModelSpec, seed: int) -> oracle.Streams:
    return naive_streams.streams(spec, as_arrays(random_weights(SPEC, seed=seed)), SEQUENCES)


@pytest.mark.parametrize("length", [1, 2, 3, 4])
def test_d1_a_run_of_n_blocks_is_judged_over_a_gap_of_n(length: int) -> None:
    """There, column n of a table is read whose column g - 1 holds gap g: the run is chosen by a gap of n + 1."""
    differs = 0
    for seed in range(6):
        streams = true_streams(SPEC, seed)
        table = [oracle.run_distances(streams, gap)["cosine"] for gap in range(1, 7)]
        right, wrong = int(np.argmin(table[length - 1])), int(np.argmin(table[length]))
        differs += right != wrong
        scores = score(random_model(SPEC, seed=seed), CALIBRATION, OPTIONS)
        plan = select(SPEC, scores, Selection(target="block", method="consecutive", drop_n=length))
        assert plan.attention == plan.mlp == tuple(range(right, right + length))
    assert differs > 0


def test_d2_the_other_sublayer_of_a_dropped_one_runs_on() -> None:
    """There, a layer whose sublayer is dropped is left out whole while the others are scored."""
    differs = 0
    for seed in range(6):
        right = _in_turn(seed, forgets_the_other=False)
        differs += right != _in_turn(seed, forgets_the_other=True)
        plan = select_iteratively(random_model(SPEC, seed=seed), CALIBRATION, Selection(drop_n=4), OPTIONS)
        assert plan.attention == tuple(sorted(right))
        assert plan.origin.endswith(", ".join(f"attention {index}" for index in right))
    assert differs > 0


def _in_turn(seed: int, *, forgets_the_other: bool) -> list[int]:
    """Attentions in the order in which they are dropped, scored anew each time."""
    gone: list[int] = []
    for _ in range(4):
        without = DropPlan(tuple(gone), tuple(gone) if forgets_the_other else ())
        streams = true_streams(drop_sublayers(SPEC, without), seed)
        values = oracle.expected(streams)["cosine"]["attention"]
        gone.append(min((value, i) for i, value in enumerate(values) if i not in gone)[1])
    return gone


@pytest.mark.parametrize("name", ["gemma2", "gemma3"])
def test_d3_sandwich_norms_belong_to_the_sublayer(tmp_path: Path, name: str) -> None:
    """There, the attention's post-norm is left out, and the MLP's stream is taken to be the attention's output."""
    variant = VARIANTS[name]
    hf_model = families.make(variant, tmp_path)
    streams = oracle.streams(hf_model, variant.layers, "sandwich", SEQUENCES)
    found = score(read_model(tmp_path), CALIBRATION, OPTIONS)
    wrong = _as_in_llama(hf_model)
    for kind in ("attention", "mlp"):
        right = oracle.expected(streams)["cosine"][kind]
        assert found.of("cosine", kind) == pytest.approx(right, abs=1e-7)
        assert not any(value == pytest.approx(other, abs=1e-3) for value, other in zip(right, wrong[kind], strict=True))
    # and so is the order in which they would be dropped
    ours = [value for kind in ("attention", "mlp") for value in found.of("cosine", kind) if value is not None]
    assert np.argsort(ours).tolist() != np.argsort(wrong["attention"] + wrong["mlp"]).tolist()


def _as_in_llama(hf_model: Any) -> dict[str, list[float]]:
    """Cosine scores from the places where a Llama has them: X behind `post_attention_layernorm`'s input."""
    rows: dict[tuple[str, int], list[oracle.Array]] = {}
    hooks = []
    for i, layer in enumerate(hf_model.double().model.layers):

        def keep(name: str, value: Any, i: int = i) -> None:
            rows.setdefault((name, i), []).append(oracle.array(oracle.first(value)))

        hooks += [
            layer.input_layernorm.register_forward_pre_hook(lambda _, args, keep=keep: keep("x attention", args)),
            layer.self_attn.register_forward_hook(lambda *called, keep=keep: keep("attention", called[2])),
            layer.post_attention_layernorm.register_forward_pre_hook(lambda _, args, keep=keep: keep("x mlp", args)),
            layer.mlp.register_forward_hook(lambda *called, keep=keep: keep("mlp", called[2])),
        ]
    for sequence in SEQUENCES:
        with torch.no_grad():
            hf_model(torch.tensor([sequence]), use_cache=False)
    for hook in hooks:
        hook.remove()
    joined = {name: np.concatenate(each) for name, each in rows.items()}
    return {
        kind: [
            float(1 - oracle.cosines(x := joined[f"x {kind}", i], x + joined[kind, i]).mean())
            for i in range(families.NUM_LAYERS)
        ]
        for kind in ("attention", "mlp")
    }
