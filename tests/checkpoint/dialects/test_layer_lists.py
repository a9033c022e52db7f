"""Sizes listed layer by layer, under names of their own or under the plain keys; a size of 0 is nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pyruntime.checkpoint import read_model
from tests.checkpoint.dialects.tiny import attention, check_parity, config_of, mlp, refused, spec_of, write

# config keys, and what each layer has
LISTS: dict[str, tuple[dict[str, Any], list[Any]]] = {
    "pruned heads and widths": (
        # as a published example has them: the heads of queries, keys and values go together, down to none
        {"layer_head_num": [5, 0, 1], "layer_inter_size": [40, 24, 256], "num_key_value_heads": 8, "layer_num": 3},
        [(attention(5, 5), mlp(40)), (None, mlp(24)), (attention(1, 1), mlp(256))],
    ),
    "pruned heads where no key-value heads are named": (
        {"layer_head_num": [0, 3], "num_key_value_heads": None},
        [(None, mlp(256)), (attention(3, 3), mlp(256))],
    ),
    "pruned queries over the key-value heads of all layers": (
        {"layer_head_num": [4, 8]},
        [(attention(4, 4), mlp(256)), (attention(4, 8), mlp(256))],
    ),
    "plain widths": (
        {"intermediate_size": [0, 24, 40]},
        [(attention(4), None), (attention(4), mlp(24)), (attention(4), mlp(40))],
    ),
    "plain key-value heads": (
        {"num_key_value_heads": [2, 0, 8]},
        [(attention(2), mlp(256)), (None, mlp(256)), (attention(8), mlp(256))],
    ),
    "plain heads": (
        {"num_attention_heads": [0, 4, 6], "num_key_value_heads": [0, 2, 3], "head_dim": 8},
        [(None, mlp(256)), (attention(2, 4), mlp(256)), (attention(3, 6), mlp(256))],
    ),
    "all plain keys": (
        {
            "num_attention_heads": [4, 2],
            "num_key_value_heads": [2, 1],
            "head_dim": [16, 8],
            "intermediate_size": [40, 24],
        },
        [(attention(2, 4, 16), mlp(40)), (attention(1, 2, 8), mlp(24))],
    ),
    "nothing left": ({"layer_head_num": [0, 0], "layer_inter_size": [0, 0]}, [(None, None)] * 2),
}


@pytest.mark.parametrize("case", LISTS)
def test_logits_are_those_of_a_plain_transformer_of_these_layers(tmp_path: Path, case: str) -> None:
    keys, layers = LISTS[case]
    spec = spec_of(*layers)
    model = check_parity(write(tmp_path / "m", config_of(len(layers), **keys), spec), spec)
    assert model.spec.layers == spec.layers
    assert model.notes == ()


def test_a_list_of_equal_sizes_is_the_size(tmp_path: Path) -> None:
    spec = spec_of((attention(4), mlp(256)), (attention(4), mlp(256)))
    plain = read_model(write(tmp_path / "m", config_of(2), spec))
    listed = read_model(write(tmp_path / "n", config_of(2, intermediate_size=[256] * 2), spec))
    assert listed.spec == plain.spec == listed.dense_spec


def test_lists_and_per_layer_config_together(tmp_path: Path) -> None:
    spec = spec_of((attention(4, 8), mlp(40)), (None, mlp(24)))
    config = config_of(2, layer_inter_size=[40, 24], per_layer_config={"1": {"skip": ["attention"]}})
    check_parity(write(tmp_path / "m", config, spec), spec)
    clash = {**config, "per_layer_config": {"1": {"intermediate_size": 40}}}
    assert "two values of intermediate_size" in refused(tmp_path / "n", clash)


WRONG: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "too short": ({"layer_inter_size": [40]}, ("layer_inter_size", "1 entries", "2")),
    "too long": ({"intermediate_size": [40] * 3}, ("intermediate_size", "3 entries", "2")),
    "empty": ({"layer_head_num": []}, ("layer_head_num", "0 entries")),
    "a number": ({"layer_head_num": 4}, ("layer_head_num is 4;",)),
    "an object": ({"num_key_value_heads_per_layer": {"0": 4}}, ("num_key_value_heads_per_layer", '{"0": 4}')),
    "a bool": ({"layer_head_num": [4, True]}, ("layer_head_num[1]", "true")),
    "a text": ({"intermediate_size": ["40", 40]}, ("intermediate_size[0]", '"40"')),
    "a float": ({"intermediate_size": [40.0, 40]}, ("intermediate_size[0]", "40.0")),
    "null": ({"intermediate_size": [None, 40]}, ("intermediate_size[0]", "null")),
    "negative": ({"intermediate_size": [-1, 40]}, ("intermediate_size[0]", "-1")),
    "huge": ({"intermediate_size": [40, 10**12]}, ("intermediate_size", "1000000000000")),
    "heads of no size": ({"num_attention_heads": [4, 8]}, ("num_attention_heads", "head_dim")),
    "heads of size 0": ({"head_dim": [8, 0]}, ("head_dim", "0 in layer 1")),
    "two lists": ({"intermediate_size": [40, 24], "layer_inter_size": [40, 25]}, ("layer_inter_size[1]", "25", "24")),
    "a size and none": (
        {"intermediate_size": [0, 24], "layer_inter_size": [40, 24]},
        ("layer_inter_size[0]", "40", "0"),
    ),
    "none and a size": (
        {"intermediate_size": [40, 24], "layer_inter_size": [0, 24]},
        ("layer_inter_size[0]", "0", "40"),
    ),
    "other layers": ({"layer_inter_size": [40, 24], "layer_num": 3}, ("layer_num", "3")),
    "heads no multiple": ({"layer_head_num": [8, 6]}, ("6", "4", "multiple")),
}


@pytest.mark.parametrize("case", WRONG)
def test_lists_that_are_not_clear_are_refused(tmp_path: Path, case: str) -> None:
    keys, words = WRONG[case]
    message = refused(tmp_path / "m", config_of(2, **keys))
    assert all(word in message for word in words), message


def test_overrides_that_a_family_would_not_read_are_refused(tmp_path: Path) -> None:
    """Gemma reads hidden_activation, and Llama no window: an override that nobody reads must not be lost."""
    for model_type, override in (
        ("gemma2", {"hidden_act": "silu"}),
        ("llama", {"sliding_window": 4}),
        ("qwen2", {"sliding_window": 4}),
        ("gemma2", {"hidden_act": ["silu"]}),
    ):
        config = config_of(2, model_type=model_type, head_dim=8, per_layer_config={"1": override})
        (name,) = override
        assert f"{name} of layer 1" in refused(tmp_path / model_type, config)


@pytest.mark.parametrize("key", ["sparkle", "a\x1b[2J", "x" * 10_000])
def test_names_of_unknown_keys_cannot_garble_a_terminal(tmp_path: Path, key: str) -> None:
    entry = {"attention": {"num_key_value_heads": 4, key: 1}, "ffn": {}}
    message = refused(tmp_path / "m", config_of(1, block_configs=[entry]))
    assert ascii(key[:8])[1:-1] in message and len(message) < 300


def test_overrides_of_activation_and_window(tmp_path: Path) -> None:
    spec = spec_of((attention(4), mlp(256)), (attention(4), mlp(256)))
    table = {"0": {"hidden_act": "relu2"}, "1": {"sliding_window": 3}}
    config = config_of(2, model_type="mistral", sliding_window=None, per_layer_config=table)
    found = read_model(write(tmp_path / "m", config, spec)).spec
    assert [layer.mlp.activation for layer in found.layers if layer.mlp] == ["relu2", "silu"]  # type: ignore[union-attr]
    assert [each.window for _, each in found.attentions()] == [None, 3]
