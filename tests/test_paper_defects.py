"""What the dropping papers' own code gets wrong, D4 to D9; D1 to D3, about scores, are in tests/prune."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pyruntime.checkpoint import read_model
from pyruntime.errors import UsageError
from pyruntime.graph import build, fuse
from pyruntime.plan import lower
from pyruntime.spec import Attention, DropPlan, Layer, drop_sublayers
from tests import families
from tests.families import VARIANTS, without
from tests.helpers import TARGETS, all_logits, hf_logits, make_plan, pruned_model, relative_error

MakeLlama = Callable[..., tuple[Path, Any]]

PROMPT = [(7 * i * i + 3 * i) % 61 for i in range(23)]
LIMIT = 1e-5


def configured(source: Path, target: Path, **keys: Any) -> Path:
    """A copy of a checkpoint folder whose config.json says more."""
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    config = json.loads((source / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, **keys}))
    return target


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dropped", [(0,), (0, 1), (3,), (0, 1, 2, 3)])
def test_d4_generation_goes_on_without_attentions(make_llama: MakeLlama, dropped: tuple[int, ...], target: str) -> None:
    """There, a layer without attention reads a variable that nobody set once a cache is in use."""
    folder, hf_model = make_llama()
    plan = make_plan(folder, DropPlan(attention=dropped), target=target)
    twin = without(VARIANTS["mistral"], hf_model, DropPlan(attention=dropped)).double()
    (found,) = all_logits(plan, [PROMPT], 1)
    assert relative_error(found, hf_logits(twin, PROMPT)) < LIMIT


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dropped", [(0,), (1,), (0, 1, 2)])
def test_d5_windows_alternate_by_original_numbers(tmp_path: Path, dropped: tuple[int, ...], target: str) -> None:
    """There, Gemma 2's cache slides by the number of its slot, which an odd number of drops turns around."""
    variant = VARIANTS["gemma2"]
    oracle = without(variant, families.make(variant, tmp_path), DropPlan(attention=dropped)).double()
    plan = make_plan(tmp_path, DropPlan(attention=dropped), target=target)
    (found,) = all_logits(plan, [PROMPT], 1)
    assert relative_error(found, hf_logits(oracle, PROMPT)) < LIMIT
    # the prompt must tell the two patterns apart
    model = pruned_model(tmp_path, DropPlan(attention=dropped))
    turned = replace(model, spec=replace(model.spec, layers=tuple(map(_turned, model.spec.layers))))
    (other,) = all_logits(lower(build(turned.spec), turned, dtype="float32"), [PROMPT], 64)
    assert relative_error(other, hf_logits(oracle, PROMPT)) > 100 * LIMIT


def _turned(layer: Layer) -> Layer:
    if not isinstance(layer.attention, Attention):
        return layer
    window = families.WINDOW if layer.attention.window is None else None
    return replace(layer, attention=replace(layer.attention, window=window))


@pytest.mark.parametrize(
    ("said", "dropped"),
    [
        ([False, True, False, True], (1, 3)),
        # as integers these would be layers 0 and 1
        ([True, False, False, False], (0,)),
        # and an empty list saved as booleans would be layer 0
        ([False, False, False, False], ()),
        ([3, 1], (1, 3)),
        (None, ()),
    ],
)
def test_d6_lists_of_booleans_are_not_layer_numbers(
    make_llama: MakeLlama, tmp_path: Path, said: Any, dropped: tuple[int, ...]
) -> None:
    folder = configured(make_llama()[0], tmp_path / "model", drop_attn_list=said, drop_mlp_list=[])
    assert read_model(folder).spec.dropped("attention") == dropped


@pytest.mark.parametrize(
    "scaling",
    [
        {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    ],
)  # fmt: skip
def test_d7_dropped_models_keep_their_rope(make_llama: MakeLlama, tmp_path: Path, scaling: dict[str, Any]) -> None:
    """There, a dropped Llama takes linear and dynamic scaling alone, so Llama 3.1 cannot be loaded."""
    folder, hf_model = make_llama(rope_parameters={"rope_theta": 500.0, **scaling})
    dropped = configured(folder, tmp_path / "model", drop_attn_list=[2], drop_mlp_list=[1])
    twin = without(VARIANTS["mistral"], hf_model, DropPlan(attention=(2,), mlp=(1,))).double()
    (found,) = all_logits(make_plan(dropped), [PROMPT], 1)
    assert relative_error(found, hf_logits(twin, PROMPT)) < LIMIT


def test_d8_every_pattern_of_absent_sublayers_fuses(make_llama: MakeLlama) -> None:
    """There, fusing reaches for the attention of a layer that has none."""
    whole = read_model(make_llama()[0]).spec
    layers = range(len(whole.layers))
    subsets = [each for size in range(len(layers) + 1) for each in itertools.combinations(layers, size)]
    for attention, mlp in itertools.product(subsets, subsets):
        spec = drop_sublayers(whole, DropPlan(attention=attention, mlp=mlp))
        names = [weight for node in fuse(build(spec)).nodes for _, weight in node.weights]
        gone = [f"layers.{i}.attention." for i in attention] + [f"layers.{i}.mlp." for i in mlp]
        assert not [name for name in names if name.startswith(tuple(gone))]


def test_d8_quantised_weights_are_refused_by_name(make_llama: MakeLlama, tmp_path: Path) -> None:
    folder = configured(
        make_llama()[0], tmp_path / "model", drop_attn_list=[1], quantization_config={"quant_method": "awq", "bits": 4}
    )
    with pytest.raises(UsageError, match="quantization_config"):
        read_model(folder)


def test_d9_a_pruned_checkpoint_holds_what_is_kept_alone(make_llama: MakeLlama, tmp_path: Path) -> None:
    """There, the whole model is saved again."""
    from safetensors import safe_open

    from pyruntime.checkpoint.writer import write_pruned

    folder, _ = make_llama()
    write_pruned(folder, DropPlan(attention=(0, 2), mlp=(3,)), tmp_path / "pruned")
    with (
        safe_open(folder / "model.safetensors", "pt") as whole,
        safe_open(tmp_path / "pruned" / "model.safetensors", "pt") as pruned,
    ):
        gone = set(whole.keys()) - set(pruned.keys())
        expected = {
            f"model.layers.{layer}.{name}.weight"
            for layer, parts in {
                0: ("input_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
                2: ("input_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
                3: ("post_attention_layernorm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
            }.items()
            for name in parts
        }
        assert gone == expected
        assert set(pruned.keys()) < set(whole.keys())
        for name in pruned.keys():  # noqa: SIM118, safe_open is no mapping
            assert torch.equal(pruned.get_tensor(name), whole.get_tensor(name))
