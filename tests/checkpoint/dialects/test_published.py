"""Checkpoints as LLM-Drop published them, and their traps: lists in any order or null, false names, full weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pyruntime.checkpoint import read_model
from pyruntime.errors import CheckpointError
from pyruntime.passes import drop, make_drop_plan
from pyruntime.spec import DropPlan, ModelSpec
from tests.checkpoint.craft import watched_reads, write_shards
from tests.checkpoint.dialects.tiny import attention, check_parity, config_of, hf_name, mlp, spec_of, write
from tests.specs import random_weights

# the 40 ids that stand in the configurations of two models of other names
OF_70B = [22, 30, 32, 36, 43, *range(45, 80)]
# layers, drop_attn_list, drop_mlp_list
PUBLISHED: dict[str, tuple[int, list[int] | None, list[int] | None]] = {
    "Mistral-7B-v0.1-Drop4Attn": (32, [25, 26, 24, 22], None),
    "Mistral-7B-v0.1-Drop8MLP": (32, None, [26, 27, 25, 24, 23, 22, 29, 28]),
    "Mistral-7B-v0.1-Drop4Block": (32, [26, 25, 24, 27], [26, 25, 24, 27]),
    "Llama-2-13b-Drop4Attn": (40, [33, 32, 35, 30], []),
    "Llama-2-13b-Drop4MLP": (40, [], [31, 33, 32, 34]),
    "Llama-2-13b-Drop8Block": (40, [33, 32, 31, 34, 30, 35, 29, 28], [33, 32, 31, 34, 30, 35, 29, 28]),
}


def published(name: str) -> dict[str, Any]:
    """config.json of a published checkpoint, its widths scaled down."""
    layers, attn_list, mlp_list = PUBLISHED[name]
    kind = "mistral" if name.startswith("Mistral") else "llama"
    keys: dict[str, Any] = {
        "_name_or_path": None,
        "architectures": [f"{kind.title()}ForCausalLM"],
        "auto_map": {
            "AutoConfig": f"configuration_dropped_{kind}.{kind.title()}Config",
            "AutoModelForCausalLM": f"modeling_dropped_{kind}.{kind.title()}ForCausalLM",
        },
        "model_type": kind,
        "drop_attn_list": attn_list,
        "drop_mlp_list": mlp_list,
        "attention_dropout": 0.0,
        "intermediate_size": 24,
    }
    if kind == "mistral":
        return config_of(layers, **keys, sliding_window=4096)
    return config_of(layers, **keys, num_key_value_heads=8, pretraining_tp=1, rope_scaling=None)


def layers_of(name: str, attn_list: list[int], mlp_list: list[int]) -> ModelSpec:
    """The layers without those in the lists."""
    whole = attention(4, window=4096) if name.startswith("Mistral") else attention(8)
    return spec_of(
        *((None if i in attn_list else whole, None if i in mlp_list else mlp(24)) for i in range(PUBLISHED[name][0]))
    )


def write_full(folder: Path, name: str, config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Full weights in three shards, and beside them the index of files that were never published."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    full = {hf_name(key): value for key, value in random_weights(layers_of(name, [], []), torch.float32).items()}
    names = sorted(full)
    shards = {f"model-0000{i + 1}-of-00003.safetensors": {each: full[each] for each in names[i::3]} for i in range(3)}
    write_shards(folder, shards)
    stale = {"metadata": {}, "weight_map": dict.fromkeys(names, "pytorch_model-00001-of-00002.bin")}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(stale))
    return full


@pytest.mark.parametrize("name", PUBLISHED)
def test_full_weights_beside_a_list_are_never_read(tmp_path: Path, name: str) -> None:
    _, attn_list, mlp_list = PUBLISHED[name]
    folder = tmp_path / name
    full = write_full(folder, name, published(name))
    spec = layers_of(name, attn_list or [], mlp_list or [])
    starts = [f"model.layers.{i}.{part}." for i in attn_list or [] for part in ("self_attn", "input_layernorm")]
    starts += [f"model.layers.{i}.{part}." for i in mlp_list or [] for part in ("mlp", "post_attention_layernorm")]
    gone = {each for each in full if each.startswith(tuple(starts))}
    model = read_model(folder)
    assert model.spec.layers == spec.layers
    assert model.unread_bytes == sum(full[each].nbytes for each in gone)
    assert not any("looks wrong" in note for note in model.notes)
    with watched_reads() as reads:
        values = {hf_name(weight): lazy.read() for weight, lazy in model.weights.items()}
    assert sum(end - begin for begin, end in reads) == sum(full[each].nbytes for each in full if each not in gone)
    assert values.keys() == full.keys() - gone
    assert all(torch.equal(values[each], full[each]) for each in values)


@pytest.mark.parametrize("name", ["Mistral-7B-v0.1-Drop4Block", "Llama-2-13b-Drop4Attn"])
def test_logits_of_the_kept_weights_alone(tmp_path: Path, name: str) -> None:
    spec = layers_of(name, PUBLISHED[name][1] or [], PUBLISHED[name][2] or [])
    assert check_parity(write(tmp_path / name, published(name), spec), spec, [3, 1, 4, 1, 5]).unread_bytes == 0


def test_a_list_that_was_loaded_and_saved_again_holds_bools(tmp_path: Path) -> None:
    name = "Llama-2-13b-Drop4MLP"
    bools = {
        "drop_attn_list": [False] * 40,
        "drop_mlp_list": [index in (31, 32, 33, 34) for index in range(40)],
    }
    spec = layers_of(name, [], [31, 32, 33, 34])
    model = read_model(write(tmp_path / name, {**published(name), **bools}, spec))
    assert model.spec.layers == spec.layers
    assert model.declared == ("drop_mlp_list: MLP 31, 32, 33, 34",)
    assert not any("looks wrong" in note for note in model.notes)


LIES: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "another number": ("Llama-2-13b-Drop8Attn", {}, ("8 attentions", "4 of attention and 0 of MLP")),
    "another kind": ("Llama-2-13b-Drop4MLP", {}, ("4 MLPs", "4 of attention and 0 of MLP")),
    "half a block": ("Llama-2-13b-drop4block", {}, ("4 blocks", "4 of attention and 0 of MLP")),
    "blocks that are none": (
        "13b-Drop4Block",
        {"drop_mlp_list": [1, 2, 3, 4]},
        ("4 blocks", "4 of attention and 4 of MLP"),
    ),
    "no list at all": ("13b-Drop4Attn", {"drop_attn_list": None}, ("4 attentions", "0 of attention and 0 of MLP")),
    "more than it says": ("13b-Drop4Attn", {"drop_mlp_list": [1]}, ("4 attentions", "4 of attention and 1 of MLP")),
    "by its own account": (
        "model",
        {"_name_or_path": "s1ghhh/Llama-2-13b-Drop8Attn/"},
        ("Llama-2-13b-Drop8Attn", "8 attentions"),
    ),
    "in the cache of the Hub": (
        "models--s1ghhh--Llama-2-13b-Drop8Attn/snapshots/0123abc",
        {},
        ("name Llama-2-13b-Drop8Attn", "8 attentions"),
    ),
}


@pytest.mark.parametrize("case", LIES)
def test_a_name_that_says_something_else_looks_wrong(tmp_path: Path, case: str) -> None:
    folder, keys, words = LIES[case]
    name = "Llama-2-13b-Drop4Attn"
    write_full(tmp_path / folder, name, {**published(name), **keys})
    (note,) = (note for note in read_model(tmp_path / folder).notes if note.startswith("looks wrong:"))
    assert all(word in note for word in words), note


@pytest.mark.parametrize("folder", ["Llama-2-13b-Drop4Attn", "model", "Drop4Attention-test", "Backdrop", "Drop-4Attn"])
def test_a_name_that_fits_or_says_nothing_looks_right(tmp_path: Path, folder: str) -> None:
    name = "Llama-2-13b-Drop4Attn"
    write_full(tmp_path / folder, name, {**published(name), "_name_or_path": 3})
    assert not any("looks wrong" in note for note in read_model(tmp_path / folder).notes)


@pytest.fixture
def base_70b(tmp_path: Path) -> Path:
    """A base model of 80 layers."""
    return write(tmp_path / "base", config_of(80, intermediate_size=24), spec_of(*[(attention(4), mlp(24))] * 80))


def config_only(tmp_path: Path, name: str) -> Path:
    """A folder with nothing but config.json, as the 70B ones were published."""
    folder = tmp_path / "configs" / name
    folder.mkdir(parents=True)
    config = config_of(80, intermediate_size=24, drop_attn_list=OF_70B, drop_mlp_list=None, _name_or_path=None)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_two_names_over_the_same_list(tmp_path: Path, base_70b: Path) -> None:
    """The published Drop8Attn and Drop32Attn of the 70B hold the same 40 layers: the list counts."""
    base = read_model(base_70b)
    plans = []
    for name, said in (("Llama2-70b-Drop8Attn", "8 attentions"), ("Llama2-70b-Drop32Attn", "32 attentions")):
        plans.append(make_drop_plan(base.spec, drop_plan=config_only(tmp_path, name)))
        assert f"{name}/config.json" in plans[-1].origin
        assert f"looks wrong: the name {name} says {said}" in plans[-1].origin
    assert all((plan.attention, plan.mlp) == (tuple(OF_70B), ()) for plan in plans)
    right = make_drop_plan(base.spec, drop_plan=config_only(tmp_path, "Llama2-70b-Drop40Attn") / "config.json")
    assert "looks wrong" not in right.origin
    pruned = drop(base, right)
    assert len(pruned.spec.attentions()) == 40
    # the last kept attention
    assert pruned.spec.attentions()[-1][0] == 44


def test_a_configuration_without_weights_says_what_to_do_with_it(tmp_path: Path) -> None:
    folder = config_only(tmp_path, "Llama2-70b-Drop8Attn")
    with pytest.raises(CheckpointError) as caught:
        read_model(folder)
    assert caught.value.code == "SHARD_MISSING"
    assert f"--drop-plan {folder}" in str(caught.value)
    # a folder that declares nothing is no plan
    (folder / "config.json").write_text(json.dumps(config_of(80)))
    with pytest.raises(CheckpointError) as caught:
        read_model(folder)
    assert "--drop-plan" not in str(caught.value)


def test_everything_may_be_on_the_lists(tmp_path: Path) -> None:
    spec = spec_of(*[(None, None)] * 3)
    everything = [2, 0, 1]
    model = check_parity(
        write(tmp_path / "m", config_of(3, drop_attn_list=everything, drop_mlp_list=everything), spec), spec
    )
    assert model.spec.attentions() == ()
    assert DropPlan((0, 1, 2), (0, 1, 2)) == DropPlan(model.spec.dropped("attention"), model.spec.dropped("mlp"))
