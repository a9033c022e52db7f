"""`per_layer_config` and the lists of LLM-Drop: what is clear is read, what is not is refused in words of the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pyruntime.bench import summary
from pyruntime.checkpoint import read_model
from pyruntime.passes import load_drop_plan
from tests.checkpoint.dialects.tiny import attention, check_parity, config_of, mlp, refused, spec_of, write

UNCLEAR: dict[str, tuple[Any, tuple[str, ...]]] = {
    "a size null": ({"1": {"intermediate_size": None}}, ('["1"] has intermediate_size null', "expected a value")),
    "a layer a list": ({"1": ["mlp"]}, ('["1"] is ["mlp"]', "expected an object")),
    "a layer null": ({"1": None}, ('["1"] is null', "expected an object")),
    "a layer twice": ({"1": {"skip": ["mlp"]}, "01": {}}, ('["01"]', "layer 1 a second time", "merge")),
    "a list in the skips": ({"1": {"skip": [["mlp"]]}}, ('skips [["mlp"]]', '"attention"')),
    "a skip of text": ({"1": {"skip": "mlp"}}, ('skips "mlp"', "a list of")),
    "an unknown key": ({"1": {"sparkle": 1}}, ("overrides sparkle;", "supported: skip, head_dim")),
    "no object": ([], ("per_layer_config is []", "expected an object")),
    "a window": ({"1": {"sliding_window": 3}}, ("sliding_window of layer 1 is 3", "llama has null", "remove it")),
}


@pytest.mark.parametrize("case", UNCLEAR)
def test_overrides_that_are_not_clear_are_refused(tmp_path: Path, case: str) -> None:
    table, words = UNCLEAR[case]
    message = refused(tmp_path / "m", config_of(2, per_layer_config=table))
    assert all(word in message for word in words), message


def test_no_window_in_one_layer_is_a_window_of_null(tmp_path: Path) -> None:
    spec = spec_of((attention(4, window=5), mlp(256)), (attention(4), mlp(256)))
    table = {"1": {"sliding_window": None}}
    config = config_of(2, model_type="mistral", sliding_window=5, per_layer_config=table)
    assert check_parity(write(tmp_path / "m", config, spec), spec).spec.layers == spec.layers


def test_sizes_of_what_is_skipped_mean_nothing(tmp_path: Path) -> None:
    """The dense form is known: it is that of the other layers."""
    spec = spec_of((attention(4), mlp(256)), (attention(4), None))
    table = {"1": {"skip": ["mlp"], "intermediate_size": 8}}
    model = check_parity(write(tmp_path / "m", config_of(2, per_layer_config=table), spec), spec)
    (note,) = model.notes
    assert "intermediate_size of layer 1" in note
    assert model.declared == ("per_layer_config: MLP 1",)
    # three matrices of 256 x 64 and a norm more
    facts = summary(model, 4, 1, 10)
    assert facts["dense_num_weights"] == facts["num_weights"] + 3 * 256 * 64 + 64


@pytest.mark.parametrize("mask", [[0, 1, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]])
def test_a_mask_of_integers_is_no_list_of_ids(tmp_path: Path, mask: list[int]) -> None:
    message = refused(tmp_path / "m", config_of(4, drop_attn_list=mask), "DROP")
    assert all(word in message for word in ("drop_attn_list", "one per layer", "true and false", "ids"))


@pytest.mark.parametrize("ids, gone", [([0, 1], (0, 1)), ([1, 0, 1], (0, 1)), ([2, 2, 0, 1], (0, 1, 2))])
def test_ids_that_are_no_mask_are_read(tmp_path: Path, ids: list[int], gone: tuple[int, ...]) -> None:
    spec = spec_of(*[(None if index in gone else attention(4), mlp(256)) for index in range(4)])
    folder = write(tmp_path / "m", config_of(4, drop_attn_list=ids), spec)
    assert read_model(folder).spec.dropped("attention") == gone


def test_an_exact_width_counts_whatever_the_multiplier_says(tmp_path: Path) -> None:
    """Whichever of the two stands first."""
    for name, ffn in (
        ("a", {"ffn_mult": 12.0, "intermediate_size": 40}),
        ("b", {"intermediate_size": 40, "ffn_mult": 1}),
    ):
        blocks = [{"attention": {"num_key_value_heads": 4}, "ffn": ffn}]
        spec = spec_of((attention(4), mlp(40)))
        folder = write(tmp_path / name, config_of(1, block_configs=blocks), spec)
        assert read_model(folder).spec.layers == spec.layers


def test_skips_alone_are_a_plan_for_any_model(tmp_path: Path) -> None:
    """They override nothing whose meaning would depend on the model."""
    (tmp_path / "config.json").write_text(json.dumps(config_of(4, per_layer_config={"2": {"skip": ["attention"]}})))
    plan = load_drop_plan(tmp_path)
    assert (plan.attention, plan.mlp) == ((2,), ())
