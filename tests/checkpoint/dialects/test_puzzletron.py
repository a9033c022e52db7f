"""ModelOpt's Puzzletron: both generations of its blocks, for families of any name, and beside per_layer_config."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pyruntime.checkpoint import read_model
from tests.checkpoint.dialects.tiny import attention, check_parity, config_of, mlp, refused, spec_of, write

ANY = {
    "architectures": ["AnyModel"],
    "base_architecture": "LlamaForCausalLM",
    "anymodel_arch_info": {"decoder_layer_module": ".llama", "decoder_layer_class": "LlamaDecoderLayer"},
}


def first(attention_keys: dict[str, Any], ffn_keys: dict[str, Any]) -> dict[str, Any]:
    """A block of the first generation, with all its keys."""
    common = {"no_op": False, "replace_with_linear": False, "sparsify": None, "weights_precision": "bf16"}
    return {
        "attention": {**common, "num_key_value_heads": None, "llama4": None, "mamba": None, **attention_keys},
        "ffn": {**common, "moe": None, "intermediate_size": None, **ffn_keys},
        "parallel_blocks": None,
    }


def second(attention_keys: dict[str, Any], ffn_keys: dict[str, Any]) -> dict[str, Any]:
    """A block of the second generation, with all its keys; the order of subblocks says nothing."""
    sizes = ("num_kv_heads", "num_query_heads", "qk_head_dim", "v_head_dim", "sliding_window_size", "kv_source_layer")
    return {
        "subblock_configs": [
            {"kind": "ffn", "name": "ffn", "no_op": False, "intermediate_size": None, **ffn_keys},
            {
                "kind": "attention",
                "name": "attention",
                "no_op": False,
                **dict.fromkeys(sizes),
                "k_eq_v": False,
                "llama4": None,
                **attention_keys,
            },
        ]
    }


NONE = {"no_op": True}
BLOCKS: dict[str, tuple[list[Any], list[Any]]] = {
    "first generation": (
        [
            first({"num_key_value_heads": 2}, {"intermediate_size": 40}),
            first(NONE, {"intermediate_size": 256}),
            first({"num_key_value_heads": 4}, NONE),
            first({"num_key_value_heads": 8}, {"intermediate_size": 24}),
        ],
        [(attention(2), mlp(40)), (None, mlp(256)), (attention(4), None), (attention(8), mlp(24))],
    ),
    "second generation": (
        [
            second({"num_kv_heads": 2, "num_query_heads": 4}, {"intermediate_size": 40}),
            second(NONE, {"intermediate_size": 256}),
            second({"qk_head_dim": 16, "v_head_dim": 16}, NONE),
            second({"sliding_window_size": "full"}, {}),
        ],
        [(attention(2, 4), mlp(40)), (None, mlp(256)), (attention(4, head_dim=16), None), (attention(4), mlp(256))],
    ),
}


@pytest.mark.parametrize("case", BLOCKS)
@pytest.mark.parametrize("model_type", ["llama", ..., "any_model"])
def test_logits_are_those_of_a_plain_transformer_of_these_layers(tmp_path: Path, model_type: Any, case: str) -> None:
    blocks, layers = BLOCKS[case]
    spec = spec_of(*layers)
    config = config_of(len(blocks), block_configs=blocks, **{**ANY, "model_type": model_type})
    model = check_parity(write(tmp_path / "m", config, spec), spec)
    assert model.spec.layers == spec.layers
    assert model.notes == ()


def test_windows_of_a_family_that_has_them(tmp_path: Path) -> None:
    blocks = [second({"sliding_window_size": size}, {}) for size in (3, "full", None)]
    spec = spec_of((attention(4, window=3), mlp(256)), (attention(4), mlp(256)), (attention(4, window=5), mlp(256)))
    config = config_of(3, model_type="mistral", sliding_window=5, block_configs=blocks)
    assert check_parity(write(tmp_path / "m", config, spec), spec).spec.layers == spec.layers


def test_an_export_with_both_schemas_says_one_thing(tmp_path: Path) -> None:
    blocks, layers = BLOCKS["first generation"]
    table = {
        "0": {"num_key_value_heads": 2, "intermediate_size": 40},
        "1": {"skip": ["attention"]},
        "2": {"skip": ["mlp"]},
        "3": {"num_key_value_heads": 8, "intermediate_size": 24},
    }
    spec = spec_of(*layers)
    config = config_of(4, block_configs=blocks, per_layer_config=table, **ANY)
    model = check_parity(write(tmp_path / "m", config, spec), spec)
    assert model.notes == ()
    other = write(tmp_path / "n", {**config, "per_layer_config": {**table, "2": {"skip": ["attention"]}}}, spec)
    differ = read_model(other)
    assert (differ.spec.dropped("attention"), differ.spec.dropped("mlp")) == ((1, 2), (2,))
    # what was never built and what is skipped may complement each other
    assert differ.notes == ()
    clash = {**config, "per_layer_config": {**table, "0": {"num_key_value_heads": 4}}}
    assert "two values of num_key_value_heads" in refused(tmp_path / "clash", clash)


OFF: dict[str, tuple[dict[str, Any], str]] = {
    "mamba": (first({"mamba": {"state_dim": 8}}, {"intermediate_size": 40}), "mamba"),
    "llama 4": (first({"num_key_value_heads": 4, "llama4": {"use_rope": False}}, {"intermediate_size": 40}), "llama4"),
    "experts": (first({"num_key_value_heads": 4}, {"moe": {"num_local_experts": 8}}), "moe"),
    "typed experts": ({"subblock_configs": [{"kind": "attention"}, {"kind": "moe", "num_experts": 8}]}, "moe"),
    "typed mamba": ({"subblock_configs": [{"kind": "mamba"}, {"kind": "ffn"}]}, "mamba"),
    "latent attention": ({"subblock_configs": [{"kind": "mla"}, {"kind": "ffn"}]}, "mla"),
    "no kind": ({"subblock_configs": [{"name": "attention"}, {"kind": "ffn"}]}, "null"),
    "a kind of a list": ({"subblock_configs": [{"kind": ["attention"]}, {"kind": "ffn"}]}, "attention"),
    "one subblock": ({"subblock_configs": [{"kind": "attention"}]}, "ffn"),
    "two attentions": ({"subblock_configs": [{"kind": "attention"}] * 2}, "attention"),
    "subblocks of text": ({"subblock_configs": ["attention", "ffn"]}, "subblock_configs"),
    "subblocks as object": ({"subblock_configs": {"attention": {}}}, "subblock_configs"),
    "keys of another layer": (second({"kv_source_layer": 0}, {}), "kv_source_layer"),
    "keys that are values": (second({"k_eq_v": True}, {}), "k_eq_v"),
    "values of another size": (second({"qk_head_dim": 16, "v_head_dim": 8}, {}), "two values of head_dim"),
    "heads no multiple": (second({"num_query_heads": 6}, {}), "multiple"),
    "heads of text": (second({"num_kv_heads": "4"}, {}), "num_key_value_heads"),
    "heads of true": (second({"num_kv_heads": True}, {}), "num_key_value_heads"),
    "a window where the family has none": (second({"sliding_window_size": 64}, {}), "sliding_window"),
    "a window of text": (second({"sliding_window_size": "half"}, {}), "sliding_window"),
    "a no-op with heads": (second({"no_op": True, "num_kv_heads": 4}, {}), "no-op"),
}


@pytest.mark.parametrize("case", OFF)
def test_what_cannot_be_run_is_refused_by_name(tmp_path: Path, case: str) -> None:
    bad, word = OFF[case]
    assert word in refused(tmp_path / "m", config_of(1, block_configs=[bad], **ANY))


@pytest.mark.parametrize("window", [64, "full"])
def test_windows_are_refused_where_layers_differ_in_more_than_that(tmp_path: Path, window: Any) -> None:
    """Qwen2 lists its sliding layers in `layer_types`; an override of the width alone would be read by nobody."""
    listed = ["full_attention"] if window == 64 else ["sliding_attention"]
    config = config_of(
        1,
        model_type="qwen2",
        layer_types=listed,
        use_sliding_window=True,
        sliding_window=8,
        block_configs=[second({"sliding_window_size": window}, {})],
    )
    assert "sliding_window of layer 0" in refused(tmp_path / "m", config)


@pytest.mark.parametrize("base", ["GPT2LMHeadModel", "", 3, None, ["LlamaForCausalLM"]])
def test_an_unknown_base_is_refused(tmp_path: Path, base: Any) -> None:
    config = config_of(1, **{**ANY, "model_type": "any_model", "base_architecture": base})
    assert "model_type" in refused(tmp_path / "m", config)
