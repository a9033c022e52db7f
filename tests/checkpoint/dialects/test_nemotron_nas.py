"""DeciLM and Nemotron-NAS: layers of different heads and widths, no-ops, linear maps; contradictions are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pyruntime.checkpoint import read_model
from pyruntime.checkpoint.dialects import read_dialects
from pyruntime.checkpoint.families import FAMILIES
from pyruntime.checkpoint.fields import Fields
from pyruntime.errors import CheckpointError
from tests.checkpoint.dialects.tiny import (
    LINEAR,
    attention,
    check_parity,
    config_of,
    hf_name,
    mlp,
    refused,
    spec_of,
    write,
)


def attn(**changes: Any) -> dict[str, Any]:
    """An attention entry with all keys of the published 49B."""
    return {
        "n_heads_in_group": None,
        "no_op": False,
        "num_sink_tokens": None,
        "replace_with_linear": False,
        "sparsify": None,
        "unshifted_sink": False,
        "use_prefill_window_in_sink_attention": False,
        "window_length": None,
        **changes,
    }


def ffn(**changes: Any) -> dict[str, Any]:
    return {"ffn_mult": None, "no_op": False, "replace_with_linear": False, "sparsify": None, **changes}


def block(attention_entry: dict[str, Any], ffn_entry: dict[str, Any]) -> dict[str, Any]:
    return {"attention": attention_entry, "ffn": ffn_entry}


def nas(*blocks: Any, **keys: Any) -> dict[str, Any]:
    sizes = {"num_key_value_heads": None, "intermediate_size": None}
    return config_of(len(blocks), model_type="nemotron-nas", **{**sizes, "block_configs": list(blocks), **keys})


GQA = attn(n_heads_in_group=4)
WIDE = ffn(ffn_mult=12.0)
NONE, LINEAR_MAP = {"no_op": True}, {"replace_with_linear": True}

# 64 values: 2/3 * 12 * 64 = 512, 2/3 * 6 * 64 = 256, and 2/3 * 12.1 * 64 = 516 is rounded up to 768
MODELS: dict[str, tuple[list[Any], list[Any]]] = {
    "different heads and widths": (
        [
            block(attn(n_heads_in_group=8), ffn(ffn_mult=6.0)),
            block(attn(n_heads_in_group=2), ffn(ffn_mult=12.1)),
            block(attn(n_heads_in_group=1), ffn(ffn_mult=12.0)),
        ],
        [(attention(1), mlp(256)), (attention(4), mlp(768)), (attention(8), mlp(512))],
    ),
    "no-op attention in layer 0": (
        [block(attn(**NONE), WIDE), block(GQA, WIDE)],
        [(None, mlp(512)), (attention(2), mlp(512))],
    ),
    "linear attention in layer 0": (
        [block(attn(**LINEAR_MAP), WIDE), block(GQA, WIDE)],
        [(LINEAR, mlp(512)), (attention(2), mlp(512))],
    ),
    "linear MLPs": (
        [block(GQA, ffn(**LINEAR_MAP)), block(attn(**LINEAR_MAP), ffn(**LINEAR_MAP)), block(GQA, WIDE)],
        [(attention(2), LINEAR), (LINEAR, LINEAR), (attention(2), mlp(512))],
    ),
    "dummy layers and an attention alone": (
        [block(attn(**NONE), ffn(**NONE)), block(GQA, ffn(**NONE)), block(attn(**NONE), ffn(**NONE))],
        [(None, None), (attention(2), None), (None, None)],
    ),
    "the last attention is linear": (
        [block(GQA, WIDE), block(attn(**LINEAR_MAP), WIDE), block(attn(**NONE), WIDE)],
        [(attention(2), mlp(512)), (LINEAR, mlp(512)), (None, mlp(512))],
    ),
    "no attention at all": (
        [block(attn(**LINEAR_MAP), WIDE), block(attn(**NONE), ffn(**LINEAR_MAP))],
        [(LINEAR, mlp(512)), (None, LINEAR)],
    ),
    "nothing at all": ([block(attn(**NONE), ffn(**NONE))] * 2, [(None, None)] * 2),
    "a window in one layer": (
        [block(attn(n_heads_in_group=4, window_length=3), WIDE), block(GQA, WIDE)],
        [(attention(2, window=3), mlp(512)), (attention(2), mlp(512))],
    ),
    "widths and activations by name": (
        [block(GQA, ffn(intermediate_size=40, hidden_act="silu")), block(GQA, ffn(intermediate_size=24))],
        [(attention(2), mlp(40)), (attention(2), mlp(24))],
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_a_plain_transformer_of_these_layers(tmp_path: Path, name: str) -> None:
    blocks, layers = MODELS[name]
    spec = spec_of(*layers)
    model = check_parity(write(tmp_path / "m", nas(*blocks), spec), spec)
    assert model.spec.layers == spec.layers
    assert model.notes == ()
    assert model.unread_bytes == 0


def test_an_activation_of_one_layer(tmp_path: Path) -> None:
    config = nas(block(GQA, ffn(intermediate_size=40, hidden_act="relu2")), block(GQA, ffn(intermediate_size=24)))
    spec = spec_of((attention(2), mlp(40)), (attention(2), mlp(24)))
    found = read_model(write(tmp_path / "m", config, spec)).spec
    assert [layer.mlp.activation for layer in found.layers if layer.mlp] == ["relu2", "silu"]  # type: ignore[union-attr]


# hidden_size 8192: the published 51B, whose parent Llama-3.1-70B has 28672; the rest by the rule
WIDTHS = {5.25: 28672, 2.625: 14336, 1.3125: 7168, 3.28125: 17920, 0.5: 2816, 1.0: 5632}


@pytest.mark.parametrize("multiplier", WIDTHS)
def test_widths_of_published_multipliers(multiplier: float) -> None:
    config = nas(block(attn(n_heads_in_group=8), ffn(ffn_mult=multiplier)), hidden_size=8192, num_attention_heads=64)
    declared = read_dialects(Fields(config), 1)
    assert declared.overrides == {0: {"num_key_value_heads": 8, "intermediate_size": WIDTHS[multiplier]}}


# heads in a group of the published 51B, which has 64 of them
@pytest.mark.parametrize("group, heads", [(8, 8), (16, 4), (32, 2), (64, 1)])
def test_key_value_heads_of_published_groups(group: int, heads: int) -> None:
    config = nas(block(attn(n_heads_in_group=group), ffn(ffn_mult=1.0)), hidden_size=8192, num_attention_heads=64)
    assert read_dialects(Fields(config), 1).overrides[0]["num_key_value_heads"] == heads


def test_decilm_7b_lists_its_key_value_heads(tmp_path: Path) -> None:
    """Its config.json repeats a num_key_value_heads that no layer has."""
    keys = {"num_key_value_heads_per_layer": [4, 1, 2], "num_key_value_heads": 8, "use_bfloat16": True}
    spec = spec_of((attention(4), mlp(256)), (attention(1), mlp(256)), (attention(2), mlp(256)))
    folder = write(tmp_path / "m", config_of(3, model_type="deci", pretraining_tp=1, **keys), spec)
    assert check_parity(folder, spec).declared == ("num_key_value_heads_per_layer: num_key_value_heads by layer",)


def test_the_published_list_of_decilm_7b() -> None:
    per_layer = [4] * 5 + [2] * 5 + [4] + [2] * 9 + [1] * 11 + [4]
    config = {
        "model_type": "deci",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "max_position_embeddings": 8192,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads_per_layer": per_layer,
        "rope_scaling": {"type": "dynamic", "factor": 2.0},
        "rms_norm_eps": 1e-5,
        "vocab_size": 32000,
    }
    fields = Fields(config)
    spec = FAMILIES["deci"].spec(fields.with_layer_overrides(read_dialects(fields, 32).sizes))
    assert [each.num_kv_heads for _, each in spec.attentions()] == per_layer
    assert {each.head_dim for _, each in spec.attentions()} == {128}


REFUSED: dict[str, tuple[list[Any], tuple[str, ...]]] = {
    "a block too few": ([block(GQA, WIDE)], ("1 entries", "2")),
    "a block too many": ([block(GQA, WIDE)] * 3, ("3 entries", "2")),
    "an object": ({}, ("block_configs is {}",)),
    "a text": ("x", ('block_configs is "x"',)),
    "a block null": ([None, block(GQA, WIDE)], ("[0] is null",)),
    "a block a list": ([block(GQA, WIDE), []], ("[1] is []",)),
    "no ffn": ([block(GQA, WIDE), {"attention": GQA}], ("[1]", "ffn")),
    "attention null": ([{"attention": None, "ffn": WIDE}, block(GQA, WIDE)], ("[0]", "attention")),
    "attention a text": ([{"attention": "x", "ffn": WIDE}, block(GQA, WIDE)], ('[0] attention is "x"',)),
    "a third subblock": ([block(GQA, WIDE), {**block(GQA, WIDE), "router": {}}], ("[1]", "router")),
    "parallel blocks": ([block(GQA, WIDE), {**block(GQA, WIDE), "parallel_blocks": [{}]}], ("parallel_blocks",)),
    "two flags": ([block(attn(**NONE, **LINEAR_MAP), WIDE), block(GQA, WIDE)], ("[0] attention", "linear")),
    "a no-op with heads": ([block(attn(no_op=True, n_heads_in_group=4), WIDE), block(GQA, WIDE)], ("no-op", "heads")),
    "a no-op with a window": ([block(attn(no_op=True, window_length=4), WIDE), block(GQA, WIDE)], ("no-op", "window")),
    "a no-op with a width": ([block(GQA, ffn(no_op=True, ffn_mult=1.0)), block(GQA, WIDE)], ("[0] ffn", "no-op")),
    "a flag of 1": ([block(attn(no_op=1), WIDE), block(GQA, WIDE)], ("[0] attention", "true or false")),
    "a flag of text": ([block(GQA, ffn(replace_with_linear="no")), block(GQA, WIDE)], ("[0] ffn", "true or false")),
    "no heads": ([block(attn(), WIDE), block(GQA, WIDE)], ("[0] attention", "n_heads_in_group")),
    "no width": ([block(GQA, ffn()), block(GQA, WIDE)], ("[0] ffn", "ffn_mult")),
    "a group of no divisor": ([block(attn(n_heads_in_group=3), WIDE), block(GQA, WIDE)], ("3", "8", "[0] attention")),
    "a group of 0": ([block(attn(n_heads_in_group=0), WIDE), block(GQA, WIDE)], ("n_heads_in_group",)),
    "a group of true": ([block(attn(n_heads_in_group=True), WIDE), block(GQA, WIDE)], ("n_heads_in_group",)),
    "a multiplier of text": ([block(GQA, ffn(ffn_mult="2")), block(GQA, WIDE)], ("[0] ffn", "ffn_mult")),
    "a negative multiplier": ([block(GQA, ffn(ffn_mult=-1.0)), block(GQA, WIDE)], ("[0] ffn", "ffn_mult")),
    "a huge multiplier": ([block(GQA, ffn(ffn_mult=1e300)), block(GQA, WIDE)], ("[0] ffn", "ffn_mult")),
    "a window of 0": ([block(attn(n_heads_in_group=4, window_length=0), WIDE), block(GQA, WIDE)], ("sliding_window",)),
    "sinks": ([block(attn(n_heads_in_group=4, num_sink_tokens=4), WIDE), block(GQA, WIDE)], ("num_sink_tokens",)),
    "shifted": ([block(attn(n_heads_in_group=4, unshifted_sink=True), WIDE), block(GQA, WIDE)], ("unshifted_sink",)),
    "a prefill window": (
        [block(attn(n_heads_in_group=4, use_prefill_window_in_sink_attention=True), WIDE), block(GQA, WIDE)],
        ("use_prefill_window_in_sink_attention",),
    ),
    "an unknown key": ([block(GQA, {**WIDE, "sparkle": 0}), block(GQA, WIDE)], ("[0] ffn", "sparkle")),
    "an unknown activation": ([block(GQA, {**WIDE, "hidden_act": "mish"}), block(GQA, WIDE)], ("mish",)),
}


@pytest.mark.parametrize("case", REFUSED)
def test_blocks_that_are_not_clear_are_refused(tmp_path: Path, case: str) -> None:
    blocks, words = REFUSED[case]
    config = {**nas(block(GQA, WIDE), block(GQA, WIDE)), "block_configs": blocks}
    message = refused(tmp_path / "m", config)
    assert all(word in message for word in words), message


def test_what_is_switched_off_may_have_any_name(tmp_path: Path) -> None:
    entry = {**attn(n_heads_in_group=4, num_sink_tokens=0), "sparkle": None, "glitter": False}
    spec = spec_of((attention(2), mlp(512)))
    assert read_model(write(tmp_path / "m", nas(block(entry, {**WIDE, "moe": None})), spec)).spec.layers == spec.layers


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2"])
def test_only_families_with_a_name_for_it_have_linear_maps(tmp_path: Path, model_type: str) -> None:
    config = config_of(1, model_type=model_type, block_configs=[block(attn(**LINEAR_MAP), WIDE)])
    assert "linear map" in refused(tmp_path / "m", config)


def test_norms_that_no_ops_left_behind_are_not_read(tmp_path: Path) -> None:
    spec = spec_of((None, mlp(512)), (attention(2), None))
    left = {hf_name(f"layers.{i}.{kind}.pre.weight"): torch.ones(64) for i, kind in ((0, "attention"), (1, "mlp"))}
    config = nas(block(attn(**NONE), WIDE), block(GQA, ffn(**NONE)))
    assert check_parity(write(tmp_path / "m", config, spec, **left), spec).unread_bytes == 2 * 64 * 4


def test_tensors_of_an_attention_beside_its_linear_map_are_refused(tmp_path: Path) -> None:
    spec = spec_of((LINEAR, mlp(512)))
    more = {hf_name("layers.0.attention.q.weight"): torch.ones(64, 64)}
    with pytest.raises(CheckpointError, match=r"q_proj") as caught:
        read_model(write(tmp_path / "m", nas(block(attn(**LINEAR_MAP), WIDE)), spec, **more))
    assert caught.value.code == "UNEXPECTED_TENSOR"


def test_more_may_be_dropped_from_such_a_model(tmp_path: Path) -> None:
    """The lists of LLM-Drop beside blocks: a linear map may go like any other sublayer."""
    spec = spec_of((None, mlp(512)), (attention(2), None))
    config = nas(block(attn(**LINEAR_MAP), WIDE), block(GQA, WIDE), drop_attn_list=[0], drop_mlp_list=[1])
    model = check_parity(write(tmp_path / "m", config, spec), spec)
    assert model.dense_spec.dropped("attention") == ()
    assert model.dense_spec.layers[0].attention == LINEAR
