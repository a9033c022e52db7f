"""What tensors say beyond config.json: FLAP's biases and sizes, SliceGPT's widths, FlashNorm's absent gains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pyruntime.checkpoint import read_model
from pyruntime.errors import CheckpointError, UsageError
from pyruntime.spec import MLP, Attention, DropPlan
from tests import plain
from tests.checkpoint.plain_models import (
    FFN,
    HEAD_DIM,
    LLAMA,
    VOCAB,
    WIDTH,
    Shapes,
    llama_shapes,
    random_tensors,
    write,
)
from tests.helpers import TARGETS, all_logits, make_plan, relative_error

LIMIT = 1e-5
PROMPT = [(7 * i * i + 3 * i) % 61 for i in range(23)]
RAGGED = [PROMPT[:1], PROMPT[::-1][:17], PROMPT]
# how many heads and how wide an MLP FLAP leaves in each layer
KEPT_HEADS, KEPT_FFN = (4, 3, 1, 2), (56, 30, 7, 41)
NORMS = ("input_layernorm", "post_attention_layernorm")
targets = pytest.mark.parametrize("target", TARGETS)
Tensors = dict[str, torch.Tensor]


def check(folder: Path, config: dict[str, Any], tensors: Tensors, target: str, drops: DropPlan = DropPlan()) -> None:
    """Full, cached and chunked, beside float64 mathematics."""
    plan = make_plan(folder, drops, target=target)
    for chunk in (64, 1, 7):
        for found, tokens in zip(all_logits(plan, RAGGED, chunk), RAGGED, strict=True):
            assert relative_error(found, plain.logits(config, tensors, tokens, drops)) < LIMIT


def flap_shapes() -> Shapes:
    """Pruned heads and widths, and biases where they were."""
    found = llama_shapes()
    for index, (heads, ffn) in enumerate(zip(KEPT_HEADS, KEPT_FFN, strict=True)):
        prefix = f"model.layers.{index}."
        size = heads * HEAD_DIM
        found |= {f"{prefix}self_attn.{role}_proj.weight": (size, WIDTH) for role in "qkv"}
        found |= {f"{prefix}mlp.{role}_proj.weight": (ffn, WIDTH) for role in ("gate", "up")}
        found |= {f"{prefix}self_attn.o_proj.weight": (WIDTH, size), f"{prefix}mlp.down_proj.weight": (WIDTH, ffn)}
        found |= {f"{prefix}self_attn.o_proj.bias": (WIDTH,), f"{prefix}mlp.down_proj.bias": (WIDTH,)}
    return found


LISTS = {"layer_head_num": list(KEPT_HEADS), "layer_inter_size": list(KEPT_FFN), "head_dim": HEAD_DIM}


@targets
@pytest.mark.parametrize("drops", [DropPlan(), DropPlan((1,), (2,)), DropPlan((3,), (0, 3))])
@pytest.mark.parametrize("lists", [{}, LISTS], ids=["by shapes", "by lists"])
def test_a_model_of_flap_runs(tmp_path: Path, lists: dict[str, Any], drops: DropPlan, target: str) -> None:
    tensors = random_tensors(flap_shapes())
    check(write(tmp_path, {**LLAMA, **lists}, tensors), LLAMA, tensors, target, drops)


def test_flap_turns_on_the_biases_that_are_there_and_says_so(tmp_path: Path) -> None:
    tensors = random_tensors(flap_shapes())
    del tensors["model.layers.1.mlp.down_proj.bias"]
    model = read_model(write(tmp_path, LLAMA, tensors))
    mlps = [layer.mlp for layer in model.spec.layers if isinstance(layer.mlp, MLP)]
    assert [mlp.down.bias for mlp in mlps] == [True, False, True, True]
    assert [attention.num_heads for _, attention in model.spec.attentions()] == list(KEPT_HEADS)
    assert all(attention.o is not None and attention.o.bias for _, attention in model.spec.attentions())
    assert not any(attention.q is None or attention.q.bias for _, attention in model.spec.attentions())
    assert any("FLAP" in note and "4 attentions and 3 MLPs" in note and "heads" in note for note in model.notes)


def test_sizes_are_those_of_the_tensors_only_beside_biases_of_flap(tmp_path: Path) -> None:
    tensors = {name: each for name, each in random_tensors(flap_shapes()).items() if not name.endswith(".bias")}
    with pytest.raises(CheckpointError, match=r"config\.json implies") as caught:
        read_model(write(tmp_path, LLAMA, tensors))
    assert caught.value.code == "SHAPE"


@pytest.mark.parametrize(
    "change, code",
    [
        # three and a half heads
        ({"model.layers.2.self_attn.q_proj.weight": (28, WIDTH)}, "SHAPE"),
        # four query heads do not share three
        ({"model.layers.0.self_attn.k_proj.weight": (24, WIDTH)}, "SHAPE"),
        ({"model.layers.2.self_attn.o_proj.weight": (WIDTH, 40)}, "SHAPE"),
        ({"model.layers.2.mlp.gate_proj.weight": (9, WIDTH)}, "SHAPE"),
        ({"model.layers.2.mlp.gate_proj.bias": (7,)}, "UNEXPECTED_TENSOR"),
        ({"model.layers.2.mlp.down_proj.bias": (7,)}, "SHAPE"),
        ({"model.layers.2.mlp.up_proj.weight": (0, WIDTH)}, "SHAPE"),
        ({"model.layers.2.mlp.up_proj.weight": (7,)}, "SHAPE"),
    ],
)
def test_tensors_of_flap_that_do_not_fit_are_refused(tmp_path: Path, change: Shapes, code: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        read_model(write(tmp_path, LLAMA, random_tensors(flap_shapes() | change)))
    assert caught.value.code == code


def test_lists_of_sizes_are_not_overruled_by_tensors(tmp_path: Path) -> None:
    wrong = {**LISTS, "layer_inter_size": [56, 30, 8, 41]}
    with pytest.raises(CheckpointError, match=r"config\.json implies") as caught:
        read_model(write(tmp_path, {**LLAMA, **wrong}, random_tensors(flap_shapes())))
    assert caught.value.code == "SHAPE"


# widths of the stream: before each attention, behind it, and behind the MLP; the head has the whole one
STREAM = ((20, 24), (24, 24), (18, 29), (29, WIDTH))
SLICED = {**LLAMA, "slice_gpt": True}


def sliced_shapes(stream: tuple[tuple[int, int], ...] = STREAM, dummies: bool = False) -> Shapes:
    """The tensors of TransformerCompression's sliced Llama; later releases store one value for each norm."""
    found: Shapes = {"model.embed_tokens.weight": (VOCAB, 22), "lm_head.weight": (VOCAB, stream[-1][1])}
    before = 22
    for index, (middle, behind) in enumerate(stream):
        prefix = f"model.layers.{index}."
        found |= {f"{prefix}self_attn.{role}_proj.weight": (WIDTH, before) for role in "qkv"}
        found |= {f"{prefix}mlp.{role}_proj.weight": (FFN, middle) for role in ("gate", "up")}
        found |= {f"{prefix}self_attn.o_proj.weight": (middle, WIDTH), f"{prefix}mlp.down_proj.weight": (behind, FFN)}
        found |= {f"{prefix}attn_shortcut_Q": (before, middle), f"{prefix}mlp_shortcut_Q": (middle, behind)}
        before = behind
    names = [f"model.layers.{index}.{norm}.weight" for index in range(4) for norm in NORMS] + ["model.norm.weight"]
    return found | (dict.fromkeys(names, (1,)) if dummies else {})


