"""Shapes of published models, random weights in their shape, and the transformers twin that benchmarks use."""

from __future__ import annotations

import gc
import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from pyruntime.bench import (
    RandomWeight,
    check_plan,
    parse_shape,
    random_model,
    save_results,
    shape_names,
    shape_spec,
    shapes,
)
from pyruntime.checkpoint import Model
from pyruntime.errors import UsageError
from pyruntime.graph import SequenceWork, build, cost_of, fuse
from pyruntime.passes import drop
from pyruntime.plan import Plan, lower
from pyruntime.spec import Attention, DropPlan, ModelSpec, NormKind, RopeKind, weight_shapes
from tests.helpers import all_logits, relative_error

ROOT = Path(__file__).parents[2]
FOLDER = Path(shapes.__file__).parent / "model_shapes"
# parameters as the Hub counts them in the published files
PUBLISHED = {
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248,
    "llama-3.2-1b": 1_235_814_400,
    "tinyllama-1.1b": 1_100_048_384,
    "mistral-7b": 7_241_732_096,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-7b": 7_615_616_512,
    "smollm2-135m": 134_515_008,
    "pythia-6.9b": 6_857_302_016,
}
TINY: dict[str, Any] = {
    "source": "nobody/tiny",
    "family": "llama",
    "hidden_size": 64,
    "ffn_size": 96,
    "num_layers": 3,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 16,
    "vocab_size": 211,
    "max_position": 128,
    "tied_head": False,
    "norm": "rms",
    "norm_eps": 1e-5,
    "activation": "silu",
    "gated": True,
    "rope": {"kind": "default", "dim": 16, "theta": 10000.0},
}
LLAMA3 = {"kind": "llama3", "dim": 16, "theta": 5e5, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
NEOX = {"norm": "layer", "activation": "gelu", "gated": False, "num_kv_heads": 4, "parallel": True, "bias": True}
VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama3 rope, tied": {"tied_head": True, "rope": {**LLAMA3, "original_max_position": 32}},
    "mistral": {"family": "mistral", "window": 9},
    "qwen2": {"family": "qwen2", "qkv_bias": True},
    "gpt_neox": {"family": "gpt_neox", **NEOX, "rope": {"kind": "default", "dim": 4, "theta": 10000.0}},
}


def tiny(**changes: Any) -> ModelSpec:
    return parse_shape({**TINY, **changes}).spec()


def plan_of(model: Model, dtype: str = "float32", fused: bool = True) -> Plan:
    graph = build(model.spec)
    return lower(fuse(graph) if fused else graph, model, target="reference", dtype=dtype)


def textbook_count(data: dict[str, Any]) -> int:
    """Parameters by the formulas of the papers, from the bare figures."""
    h, f, d = data["hidden_size"], data["ffn_size"], data["head_dim"]
    q, kv = data["num_heads"] * d, data["num_kv_heads"] * d
    attention = h * q + 2 * h * kv + q * h
    mlp = (3 if data["gated"] else 2) * h * f
    norms = 2 * h
    if data.get("qkv_bias"):
        attention += q + 2 * kv
    if data.get("bias"):
        attention, mlp, norms = attention + q + 2 * kv + h, mlp + f + h, 2 * norms
    embeddings = data["vocab_size"] * h * (1 if data["tied_head"] else 2)
    final = h * (2 if data.get("bias") else 1)
    total: int = embeddings + data["num_layers"] * (attention + mlp + norms) + final
    return total


def test_every_shape_that_ships_is_listed_and_has_a_source() -> None:
    assert shape_names() == tuple(sorted(PUBLISHED))
    for name in shape_names():
        assert json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))["source"].count("/") == 1


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_parameters_are_those_of_the_published_model(name: str) -> None:
    counted = sum(math.prod(shape) for shape in weight_shapes(shape_spec(name)).values())
    data = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    assert counted == PUBLISHED[name] == textbook_count(data)


def test_what_parameters_do_not_show() -> None:
    (_, mistral), *_ = shape_spec("mistral-7b").attentions()
    assert mistral.window == 4096
    (_, llama), *_ = shape_spec("llama-3.2-1b").attentions()
    assert llama.rope is not None
    assert (llama.rope.kind, llama.rope.factor, llama.rope.original_max_position) == (RopeKind.LLAMA3, 32.0, 8192)
    pythia = shape_spec("pythia-6.9b")
    attention = pythia.layers[0].attention
    assert isinstance(attention, Attention) and attention.rope is not None
    assert (attention.rope.dim, attention.head_dim, pythia.layers[0].parallel) == (32, 128, True)
    assert pythia.final_norm is not None and pythia.final_norm.kind is NormKind.LAYER and pythia.final_norm.bias
    assert not pythia.head.linear.bias
    qwen = shape_spec("qwen2.5-0.5b").layers[0].attention
    assert isinstance(qwen, Attention) and qwen.q and qwen.o and (qwen.q.bias, qwen.o.bias) == (True, False)


