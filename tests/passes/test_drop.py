"""The drop pass: how layers are named, what the report counts, and plans as files."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyruntime.checkpoint import Model, read_model
from pyruntime.errors import CheckpointError, PyruntimeError, RunError, UsageError
from pyruntime.passes import drop, kv_values_per_token, load_drop_plan, make_drop_plan, parse_layers, save_drop_plan
from pyruntime.spec import DropPlan, weight_shapes

Make = Callable[..., tuple[Path, Any]]
EVERY = (0, 1, 2, 3)


@pytest.fixture
def model(make_llama: Make) -> Model:
    return read_model(make_llama()[0])


def refused(call: Callable[[], Any], code: str = "DROP") -> str:
    with pytest.raises(UsageError) as caught:
        call()
    assert (caught.value.code, caught.value.exit_code) == (code, 2)
    return str(caught.value)


TEXTS: dict[str, tuple[int, ...]] = {
    "5": (5,),
    "25,26": (25, 26),
    " 1 , 2 ": (1, 2),
    "26,25": (26, 25),
    "20-23": (20, 21, 22, 23),
    "7-7": (7,),
    "20-30+2": (20, 22, 24, 26, 28, 30),
    "20-25+2": (20, 22, 24),
    "1-3+9": (1,),
    "0-1,5,8-9": (0, 1, 5, 8, 9),
    "007": (7,),
    "last:1": (9,),
    "last:3": (6, 8, 9),
    " last:5 ": (0, 4, 6, 8, 9),
    "last:1:keep-last": (8,),
    "last:4:keep-last": (0, 4, 6, 8),
}


@pytest.mark.parametrize("text", TEXTS)
def test_layers_are_named_by_text(text: str) -> None:
    """The rules "last" count the layers that are still kept."""
    assert parse_layers(text, (0, 4, 6, 8, 9)) == TEXTS[text]


BAD_TEXTS = [
    "",
    " ",
    ",",
    "1,",
    ",1",
    "1,,2",
    "a",
    "-1",
    "1-",
    "1-2-3",
    "3-1",
    "1-5+0",
    "1+2",
    "1.0",
    "0x1",
    "1 2",
    "1;2",
]
BAD_TEXTS += [
    "last",
    "last:",
    "last:0",
    "last:6",
    "last:5:keep-last",
    "last:-1",
    "last:1:keep",
    "last:2,3",
    "LAST:1",
    "٣",
]
BAD_TEXTS += ["1" * 7, "1-9999999", "first:2", "all", "last:3:keep-last:x"]


@pytest.mark.parametrize("text", BAD_TEXTS)
def test_text_that_names_no_layers_is_refused(text: str) -> None:
    refused(lambda: parse_layers(text, (0, 4, 6, 8, 9)))


@given(st.text("0123456789,-+ last:keep", max_size=20))
@settings(max_examples=200, deadline=None)
def test_any_text_names_layers_or_is_refused(text: str) -> None:
    try:
        layers = parse_layers(text, range(10))
    except UsageError:
        refused(lambda: parse_layers(text, range(10)))
    else:
        assert layers and all(isinstance(layer, int) and layer >= 0 for layer in layers)


def hf_sums(hf_model: Any, attention: tuple[int, ...], mlp: tuple[int, ...]) -> int:
    """Weights of these sublayers with their norms, counted in the transformers model."""
    layers = hf_model.model.layers
    gone = [part for i in attention for part in (layers[i].self_attn, layers[i].input_layernorm)]
    gone += [part for i in mlp for part in (layers[i].mlp, layers[i].post_attention_layernorm)]
    return sum(parameter.numel() for part in gone for parameter in part.parameters())


@pytest.mark.parametrize(
    "variant", [{}, {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 1, "head_dim": 24}]
)
@pytest.mark.parametrize("attention, mlp", [((), ()), ((1,), ()), ((), (0, 3)), ((0, 2), (2,)), (EVERY, EVERY)])
def test_the_report_equals_sums_over_the_transformers_model(
    make_llama: Make, variant: dict[str, Any], attention: tuple[int, ...], mlp: tuple[int, ...]
) -> None:
    folder, hf_model = make_llama(**variant)
    dense = read_model(folder)
    pruned = drop(dense, DropPlan(attention, mlp, "me"))
    (report,) = pruned.reports
    assert report.num_weights == hf_sums(hf_model, attention, mlp)
    assert report.weight_bytes == 4 * report.num_weights
    config = hf_model.config
    assert report.kv_values_per_token == len(attention) * 2 * config.num_key_value_heads * config.head_dim
    assert kv_values_per_token(dense.spec) == 4 * 2 * config.num_key_value_heads * config.head_dim
    assert report.removed == tuple([f"attention {i}" for i in attention] + [f"mlp {i}" for i in mlp])
    assert report.notes == ()
    assert "me" in report.name
    # and what is left is the rest
    assert pruned.weight_bytes == 4 * (sum(p.numel() for p in hf_model.parameters()) - report.num_weights)
    assert pruned.weights.keys() == weight_shapes(pruned.spec).keys()
    assert pruned.dense_spec == dense.spec
    assert dense.reports == () and dense.spec.dropped("attention") == ()


def test_a_second_drop_removes_only_what_is_left(model: Model) -> None:
    first = drop(model, DropPlan(attention=(1,), mlp=(2,)))
    second = drop(first, DropPlan(attention=(1, 3), mlp=(2,)))
    assert second.spec == drop(model, DropPlan(attention=(1, 3), mlp=(2,))).spec
    assert second.reports[0] == first.reports[0]
    assert second.reports[1].removed == ("attention 3",)
    assert second.reports[1].notes == ("attention 1 was gone already", "MLP 2 was gone already")
    whole = drop(model, DropPlan(attention=(1, 3), mlp=(2,))).reports[0]
    assert sum(report.num_weights for report in second.reports) == whole.num_weights
    assert sum(report.kv_values_per_token for report in second.reports) == whole.kv_values_per_token


def test_the_same_drop_twice_changes_nothing(model: Model) -> None:
    plan = DropPlan(attention=(0, 1), mlp=(3,))
    once = drop(model, plan)
    twice = drop(once, plan)
    assert twice.spec == once.spec
    assert twice.weights == once.weights
    report = twice.reports[-1]
    assert (report.removed, report.num_weights, report.weight_bytes, report.kv_values_per_token) == ((), 0, 0, 0)


def test_everything_may_be_dropped(model: Model) -> None:
    nothing = drop(model, DropPlan(EVERY, EVERY))
    assert nothing.spec.attentions() == ()
    assert kv_values_per_token(nothing.spec) == 0
    assert nothing.weights.keys() == {"embedding.weight", "final_norm.weight", "head.weight"}
    assert nothing.bytes_read == 0


@pytest.mark.parametrize("index", [4, 100, 10**9])
def test_a_layer_that_does_not_exist_is_refused(model: Model, index: int) -> None:
    assert "0 to 3" in refused(lambda: drop(model, DropPlan(attention=(index,))))
    for name in ("drop_attn", "drop_mlp", "drop_block"):
        assert "0 to 3" in refused(lambda name=name: make_drop_plan(model.spec, **{name: [index]}))
    assert "0 to 3" in refused(lambda: make_drop_plan(model.spec, drop_attn="2-4"))


@pytest.mark.parametrize("layers", [[True], [-1], [1.0], ["1"], [None]])
@pytest.mark.parametrize("name", ["drop_attn", "drop_mlp", "drop_block"])
def test_what_is_no_layer_is_refused(model: Model, name: str, layers: Any) -> None:
    refused(lambda: make_drop_plan(model.spec, **{name: layers}))


def test_all_ways_to_name_layers_combine(model: Model, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    save_drop_plan(DropPlan(attention=(0,), origin="by score"), file)
    for given_plan in (file, str(file), DropPlan(attention=(0,), origin="by score")):
        plan = make_drop_plan(model.spec, drop_attn="1", drop_mlp=[3, 2], drop_block=[1], drop_plan=given_plan)
        assert (plan.attention, plan.mlp) == ((0, 1), (1, 2, 3))
        assert "by score" in plan.origin
    assert not make_drop_plan(model.spec)
    assert make_drop_plan(model.spec, drop_plan=file) == load_drop_plan(file)


def test_rules_count_what_the_model_still_has(model: Model) -> None:
    pruned = drop(model, DropPlan(attention=(3,), mlp=(2,)))
    assert make_drop_plan(pruned.spec, drop_attn="last:2").attention == (1, 2)
    assert make_drop_plan(pruned.spec, drop_mlp="last:2").mlp == (1, 3)
    assert make_drop_plan(pruned.spec, drop_attn="last:1:keep-last").attention == (1,)
    # a block is kept as long as one of its halves is
    assert make_drop_plan(pruned.spec, drop_block="last:1").attention == (3,)
    gone = drop(pruned, DropPlan(mlp=(3,)))
    assert make_drop_plan(gone.spec, drop_block="last:1").attention == (2,)
    refused(lambda: make_drop_plan(drop(model, DropPlan(attention=EVERY)).spec, drop_attn="last:1"))


def test_a_plan_survives_its_file(tmp_path: Path) -> None:
    plan = DropPlan(attention=(3, 1), mlp=(2,), origin="angular distance, 64 samples, größer")
    save_drop_plan(plan, tmp_path / "plan.json")
    assert load_drop_plan(tmp_path / "plan.json") == plan
    assert json.loads((tmp_path / "plan.json").read_text())["drop_attn_list"] == [1, 3]
    save_drop_plan(DropPlan(), tmp_path / "plan.json")
    assert load_drop_plan(tmp_path / "plan.json") == DropPlan()
    assert os.listdir(tmp_path) == ["plan.json"]


BAD_FILES: dict[str, str] = {
    "empty": "",
    "no JSON": "1,2,3",
    "a list": "[1, 2]",
    "a configuration": '{"drop_attn_list": [1]}',
    "NaN": '{"format": "pyruntime-drop-plan", "version": NaN}',
    "a key twice": '{"format": "pyruntime-drop-plan", "version": 1, "drop_mlp_list": [1], "drop_mlp_list": [2]}',
    "a bool": '{"format": "pyruntime-drop-plan", "version": 1, "drop_mlp_list": [true]}',
    "another version": '{"format": "pyruntime-drop-plan", "version": 2, "drop_mlp_list": [1]}',
    "above 1 MiB": "{}".ljust((1 << 20) + 1),
    "deep": "[" * 100_000,
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_file_that_is_no_plan_is_refused(tmp_path: Path, case: str) -> None:
    file = tmp_path / "plan.json"
    file.write_text(BAD_FILES[case])
    assert "plan.json" in refused(lambda: load_drop_plan(file), "DROP_PLAN")


def test_a_missing_plan_is_named(tmp_path: Path) -> None:
    assert "plan.json" in refused(lambda: load_drop_plan(tmp_path / "plan.json"), "DROP_PLAN")
    with pytest.raises(PyruntimeError):
        load_drop_plan(tmp_path)


def test_a_write_that_fails_leaves_the_old_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "plan.json"
    old = DropPlan(attention=(1,))
    save_drop_plan(old, file)
    with pytest.raises(RunError) as caught:
        save_drop_plan(old, tmp_path / "nowhere" / "plan.json")
    assert (caught.value.code, caught.value.exit_code) == ("IO", 5)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    # the disk is full when the data must reach it
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match="No space left"):
        save_drop_plan(DropPlan(attention=(2,)), file)
    assert load_drop_plan(file) == old
    assert os.listdir(tmp_path) == ["plan.json"]


def test_a_checkpoint_error_is_no_usage_error() -> None:
    """The wrapping in load_drop_plan would be pointless if one were the other."""
    assert not issubclass(CheckpointError, UsageError)


def test_a_drop_plan_may_be_its_json_and_nothing_else(make_llama: Callable[..., tuple[Path, Any]]) -> None:
    spec = read_model(make_llama()[0]).spec
    wanted = DropPlan((0, 2), (1,))
    assert make_drop_plan(spec, drop_plan=wanted.to_json()) == wanted
    for wrong in ([0, 1], 3, {"drop_attn_list": [0]}):
        with pytest.raises(UsageError) as error:
            make_drop_plan(spec, drop_plan=wrong)  # type: ignore[arg-type]
        assert error.value.code == "DROP_PLAN"


@pytest.mark.parametrize("wrong", [5, 2.5, {"a": 1}, [1.0], ["1"], [True]])
def test_layers_of_another_kind_are_refused(make_llama: Callable[..., tuple[Path, Any]], wrong: Any) -> None:
    spec = read_model(make_llama()[0]).spec
    for name in ("drop_attn", "drop_mlp", "drop_block"):
        with pytest.raises(UsageError):
            make_drop_plan(spec, **{name: wrong})


def test_rules_count_what_a_plan_leaves(model: Model) -> None:
    plan = make_drop_plan(model.spec, drop_attn="last:1", drop_plan=DropPlan((2, 3)))
    assert plan.attention == (1, 2, 3)


def test_bytes_are_no_list_of_layers(model: Model) -> None:
    refused(lambda: make_drop_plan(model.spec, drop_attn=b"\x01\x02"))  # type: ignore[arg-type]