@targets
@pytest.mark.parametrize("dummies", [False, True])
@pytest.mark.parametrize("stream", [STREAM, ((24, 24), (24, 24), (24, 24), (24, 24))], ids=["by layer", "sliced head"])
def test_a_model_of_slice_gpt_runs(tmp_path: Path, stream: Any, dummies: bool, target: str) -> None:
    tensors = random_tensors(sliced_shapes(stream, dummies))
    check(write(tmp_path, LLAMA, tensors), SLICED, tensors, target)
    model = read_model(tmp_path)
    assert model.spec.embedding.size == 22
    assert [layer.mlp and layer.mlp.out_size for layer in model.spec.layers] == [behind for _, behind in stream]
    assert any("SliceGPT" in note for note in model.notes)


def test_a_sliced_model_says_that_its_epsilon_is_another(tmp_path: Path) -> None:
    config = {**LLAMA, "rms_norm_eps": 1e-6}
    model = read_model(write(tmp_path, config, random_tensors(sliced_shapes())))
    assert any("1e-05, whatever rms_norm_eps says" in note for note in model.notes)


@pytest.mark.parametrize(
    "change, keys, code",
    [
        ({"model.layers.1.attn_shortcut_Q": None}, {}, "MISSING_TENSOR"),
        ({"model.layers.1.attn_shortcut_Q": (24,)}, {}, "SHAPE"),
        ({"model.layers.1.attn_shortcut_Q": (23, 24)}, {}, "SHAPE"),
        ({"model.layers.1.self_attn.o_proj.weight": (23, WIDTH)}, {}, "SHAPE"),
        ({"model.embed_tokens.weight": (VOCAB, WIDTH)}, {}, "SHAPE"),
        ({"model.layers.1.mlp_shortcut_Q": (24, 0)}, {}, "SHAPE"),
        # a norm that nobody folded
        ({"model.layers.1.input_layernorm.weight": (24,)}, {}, "UNEXPECTED_TENSOR"),
        ({"model.norm.weight": (WIDTH,)}, {}, "UNEXPECTED_TENSOR"),
        ({}, {"model_type": "mistral"}, "UNEXPECTED_TENSOR"),
        ({}, {"drop_attn_list": [1]}, "DROP"),
    ],
)
def test_what_is_no_sliced_llama_is_refused(
    tmp_path: Path, change: dict[str, Any], keys: dict[str, Any], code: str
) -> None:
    shapes = {name: shape for name, shape in (sliced_shapes() | change).items() if shape is not None}
    with pytest.raises((CheckpointError, UsageError)) as caught:
        read_model(write(tmp_path, {**LLAMA, **keys}, random_tensors(shapes)))
    assert caught.value.code == code


