"""Files that say which sublayers go: what each dialect means for a model of four layers, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pyruntime.errors import PyruntimeError, UsageError
from pyruntime.passes import load_drop_plan, make_drop_plan, save_drop_plan
from pyruntime.spec import DropPlan, ModelSpec
from tests.checkpoint.dialects.tiny import attention, config_of, mlp, spec_of

MODEL: ModelSpec = spec_of(*[(attention(4), mlp(256))] * 4)


def as_file(path: Path, data: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    return path


def plan(said: str | Path, spec: ModelSpec | None = MODEL) -> tuple[tuple[int, ...], tuple[int, ...]]:
    found = load_drop_plan(said, spec)
    assert found.origin
    return found.attention, found.mlp


def refused(said: str | Path, spec: ModelSpec | None = MODEL) -> str:
    with pytest.raises(UsageError) as caught:
        load_drop_plan(said, spec)
    assert (caught.value.code, caught.value.exit_code) == ("DROP_PLAN", 2)
    assert "\n" not in caught.value.one_line() and len(str(caught.value)) < 2100
    return str(caught.value)


# configurations


def blocks(*no_ops: tuple[bool, bool], kv_heads: int = 4) -> list[Any]:
    return [
        {
            "attention": {"no_op": True} if first else {"num_key_value_heads": kv_heads},
            "ffn": {"no_op": True} if second else {"intermediate_size": 256},
        }
        for first, second in no_ops
    ]


CONFIGS: dict[str, tuple[dict[str, Any], tuple[int, ...], tuple[int, ...], str]] = {
    "drop lists": ({"drop_attn_list": [3, 1], "drop_mlp_list": None}, (1, 3), (), "drop_attn_list"),
    "bools": ({"drop_mlp_list": [False, False, True, False]}, (), (2,), "drop_mlp_list"),
    "skips": ({"per_layer_config": {"02": {"skip": ["attention", "mlp"]}}}, (2,), (2,), "per_layer_config"),
    "no-ops": (
        {"block_configs": blocks((True, False), (False, False), (False, True), (False, False))},
        (0,),
        (2,),
        "block_configs",
    ),
    "widths of 0": ({"layer_inter_size": [256, 0, 256, 256]}, (), (1,), "0"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_configuration_is_a_plan(tmp_path: Path, case: str) -> None:
    keys, attn, mlps, origin = CONFIGS[case]
    file = as_file(tmp_path / "m" / "config.json", config_of(4, **keys))
    for said in (file, file.parent, str(file), as_file(tmp_path / "m" / "other.json", file.read_text())):
        assert plan(said) == (attn, mlps)
    assert origin in load_drop_plan(file, MODEL).origin


OTHER_CONFIGS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "another number of layers": ({"num_hidden_layers": 5, "drop_attn_list": [1]}, ("5", "4 layers")),
    "nothing gone": ({}, ("drops nothing",)),
    "null lists": ({"drop_attn_list": None, "drop_mlp_list": []}, ("drops nothing",)),
    "an id beyond": ({"drop_attn_list": [4]}, ("drop_attn_list", "0 to 3")),
    "other heads": ({"block_configs": blocks((True, False), *[(False, False)] * 3, kv_heads=2)}, ("num_key_value",)),
    "other widths": ({"drop_attn_list": [0], "per_layer_config": {"1": {"intermediate_size": 24}}}, ("layer 1", "24")),
    "heads of true": (
        {"drop_attn_list": [0], "per_layer_config": {"1": {"num_key_value_heads": True}}},
        ("num_key_value_heads", "true"),
    ),
    "a width of a float": (
        {"drop_attn_list": [0], "per_layer_config": {"1": {"intermediate_size": 256.0}}},
        ("intermediate_size", "256.0"),
    ),
    "activations in a list": (
        {"drop_attn_list": [0], "per_layer_config": {"1": {"hidden_act": ["silu"]}}},
        ("hidden_act", "silu"),
    ),
    "linear maps": (
        {"block_configs": [*blocks(*[(True, False)] * 3), {"attention": {"replace_with_linear": True}, "ffn": {}}]},
        ("linear",),
    ),
}


@pytest.mark.parametrize("case", OTHER_CONFIGS)
def test_a_configuration_of_another_model_is_refused(tmp_path: Path, case: str) -> None:
    keys, words = OTHER_CONFIGS[case]
    file = as_file(tmp_path / "m" / "config.json", config_of(4, **keys))
    message = refused(file)
    assert all(word in message for word in words), message
    assert str(file) in message


def test_sizes_of_sublayers_that_the_model_goes_without_are_not_compared(tmp_path: Path) -> None:
    without = spec_of((None, mlp(256)), *[(attention(4), mlp(256))] * 3)
    keys = {"block_configs": blocks(*[(False, False)] * 3, (True, False)), "per_layer_config": {"0": {"head_dim": 8}}}
    assert plan(as_file(tmp_path / "config.json", config_of(4, **keys)), without) == ((3,), ())


# BlockPruner

STEPS = {"1": [["mha", 3]], "2": [["mlp", 0], ["mha", 3]], "10": [["mha", i] for i in range(4)]}


def test_a_step_of_block_pruner_is_chosen_behind_the_path(tmp_path: Path) -> None:
    file = as_file(tmp_path / "order.json", STEPS)
    assert plan(f"{file}#1") == ((3,), ())
    assert plan(f"{file}#2") == ((3,), (0,))
    assert plan(f"{file}#10") == ((0, 1, 2, 3), ())
    assert "2" in load_drop_plan(f"{file}#2").origin
    assert plan(as_file(tmp_path / "one.json", {"2": STEPS["2"]})) == ((3,), (0,))
    message = refused(file)
    assert "#n" in message and "1, 2, 10" in message
    for wrong in ("3", "", "01", "1 "):
        assert "1, 2, 10" in refused(f"{file}#{wrong}")


def test_a_file_whose_name_has_a_hash_is_a_file(tmp_path: Path) -> None:
    file = as_file(tmp_path / "run#2", {"1": [["mha", 1]]})
    assert plan(file) == ((1,), ())
    assert plan(f"{file}#1") == ((1,), ())
    folder = as_file(tmp_path / "a#b" / "order.json", STEPS)
    assert plan(f"{folder}#1") == ((3,), ())
    assert "no-such.json#1" in refused(tmp_path / "no-such.json#1")


BAD_STEPS: dict[str, Any] = {
    "another kind": [["norm", 1]],
    "no pair": [["mha"]],
    "three": [["mha", 1, 2]],
    "an object": [{"mha": 1}],
    "a text": ["mha"],
    "a number": [3],
    "an id of text": [["mha", "1"]],
    "an id of true": [["mha", True]],
    "a negative id": [["mha", -1]],
    "a list for a kind": [[["mha"], 1]],
}


@pytest.mark.parametrize("case", BAD_STEPS)
def test_steps_that_are_not_clear_are_refused(tmp_path: Path, case: str) -> None:
    refused(as_file(tmp_path / "order.json", {"1": BAD_STEPS[case]}))


def test_an_id_beyond_the_model_is_refused_where_it_is_dropped(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="0 to 3"):
        make_drop_plan(MODEL, drop_plan=as_file(tmp_path / "order.json", {"1": [["mha", 4]]}))


# LLM-Drop's phase one: ids 0 to 3 are attentions, 4 to 7 MLPs


def test_kept_layers_of_both_kinds(tmp_path: Path) -> None:
    assert plan(as_file(tmp_path / "reserved_layers.json", [0, 2, 4, 5, 6])) == ((1, 3), (3,))
    assert plan(as_file(tmp_path / "reserved_layers.json", [7])) == ((0, 1, 2, 3), (0, 1, 2))
    assert plan(as_file(tmp_path / "reserved_layers.json", list(range(7)))) == ((), (3,))


def test_kept_layers_of_one_kind_need_a_word_or_a_mapping(tmp_path: Path) -> None:
    file = as_file(tmp_path / "reserved_layers.json", [0, 2, 3])
    message = refused(file)
    assert all(f"#{target}" in message for target in ("attn", "mlp", "all", "block"))
    assert plan(f"{file}#attn") == ((1,), ())
    assert plan(f"{file}#mlp") == ((), (1,))
    assert plan(f"{file}#block") == ((1,), (1,))
    # attentions 0, 2 and 3 are all that is kept
    assert plan(f"{file}#all") == ((1,), (0, 1, 2, 3))
    assert "#layer" in refused(f"{file}#layer")
    mapping = as_file(tmp_path / "layer_mapping.json", {"0": 0, "2": 1, "3": 2})
    assert plan(file) == plan(mapping) == ((1,), (1,))
    # of another run
    as_file(mapping, {"0": 0, "1": 1, "3": 2})
    assert "layer_mapping.json" in refused(file)


BAD_KEPT: dict[str, Any] = {
    "beyond": [0, 8],
    "negative": [-1, 4],
    "twice": [0, 4, 4],
    "a bool": [True, 4],
    "a text": ["0", 4],
    "a float": [0.0, 4],
    "null": [None, 4],
    "nothing": [],
}


@pytest.mark.parametrize("case", BAD_KEPT)
def test_kept_layers_that_are_not_clear_are_refused(tmp_path: Path, case: str) -> None:
    refused(as_file(tmp_path / "reserved_layers.json", BAD_KEPT[case]))


def test_kept_layers_beyond_the_chosen_kind_are_refused(tmp_path: Path) -> None:
    file = as_file(tmp_path / "reserved_layers.json", [0, 4])
    for target in ("attn", "mlp", "block"):
        assert "0 to 3" in refused(f"{file}#{target}")
    assert "0 to 3" in refused(as_file(tmp_path / "layer_mapping.json", {"4": 0}))


# the door itself


def test_our_own_plan_and_others_come_in_by_the_same_door(tmp_path: Path) -> None:
    save_drop_plan(DropPlan((1,), (), "by score"), tmp_path / "plan.json")
    assert make_drop_plan(MODEL, drop_plan=str(tmp_path / "plan.json")) == DropPlan((1,), (), "by score")
    both = make_drop_plan(MODEL, drop_attn="0", drop_plan=f"{as_file(tmp_path / 'o.json', STEPS)}#2")
    assert (both.attention, both.mlp) == ((0, 3), (0,))
    assert "BlockPruner" in both.origin


def test_a_choice_where_there_is_none_is_refused(tmp_path: Path) -> None:
    save_drop_plan(DropPlan((1,)), tmp_path / "plan.json")
    assert "#2" in refused(f"{tmp_path / 'plan.json'}#2")
    file = as_file(tmp_path / "config.json", config_of(4, drop_attn_list=[1]))
    assert "#2" in refused(f"{file}#2")


def test_without_a_model_only_plans_that_need_none_are_read(tmp_path: Path) -> None:
    assert plan(as_file(tmp_path / "order.json", {"1": [["mha", 40]]}), None) == ((40,), ())
    assert plan(as_file(tmp_path / "config.json", config_of(50, drop_attn_list=[40])), None) == ((40,), ())
    assert "for a model" in refused(as_file(tmp_path / "r.json", [0, 1]), None)
    assert "for a model" in refused(as_file(tmp_path / "m.yaml", "slices: []\nmerge_method: passthrough"), None)
    sizes = config_of(4, drop_attn_list=[1], layer_inter_size=[256] * 4)
    assert "for a model" in refused(as_file(tmp_path / "config.json", sizes), None)


NO_PLANS: dict[str, str] = {
    "nothing": "",
    "a text": "hello",
    "a number": "3",
    "an empty object": "{}",
    "a model without layers": '{"model_type": "llama"}',
    "numbers of two kinds": '{"1": [], "2": 3}',
    "numbers of text": '{"1": "mha"}',
    "keys of other digits": '{"\u0661": 1}',
    "a long key": '{"1111111": 1}',
    "our format in YAML": "format: pyruntime-drop-plan\nversion: 1\n",
    "a list in YAML": "- 1\n- 2\n",
    "bytes of zero": "\0\0\0\0",
}


@pytest.mark.parametrize("case", NO_PLANS)
def test_what_is_no_plan_is_refused(tmp_path: Path, case: str) -> None:
    refused(as_file(tmp_path / "plan", NO_PLANS[case]))


def test_folders_and_links_without_a_configuration_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere", tmp_path / "nowhere" / "config.json"):
        with pytest.raises(PyruntimeError):
            load_drop_plan(path, MODEL)
