"""What the source declares as gone, in whatever dialect, stays gone in all that is written from it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from pyruntime.checkpoint import read_model
from pyruntime.checkpoint.folder import ReadOptions
from pyruntime.checkpoint.writer import write_native, write_pruned
from pyruntime.errors import CheckpointError, UsageError
from pyruntime.passes import drop, load_drop_plan
from pyruntime.spec import DropPlan, ModelSpec, drop_sublayers
from tests import naive
from tests.checkpoint.craft import split
from tests.checkpoint.dialects.tiny import LINEAR, TOKENS, attention, config_of, mlp, spec_of, write
from tests.helpers import all_logits, make_plan, relative_error
from tests.specs import as_arrays, random_model, random_weights

NONE, LINEAR_MAP = {"no_op": True}, {"replace_with_linear": True}
PLAN = DropPlan(attention=(3,), mlp=(2,))


def block(num_kv_heads: int, width: int) -> dict[str, Any]:
    return {"attention": {"num_key_value_heads": num_kv_heads}, "ffn": {"intermediate_size": width}}


PLAIN = (attention(4), mlp(256))
BLOCKS = [
    {"attention": LINEAR_MAP, "ffn": {"intermediate_size": 64}},
    {"attention": NONE, "ffn": NONE},
    block(2, 128),
    block(4, 256),
]
# keys of config.json, and the layers that a model of these keys has, written down by hand
SOURCES: dict[str, tuple[dict[str, Any], ModelSpec]] = {
    "nothing": ({}, spec_of(PLAIN, PLAIN, PLAIN, PLAIN)),
    "ids": (
        {"drop_attn_list": [1, 0], "drop_mlp_list": None},
        spec_of((None, mlp(256)), (None, mlp(256)), PLAIN, PLAIN),
    ),
    "bools": (
        {"drop_attn_list": [False, True, False, False], "drop_mlp_list": [True, False, False, False]},
        spec_of((attention(4), None), (None, mlp(256)), PLAIN, PLAIN),
    ),
    "skips and sizes by layer": (
        {"per_layer_config": {"0": {"skip": ["attention"]}, "02": {"num_key_value_heads": 2, "intermediate_size": 64}}},
        spec_of((None, mlp(256)), PLAIN, (attention(2), mlp(64)), PLAIN),
    ),
    "no-ops and linear maps": (
        {"model_type": "nemotron-nas", "num_key_value_heads": None, "intermediate_size": None, "block_configs": BLOCKS},
        spec_of((LINEAR, mlp(64)), (None, None), (attention(2), mlp(128)), PLAIN, family="nemotron-nas"),
    ),
    "no-ops and drops": (
        {"block_configs": [block(4, 256), {**block(4, 256), "ffn": NONE}, *BLOCKS[2:]], "drop_attn_list": [0]},
        spec_of((None, mlp(256)), (attention(4), None), (attention(2), mlp(128)), PLAIN),
    ),
    "lists of sizes": (
        {"layer_inter_size": [0, 256, 64, 256], "num_key_value_heads_per_layer": [4, 4, 0, 2]},
        spec_of((attention(4), None), PLAIN, (None, mlp(64)), (attention(2), mlp(256))),
    ),
}


def source_of(name: str, folder: Path) -> Path:
    """A checkpoint that holds no tensor but those of its sublayers."""
    keys, spec = SOURCES[name]
    return write(folder, config_of(4, **keys), spec)


def expected_logits(spec: ModelSpec, kept: ModelSpec) -> torch.Tensor:
    """Of the naive transformer in float64, from the weights of `kept` that `write` made for `spec`."""
    weights = as_arrays(random_weights(spec, torch.float32))
    return torch.from_numpy(naive.logits(kept, weights, TOKENS))


@pytest.mark.parametrize("dialect", ["hf", "llm-drop"])
@pytest.mark.parametrize("name", SOURCES)
def test_declared_drops_stay_dropped(name: str, dialect: str, tmp_path: Path) -> None:
    source = source_of(name, tmp_path / "source")
    kept = drop_sublayers(SOURCES[name][1], PLAN)
    out = tmp_path / "out"
    write_pruned(source, PLAN, out, dialect=dialect)
    model = read_model(out)
    assert model.spec == drop(read_model(source), PLAN).spec
    assert model.spec.layers == kept.layers
    (found,) = all_logits(make_plan(out), [TOKENS], 64)
    assert relative_error(found, expected_logits(SOURCES[name][1], kept)) < 1e-5
    # nothing that readers could take for another list, and nothing that says something else
    assert model.notes == ()
    config = json.loads((out / "config.json").read_text())
    lists = [config["drop_attn_list"], config["drop_mlp_list"]]
    assert all(type(index) is int for indices in lists for index in indices)
    assert all(indices == sorted(set(indices)) for indices in lists)


@pytest.mark.parametrize("name", SOURCES)
def test_writing_again_with_nothing_more_to_drop_changes_no_byte(name: str, tmp_path: Path) -> None:
    write_pruned(source_of(name, tmp_path / "source"), PLAN, tmp_path / "one")
    write_pruned(tmp_path / "one", DropPlan(), tmp_path / "two")
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_the_lists_and_the_skips_name_what_is_dropped_and_not_what_never_was(tmp_path: Path) -> None:
    write_pruned(source_of("no-ops and drops", tmp_path / "source"), PLAN, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["per_layer_config"] == {
        "0": {"skip": ["attention"]},
        "2": {"skip": ["mlp"]},
        "3": {"skip": ["attention"]},
    }
    assert (config["drop_attn_list"], config["drop_mlp_list"]) == ([0, 3], [2])
    write_pruned(
        source_of("skips and sizes by layer", tmp_path / "sizes"), PLAN, tmp_path / "lists", dialect="llm-drop"
    )
    config = json.loads((tmp_path / "lists" / "config.json").read_text())
    # the width of an MLP that is gone is gone with it
    assert config["per_layer_config"] == {"2": {"num_key_value_heads": 2}}
    assert (config["drop_attn_list"], config["drop_mlp_list"]) == ([0, 3], [2])


def test_layers_have_as_many_digits_as_the_largest_of_them(tmp_path: Path) -> None:
    source = write(tmp_path / "source", config_of(12), spec_of(*[PLAIN] * 12))
    write_pruned(source, DropPlan(attention=(3, 11)), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["per_layer_config"] == {"03": {"skip": ["attention"]}, "11": {"skip": ["attention"]}}


def test_zeros_need_the_tensors_of_what_is_declared_as_dropped(tmp_path: Path) -> None:
    compact = source_of("ids", tmp_path / "compact")
    with pytest.raises(CheckpointError, match=r"dialect zeros keeps all tensors.*from the unpruned") as caught:
        write_pruned(compact, PLAN, tmp_path / "out", dialect="zeros")
    assert caught.value.code == "MISSING_TENSOR"
    # one order, not two that contradict each other
    assert str(caught.value).count(";") == 1 and "model.layers.0.self_attn.q_proj.weight" in str(caught.value)
    # LLM-Drop itself saves the whole model beside its lists
    whole = write(tmp_path / "whole", config_of(4, **SOURCES["ids"][0]), SOURCES["nothing"][1])
    write_pruned(whole, PLAN, tmp_path / "out", dialect="zeros")
    model = read_model(tmp_path / "out")
    assert model.spec.layers == SOURCES["nothing"][1].layers
    kept = drop_sublayers(SOURCES["ids"][1], PLAN)
    (found,) = all_logits(make_plan(tmp_path / "out"), [TOKENS], 64)
    assert relative_error(found, expected_logits(SOURCES["nothing"][1], kept)) < 1e-5


def test_a_compact_copy_of_a_whole_model_holds_only_what_is_kept(tmp_path: Path) -> None:
    """LLM-Drop saves all tensors beside its lists, so that nothing is won on the disk."""
    whole = write(tmp_path / "whole", config_of(4, **SOURCES["bools"][0]), SOURCES["nothing"][1])
    assert read_model(whole).unread_bytes > 0
    write_pruned(whole, DropPlan(), tmp_path / "out", dialect="llm-drop")
    model = read_model(tmp_path / "out")
    assert model.spec == read_model(whole).spec
    assert model.unread_bytes == 0
    size, before = ((folder / "model.safetensors").stat().st_size for folder in (tmp_path / "out", whole))
    assert before - size >= read_model(whole).unread_bytes


def test_code_is_no_longer_named_where_it_is_no_longer_there(tmp_path: Path) -> None:
    keys = {"auto_map": {"AutoConfig": "configuration_dropped_llama.LlamaConfig"}, "drop_attn_list": [1]}
    source = write(tmp_path / "source", config_of(4, **keys), SOURCES["nothing"][1])
    (source / "configuration_dropped_llama.py").write_text("raise SystemExit")
    for dialect in ("hf", "llm-drop", "zeros"):
        write_pruned(source, PLAN, tmp_path / dialect, dialect=dialect)
        assert "auto_map" not in json.loads((tmp_path / dialect / "config.json").read_text())
        assert not list((tmp_path / dialect).glob("*.py"))


def test_a_plan_of_a_source_with_drops_names_them_all(tmp_path: Path) -> None:
    whole = write(tmp_path / "whole", config_of(4, **SOURCES["bools"][0]), SOURCES["nothing"][1])
    write_pruned(whole, PLAN, tmp_path / "out", config_only=True)
    plan = load_drop_plan(tmp_path / "out")
    assert (plan.attention, plan.mlp) == ((1, 3), (0, 2))


def test_shards_and_what_the_user_says_of_the_source_are_heeded(tmp_path: Path) -> None:
    source = source_of("nothing", tmp_path / "source")
    expected = read_model(source)
    split(source, keep_single=True)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "training_note": "x"}))
    with pytest.raises((CheckpointError, UsageError)):
        write_pruned(source, PLAN, tmp_path / "out")
    read = ReadOptions(prefer="index", ignore_config_keys=["training_note"])
    write_pruned(source, PLAN, tmp_path / "out", read=read)
    model = read_model(tmp_path / "out", read)
    assert all(torch.equal(weight.read(), expected.weights[name].read()) for name, weight in model.weights.items())
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 1


def test_our_own_format_is_named_where_it_cannot_do_without_weights(tmp_path: Path) -> None:
    write_native(random_model(SOURCES["nothing"][1]), tmp_path / "native", dtype="float32")
    with pytest.raises(UsageError, match=r"native is in pyruntime's own format, which cannot do without") as caught:
        write_pruned(tmp_path / "native", PLAN, tmp_path / "out", config_only=True)
    assert caught.value.code == "DIALECT"
    assert os.listdir(tmp_path) == ["native"]


@pytest.mark.parametrize(
    "plan, options, code, words",
    [
        (PLAN, {"dialect": "gguf"}, "DIALECT", "expected one of hf, llm-drop, zeros"),
        (PLAN, {"dialect": "zeros", "config_only": True}, "DIALECT", "'zeros', which cannot do without weights"),
        (DropPlan(attention=(4,)), {}, "DROP", "the layers are 0 to 3"),
        (DropPlan(), {"config_only": True}, "DROP_PLAN", "drops nothing"),
    ],
)
def test_what_cannot_be_written_is_refused(
    plan: DropPlan, options: dict[str, Any], code: str, words: str, tmp_path: Path
) -> None:
    source = source_of("nothing", tmp_path / "source")
    with pytest.raises(UsageError, match=words) as caught:
        write_pruned(source, plan, tmp_path / "out", **options)
    assert caught.value.code == code
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]