def test_a_sliced_sublayer_cannot_be_dropped(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="matrix on its residual"):
        make_plan(write(tmp_path, LLAMA, random_tensors(sliced_shapes())), DropPlan((1,)))


def flash_norm(absent: tuple[str, ...]) -> Tensors:
    """A Llama without the norms whose names have a part in `absent`."""
    return {
        name: tensor
        for name, tensor in random_tensors(llama_shapes()).items()
        if not any(part in name for part in absent)
    }


ALL = (*NORMS, "model.norm")
FLAGS = [{}, {"flashnorm": True, "flashnorm_mode": "strict"}, {"flash_norm": True}, {"rms_norm_has_weight": False}]


@targets
@pytest.mark.parametrize("absent", [ALL, NORMS], ids=["all", "all but the final one"])
@pytest.mark.parametrize("flags", FLAGS, ids=str)
def test_norms_without_weights_run(tmp_path: Path, absent: tuple[str, ...], flags: dict[str, Any], target: str) -> None:
    tensors = flash_norm(absent)
    folder = write(tmp_path, {**LLAMA, **flags}, tensors)
    check(folder, LLAMA, tensors, target, DropPlan((2,), (1,)))
    model = read_model(folder)
    assert any("FlashNorm" in note for note in model.notes)
    assert all(
        each.pre is not None and not each.pre.weight for layer in model.spec.layers for _, each in layer.sublayers()
    )


@pytest.mark.parametrize("flags", [{}, {"flashnorm": True, "flashnorm_mode": "compat"}, {"flashnorm_folded": False}])
def test_norms_of_ones_are_ordinary_ones(tmp_path: Path, flags: dict[str, Any]) -> None:
    model = read_model(write(tmp_path, {**LLAMA, **flags}, flash_norm(())))
    assert not model.notes
    assert all(
        isinstance(each, Attention | MLP) and each.pre and each.pre.weight
        for layer in model.spec.layers
        for _, each in layer.sublayers()
    )


@pytest.mark.parametrize(
    "absent",
    [
        # one of four, one role of two, a final norm alone: nothing says that they were folded
        ("layers.2.input_layernorm",),
        ("input_layernorm",),
        ("post_attention_layernorm",),
        ("model.norm",),
        ("layers.0.input_layernorm", "post_attention_layernorm", "model.norm"),
    ],
)
def test_some_absent_norms_are_missing_tensors(tmp_path: Path, absent: tuple[str, ...]) -> None:
    with pytest.raises(CheckpointError) as caught:
        read_model(write(tmp_path, LLAMA, flash_norm(absent)))
    assert caught.value.code == "MISSING_TENSOR"


def test_with_a_flag_one_role_may_be_folded_alone_but_never_a_part_of_it(tmp_path: Path) -> None:
    flagged = {**LLAMA, "flashnorm": True}
    model = read_model(write(tmp_path / "role", flagged, flash_norm(("input_layernorm",))))
    norms = [(kind, each.pre and each.pre.weight) for layer in model.spec.layers for kind, each in layer.sublayers()]
    assert set(norms) == {("attention", False), ("mlp", True)}
    with pytest.raises(CheckpointError) as caught:
        read_model(write(tmp_path / "part", flagged, flash_norm(("layers.2.input_layernorm",))))
    assert caught.value.code == "MISSING_TENSOR"


def test_norms_of_dropped_sublayers_say_nothing(tmp_path: Path) -> None:
    """A compact checkpoint lacks them whatever was folded."""
    kept = flash_norm(("layers.2.self_attn", "layers.2.input_layernorm"))
    model = read_model(write(tmp_path, {**LLAMA, "drop_attn_list": [2]}, kept))
    assert all(attention.pre is not None and attention.pre.weight for _, attention in model.spec.attentions())


@pytest.mark.parametrize(
    "absent, flags",
    [
        (ALL, {"rms_norm_has_weight": True}),
        (ALL, {"flashnorm_mode": "compat"}),
        (ALL, {"flashnorm": False}),
        ((), {"rms_norm_has_weight": False}),
        ((), {"flashnorm_mode": "strict"}),
        (ALL, {"flashnorm_mode": "strict", "rms_norm_has_weight": True}),
        ((), {"flashnorm": True, "flash_norm": False}),
        ((), {"flashnorm": 1}),
        ((), {"flashnorm_mode": "folded"}),
        ((), {"flashnorm_mode": ["strict"]}),
        ((), {"rms_norm_has_weight": "no"}),
    ],
)
def test_flags_that_contradict_the_files_or_each_other_are_refused(
    tmp_path: Path, absent: tuple[str, ...], flags: dict[str, Any]
) -> None:
    with pytest.raises(UsageError) as caught:
        read_model(write(tmp_path, {**LLAMA, **flags}, flash_norm(absent)))
    assert caught.value.code == "CONFIG"