def test_unknown_shapes_are_refused_with_the_known_ones() -> None:
    with pytest.raises(UsageError, match=r"'llama-2' does not exist; expected one of llama-2-13b, .*smollm2-135m"):
        shape_spec("llama-2")
    with pytest.raises(UsageError, match="does not exist"):
        shape_spec("../model_shapes/llama-2-7b")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden": 3}, r"unknown keys \['hidden'\]"),
        ({"hidden_size": "64"}, "hidden_size is '64'"),
        ({"hidden_size": True}, "hidden_size is True"),
        ({"num_layers": 0}, "num_layers is 0"),
        ({"num_kv_heads": 3}, "no multiple|not a multiple"),
        ({"tied_head": 1}, "tied_head is 1"),
        ({"norm": "batch"}, "norm is 'batch'; expected one of rms"),
        ({"norm": ["rms"]}, "norm is"),
        ({"norm_eps": float("nan")}, "norm eps is nan"),
        ({"activation": "tanh"}, "activation is 'tanh'"),
        ({"source": None}, "source is None"),
        ({"window": 0}, "attention window is 0"),
        ({"rope": None}, "rope is None; expected an object"),
        ({"rope": {"kind": "default", "dim": 16}}, "rope lacks theta"),
        ({"rope": {**TINY["rope"], "base": 1}}, r"rope has the unknown keys \['base'\]"),
        ({"rope": {**TINY["rope"], "kind": "alibi"}}, "rope kind is 'alibi'"),
        ({"rope": {**TINY["rope"], "kind": "llama3"}}, "needs original_max_position"),
        ({"rope": {**TINY["rope"], "dim": 32}}, "larger than head_dim"),
    ],
)
def test_a_shape_is_read_strictly(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        tiny(**changes)


@pytest.mark.parametrize("key", sorted(TINY))
def test_no_key_of_a_shape_is_guessed(key: str) -> None:
    with pytest.raises(UsageError, match=f"lacks {key}"):
        parse_shape({name: value for name, value in TINY.items() if name != key})


def test_errors_of_a_file_name_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.json").write_text(json.dumps({**TINY, "heads": 4}), encoding="utf-8")
    monkeypatch.setattr(shapes, "_FOLDER", tmp_path)
    assert shape_names() == ("mine",)
    with pytest.raises(UsageError, match=r"mine\.json: a shape has the unknown keys"):
        shape_spec("mine")


def test_random_weights_depend_on_name_and_seed_alone() -> None:
    first, again, other = (random_model(tiny(), "float32", seed) for seed in (0, 0, 1))
    for name, weight in first.weights.items():
        values = weight.read()
        assert values.shape == weight.shape
        assert values.numel() * values.element_size() == weight.num_bytes
        assert torch.equal(values, again.weights[name].read())
        assert not torch.equal(values, other.weights[name].read())
    up, gate = (first.weights[f"layers.0.mlp.{role}.weight"].read() for role in ("up", "gate"))
    assert not torch.equal(up, gate)


def test_random_weights_are_small_and_gains_near_what_does_nothing() -> None:
    for kind, centre in (("rms", 1.0), ("rms_one_plus", 0.0), ("layer", 1.0)):
        weights = random_model(tiny(norm=kind, bias=True), "float32").weights
        gain = weights["layers.1.mlp.pre.weight"].read()
        assert float((gain - centre).abs().max()) < 0.1 < float(gain.abs().sum())
        assert float(weights["layers.1.mlp.pre.bias"].read().abs().max()) < 0.1
    values = random_model(tiny(vocab_size=4000), "float32").weights["embedding.weight"].read()
    assert abs(float(values.mean())) < 1e-3
    assert float(values.std()) == pytest.approx(0.02, rel=0.02)


def test_rows_of_a_large_random_matrix_differ() -> None:
    """Equal rows of a head would make equal logits, and the choice between them a matter of luck."""
    values = RandomWeight("head.weight", (5000, 512), "float32", 0).read()
    assert len(torch.unique(values, dim=0)) == 5000
    half = RandomWeight("head.weight", (5000, 512), "bfloat16", 0).read()
    assert torch.equal(half, values.bfloat16())


def test_random_weights_are_made_one_by_one_and_given_back() -> None:
    model = random_model(tiny(vocab_size=5000), "float32")
    tensors: list[int] = []
    for weight in model.weights.values():
        held = weight.read()
        assert held.data_ptr() != weight.read().data_ptr()
        del held
        gc.collect()
        tensors.append(sum(each.numel() for each in gc.get_objects() if type(each) is torch.Tensor))
    # nothing piles up: what is alive does not grow with the tensors that were read
    assert max(tensors) - min(tensors) < max(math.prod(weight.shape) for weight in model.weights.values())


def test_a_random_model_needs_a_stored_dtype() -> None:
    with pytest.raises(UsageError, match="dtype 'float64' of a random model"):
        random_model(tiny(), "float64")


def test_a_random_model_drops_runs_and_passes_the_gate() -> None:
    model = random_model(tiny(), "bfloat16")
    pruned = drop(model, DropPlan(attention=(0, 2), mlp=(1,)))
    assert pruned.weight_bytes == sum(2 * math.prod(shape) for shape in weight_shapes(pruned.spec).values())
    (report,) = pruned.reports
    assert report.weight_bytes == model.weight_bytes - pruned.weight_bytes > 0
    for each in (model, pruned):
        assert check_plan(plan_of(each), each).nmse < 1e-10
        assert check_plan(plan_of(each, "bfloat16"), each).limit == 5e-4
    prompts = [[3, 1, 4, 1, 5, 9], [2, 7]]
    fused, plain = (all_logits(plan_of(pruned, "float64", fused), prompts, 2) for fused in (True, False))
    for a, b in zip(fused, plain, strict=True):
        assert a.shape[1] == TINY["vocab_size"] and relative_error(a, b) < 1e-10
        assert not torch.allclose(a[0], a[1])


def test_a_real_shape_is_built_and_priced_without_a_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(_: RandomWeight) -> torch.Tensor:
        raise AssertionError("a weight was read")

    monkeypatch.setattr(RandomWeight, "read", forbidden)
    model = random_model(shape_spec("smollm2-135m"))
    assert model.weight_bytes == 2 * PUBLISHED["smollm2-135m"]
    for each in (model, drop(model, DropPlan(attention=tuple(range(15, 30))))):
        graph = fuse(build(each.spec))
        cost = sum(each.num_bytes for each in cost_of(graph.nodes, [SequenceWork(32, 1)], 2).values())
        # a tied table is read as the head; the one row of the embedding counts on top
        assert each.weight_bytes < cost < each.weight_bytes * 1.05
    assert len(build(shape_spec("llama-2-70b")).nodes) > 80


@pytest.fixture(scope="module")
def twins() -> ModuleType:
    """benchmarks/peers/hf_twin.py, which is a script's neighbour and no package."""
    pytest.importorskip("transformers")
    found = importlib.util.spec_from_file_location("hf_twin", ROOT / "benchmarks" / "peers" / "hf_twin.py")
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


@pytest.mark.parametrize("dropped", [(), (0,), (0, 2), (2,), (0, 1, 2)], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_twin_computes_the_same_with_its_cache(twins: ModuleType, variant: str, dropped: tuple[int, ...]) -> None:
    from transformers import DynamicCache

    model = drop(random_model(tiny(**VARIANTS[variant]), "float32"), DropPlan(attention=dropped))
    peer = twins.twin(model, torch.float32)
    tokens = [i * 7919 % TINY["vocab_size"] for i in range(24)]
    (ours,) = all_logits(plan_of(model), [tokens], 24)
    cache = DynamicCache(config=peer.config)
    theirs = []
    with torch.inference_mode():
        for piece in torch.tensor([tokens]).split([16, *[1] * 8], dim=1):
            theirs.append(peer(input_ids=piece, past_key_values=cache, use_cache=True).logits[0])
    assert relative_error(ours, torch.cat(theirs)) < 1e-5
    # what is gone takes no room there either
    assert len({id(each) for each in peer.parameters()}) < len(weight_shapes(model.dense_spec)) or not dropped


@pytest.mark.parametrize(
    ("changes", "pattern", "message"),
    [
        ({"family": "gemma"}, DropPlan(), "family 'gemma' has no transformers twin"),
        ({}, DropPlan(mlp=(1,)), r"MLPs \[1\] are dropped"),
        ({"bias": True}, DropPlan(), "transformers has no model.layers.0.input_layernorm.bias"),
        ({"rope": {**TINY["rope"], "kind": "dynamic", "original_max_position": 64}}, DropPlan(), "rope dynamic"),
    ],
)
def test_what_has_no_twin_is_refused(
    twins: ModuleType, changes: dict[str, Any], pattern: DropPlan, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        twins.twin(drop(random_model(tiny(**changes)), pattern), torch.float32)


def test_results_stand_beside_each_other(tmp_path: Path) -> None:
    first, second = (save_results([{"case": i}], tmp_path / "results", "mine") for i in range(2))
    assert second.stem == f"{first.stem}-2"
    for i, path in enumerate((first, second)):
        data = json.loads(path.read_text(encoding="utf-8"))
        assert data["rows"] == [{"case": i}]
        assert set(data) == {"commit", "command", "time", "machine", "rows"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "arguments", "line"),
    [
        ("peers/bench_transformers.py", "--dtype float32 --batch 2 --prompt 16 --drop-attn 20-29", "decode, batch 2"),
        ("models/bench_shapes.py", "--context 8 --prompt 16 --drop-attn 20-29", "20-29          prefill"),
        ("models/bench_shapes.py", "--context 8", "nothing        decode"),
    ],
)
def test_the_scripts_run(script: str, arguments: str, line: str) -> None:
    more = ["--shape", "smollm2-135m", "--target", "reference", "--repeats", "2", "--no-save", *arguments.split()]
    command = [sys.executable, str(ROOT / "benchmarks" / script), *more]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    assert line in done.stdout
