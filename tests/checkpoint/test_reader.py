"""Checkpoints that transformers wrote, read tensor for tensor; and what does not fit together, refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from pyruntime.checkpoint import Model, read_model
from pyruntime.errors import CheckpointError
from pyruntime.graph import build, fuse
from pyruntime.plan import lower
from pyruntime.spec import weight_shapes
from tests.checkpoint.craft import SINGLE, edited, rewrite, watched_reads

Make = Callable[..., tuple[Path, Any]]

# our names of a sublayer's weights, and those of transformers, written down here a second time
STEMS = {
    "attention.pre": "input_layernorm",
    "attention.q": "self_attn.q_proj",
    "attention.k": "self_attn.k_proj",
    "attention.v": "self_attn.v_proj",
    "attention.o": "self_attn.o_proj",
    "mlp.pre": "post_attention_layernorm",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
}
OUTER = {"embedding": "model.embed_tokens", "final_norm": "model.norm", "head": "lm_head"}


def hf_name(weight: str) -> str:
    stem, end = weight.rsplit(".", 1)
    if stem in OUTER:
        return f"{OUTER[stem]}.{end}"
    _, index, rest = stem.split(".", 2)
    return f"model.layers.{index}.{STEMS[rest]}.{end}"


def of_sublayers(name: str, attention: tuple[int, ...] = (), mlp: tuple[int, ...] = ()) -> bool:
    """Whether the tensor `name` belongs to one of these sublayers."""
    starts = [f"model.layers.{i}.{part}" for i in attention for part in ("self_attn.", "input_layernorm.")]
    starts += [f"model.layers.{i}.{part}" for i in mlp for part in ("mlp.", "post_attention_layernorm.")]
    return name.startswith(tuple(starts))


def refused(folder: Path, code: str) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_model(folder)
    assert (caught.value.code, caught.value.exit_code) == (code, 3)
    return str(caught.value)


def assert_equal_tensors(model: Model, expected: dict[str, torch.Tensor]) -> None:
    assert {hf_name(weight) for weight in model.weights} == expected.keys()
    for weight, lazy in model.weights.items():
        tensor = lazy.read()
        assert tensor.dtype == expected[hf_name(weight)].dtype
        assert lazy.shape == tuple(tensor.shape)
        assert lazy.num_bytes == tensor.nbytes
        assert torch.equal(tensor, expected[hf_name(weight)]), weight


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "attention bias": {"attention_bias": True},
    "tied head": {"tie_word_embeddings": True},
    "wide heads": {"head_dim": 24},
    "one layer": {"num_hidden_layers": 1},
}


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_tensor_equals_the_one_saved(make_llama: Make, tmp_path: Path, variant: str, sharded: bool) -> None:
    folder, hf_model = make_llama(**VARIANTS[variant])
    if sharded:
        folder = tmp_path
        hf_model.save_pretrained(folder, max_shard_size="20KB")
        assert len(list(folder.glob("*.safetensors"))) > 1
    state = dict(hf_model.named_parameters())
    model = read_model(folder)
    assert_equal_tensors(model, state)
    assert weight_shapes(model.spec) == {weight: lazy.shape for weight, lazy in model.weights.items()}
    assert model.spec.head.tied == ("lm_head.weight" not in state)
    assert model.spec == model.dense_spec
    assert model.weight_bytes == sum(parameter.nbytes for parameter in state.values())
    assert model.notes == ()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_dtype_is_that_of_the_files(make_llama: Make, tmp_path: Path, dtype: str) -> None:
    folder, _ = make_llama()
    # config.json may say another: the files decide
    copy = edited(folder, tmp_path / "m", {"dtype": "float64"})
    wanted = getattr(torch, dtype)
    rewrite(copy, lambda tensors: tensors.update({name: tensor.to(wanted) for name, tensor in tensors.items()}))
    model = read_model(copy)
    assert model.dtype == dtype
    assert {lazy.read().dtype for lazy in model.weights.values()} == {wanted}


def test_the_dtype_of_mixed_files_is_that_of_most_bytes(make_llama: Make, tmp_path: Path) -> None:
    folder, _ = make_llama()
    copy = edited(folder, tmp_path / "m")

    def mix(tensors: dict[str, torch.Tensor]) -> None:
        # the largest tensor alone is float32, as is common for embeddings and norms
        for name, tensor in tensors.items():
            if "embed" not in name and "norm" not in name:
                tensors[name] = tensor.bfloat16()

    rewrite(copy, mix)
    sizes: dict[torch.dtype, int] = {}
    for tensor in load_file(copy / SINGLE).values():
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.nbytes
    assert max(sizes, key=lambda dtype: sizes[dtype]) == torch.bfloat16
    assert read_model(copy).dtype == "bfloat16"


DROPS: dict[str, tuple[dict[str, Any], tuple[int, ...], tuple[int, ...]]] = {
    "attentions": ({"drop_attn_list": [2, 0]}, (0, 2), ()),
    "mlps": ({"drop_mlp_list": [3]}, (), (3,)),
    "blocks": ({"drop_attn_list": [1, 2], "drop_mlp_list": [1, 2]}, (1, 2), (1, 2)),
    "everything": ({"drop_attn_list": [0, 1, 2, 3], "drop_mlp_list": [3, 2, 1, 0]}, (0, 1, 2, 3), (0, 1, 2, 3)),
    "per layer": ({"per_layer_config": {"1": {"skip": ["attention", "mlp"]}, "3": {"skip": ["mlp"]}}}, (1,), (1, 3)),
}


@pytest.mark.parametrize("case", DROPS)
def test_dropped_tensors_may_be_there_or_not(make_llama: Make, tmp_path: Path, case: str) -> None:
    source, hf_model = make_llama()
    config, attention, mlp = DROPS[case]
    full = edited(source, tmp_path / "full", config)
    compact = edited(source, tmp_path / "compact", config)
    kept = {name: tensor for name, tensor in hf_model.state_dict().items() if not of_sublayers(name, attention, mlp)}
    save_file(kept, compact / SINGLE)
    assert (compact / SINGLE).stat().st_size < (full / SINGLE).stat().st_size
    first, second = read_model(full), read_model(compact)
    assert first.spec == second.spec
    assert first.dense_spec == second.dense_spec == read_model(source).spec
    assert (first.spec.dropped("attention"), first.spec.dropped("mlp")) == (attention, mlp)
    assert_equal_tensors(first, kept)
    assert_equal_tensors(second, kept)


@pytest.mark.parametrize("case", ["attentions", "blocks", "everything"])
@pytest.mark.parametrize("tied", [False, True])
def test_nothing_is_read_before_lowering_and_only_what_is_kept_after(
    make_llama: Make, tmp_path: Path, case: str, tied: bool
) -> None:
    source, hf_model = make_llama(tie_word_embeddings=tied)
    config, attention, mlp = DROPS[case]
    folder = edited(source, tmp_path / "m", config)
    header_end = 8 + int.from_bytes((folder / SINGLE).read_bytes()[:8], "little")
    with watched_reads() as reads:
        model = read_model(folder)
        graph = fuse(build(model.spec))
        assert model.weight_bytes > 0
    assert model.bytes_read == 0
    assert reads and all(end <= header_end for _, end in reads)
    with watched_reads() as reads:
        lower(graph, model)
    kept = {name: each for name, each in hf_model.named_parameters() if not of_sublayers(name, attention, mlp)}
    assert model.bytes_read == sum(each.nbytes for each in kept.values()) == model.weight_bytes
    assert sorted(end - begin for begin, end in reads) == sorted(each.nbytes for each in kept.values())
    assert len(set(reads)) == len(reads)


def test_missing_tensors_are_counted_and_ten_are_listed(make_llama: Make, tmp_path: Path) -> None:
    source, _ = make_llama()
    folder = edited(source, tmp_path / "m")
    gone = [name for name in load_file(folder / SINGLE) if ".mlp." in name]
    rewrite(folder, lambda tensors: [tensors.pop(name) for name in gone] and None)
    message = refused(folder, "MISSING_TENSOR")
    assert f"{len(gone)} tensors" in message
    assert sum(name in message for name in gone) == 10


def test_a_kept_layer_whose_tensors_are_gone_is_an_error(make_llama: Make, tmp_path: Path) -> None:
    """C08: the lists say one thing and the weights another."""
    source, hf_model = make_llama()
    folder = edited(source, tmp_path / "m", {"drop_attn_list": [1]})
    save_file(
        {n: t for n, t in hf_model.state_dict().items() if not of_sublayers(n, attention=(1, 2))}, folder / SINGLE
    )
    message = refused(folder, "MISSING_TENSOR")
    assert "model.layers.2.self_attn.q_proj.weight" in message
    assert "model.layers.1." not in message


EXTRA = [
    "model.layers.4.mlp.up_proj.weight",
    "model.layers.0.self_attn.q_norm.weight",
    "model.layers.0.mlp.up_proj.bias",
]


@pytest.mark.parametrize("name", [*EXTRA, "visual.weight", "lm_head.bias"])
def test_a_tensor_of_no_known_place_is_an_error(make_llama: Make, tmp_path: Path, name: str) -> None:
    source, _ = make_llama()
    folder = edited(source, tmp_path / "m")
    rewrite(folder, lambda tensors: tensors.update({name: torch.zeros(3)}))
    assert name in refused(folder, "UNEXPECTED_TENSOR")


def test_stale_buffers_of_old_checkpoints_are_no_error(make_llama: Make, tmp_path: Path) -> None:
    source, hf_model = make_llama()
    folder = edited(source, tmp_path / "m")
    rewrite(folder, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}))
    assert_equal_tensors(read_model(folder), dict(hf_model.named_parameters()))


SHAPES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "transposed": lambda tensor: tensor.T.contiguous(),
    "a row less": lambda tensor: tensor[1:].contiguous(),
    "a row more": lambda tensor: torch.cat([tensor, tensor[:1]]),
    "flat": lambda tensor: tensor.reshape(-1),
}


@pytest.mark.parametrize("case", SHAPES)
@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight"])
def test_a_shape_that_the_configuration_does_not_imply_is_refused(
    make_llama: Make, tmp_path: Path, name: str, case: str
) -> None:
    source, hf_model = make_llama()
    folder = edited(source, tmp_path / "m")
    expected = hf_model.state_dict()[name]
    wrong = SHAPES[case](expected)
    rewrite(folder, lambda tensors: tensors.update({name: wrong}))
    message = refused(folder, "SHAPE")
    assert name in message and str(list(wrong.shape)) in message and str(list(expected.shape)) in message


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.bool, torch.float64, torch.float8_e4m3fn])
def test_other_dtypes_are_refused_where_they_are_needed(make_llama: Make, tmp_path: Path, dtype: torch.dtype) -> None:
    source, _ = make_llama()
    name = "model.layers.1.self_attn.q_proj.weight"
    folder = edited(source, tmp_path / "m")
    rewrite(folder, lambda tensors: tensors.update({name: tensors[name].to(dtype)}))
    with safe_open(folder / SINGLE, "pt") as file:
        stored = file.get_slice(name).get_dtype()
    message = refused(folder, "DTYPE")
    assert name in message and stored in message
    # a dropped tensor may be anything
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "drop_attn_list": [1]}))
    read_model(folder)


def test_layers_may_have_their_own_sizes(make_llama: Make, tmp_path: Path) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP

    from tests.helpers import all_logits, hf_logits, make_plan, relative_error

    # a private model, because its layers are exchanged
    _, hf_model = make_llama(rms_norm_eps=2e-5)
    sizes = {0: {"intermediate_size": 24}, 2: {"num_key_value_heads": 1}, 3: {"num_attention_heads": 8}}
    torch.manual_seed(1)
    for index, own in sizes.items():
        config = LlamaConfig(**{**hf_model.config.to_dict(), **own})
        config._attn_implementation = hf_model.config._attn_implementation
        layer = hf_model.model.layers[index]
        if "intermediate_size" in own:
            layer.mlp = LlamaMLP(config)
        else:
            layer.self_attn = LlamaAttention(config, index)
    source, _ = make_llama()
    folder = edited(
        source, tmp_path / "m", {"rms_norm_eps": 2e-5, "per_layer_config": {f"{i:02}": o for i, o in sizes.items()}}
    )
    save_file(hf_model.state_dict(), folder / SINGLE)
    model = read_model(folder)
    assert_equal_tensors(model, dict(hf_model.named_parameters()))
    (found,) = all_logits(make_plan(folder), [[3, 1, 4, 1, 5]], 2)
    assert relative_error(found, hf_logits(hf_model, [3, 1, 4, 1, 5])) < 1e-5
