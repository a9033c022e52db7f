"""Names and places of tensors that differ from Llama's: GPT-2's matrices, prefix and masks, stacks of experts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pyruntime.checkpoint import read_model
from pyruntime.checkpoint.dialects.plan_file import read_plan
from pyruntime.checkpoint.families import with_shared_keys
from pyruntime.checkpoint.weight import TensorRef, Transposed, UnitRows
from pyruntime.errors import CheckpointError, UsageError
from pyruntime.graph import build
from pyruntime.plan import lower
from pyruntime.spec import MoE
from tests import families
from tests.checkpoint.plain_models import CONFIGS, random_tensors, shapes_of, write
from tests.families import VARIANTS

FILE = "model.safetensors"


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpt2")
    families.make(VARIANTS["gpt2"], folder)
    return folder


def again(folder: Path, source: Path, tensors: dict[str, torch.Tensor] | None = None, **keys: Any) -> Path:
    """The checkpoint of `source` with other tensors or keys, where `...` removes."""
    config = {**json.loads((source / "config.json").read_text()), **keys}
    config = {key: value for key, value in config.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(load_file(source / FILE) if tensors is None else tensors, folder / FILE)
    return folder


def test_matrices_and_their_columns_are_read_the_right_way_round(gpt2: Path) -> None:
    stored, weights = load_file(gpt2 / FILE), read_model(gpt2).weights
    whole = stored["transformer.h.2.attn.c_attn.weight"]
    for i, role in enumerate("qkv"):
        weight = weights[f"layers.2.attention.{role}.weight"]
        assert isinstance(weight, Transposed)
        assert torch.equal(weight.read(), whole[:, 32 * i : 32 * (i + 1)].T)
        bias = weights[f"layers.2.attention.{role}.bias"].read()
        assert torch.equal(bias, stored["transformer.h.2.attn.c_attn.bias"][32 * i : 32 * (i + 1)])
    up, down = (weights[f"layers.1.mlp.{role}.weight"].read() for role in ("up", "down"))
    assert torch.equal(up, stored["transformer.h.1.mlp.c_fc.weight"].T)
    assert torch.equal(down, stored["transformer.h.1.mlp.c_proj.weight"].T)
    assert torch.equal(weights["embedding.position.weight"].read(), stored["transformer.wpe.weight"])


def test_reading_columns_reads_their_bytes_alone(gpt2: Path) -> None:
    model = read_model(gpt2)
    model.weights["layers.2.attention.k.weight"].read()
    assert model.bytes_read == 32 * 32 * 4


def test_a_checkpoint_without_prefix_and_with_masks_is_the_same(gpt2: Path, tmp_path: Path) -> None:
    """As the first ones were published."""
    model = read_model(gpt2)
    old = {name.removeprefix("transformer."): tensor for name, tensor in load_file(gpt2 / FILE).items()}
    for index in range(4):
        old[f"h.{index}.attn.bias"] = torch.ones(1, 1, 64, 64)
        old[f"h.{index}.attn.masked_bias"] = torch.tensor(-1e4)
    found = read_model(again(tmp_path, gpt2, old, n_ctx=64))
    assert found.spec == model.spec
    assert found.notes == ()
    assert found.weights.keys() == model.weights.keys()
    assert all(torch.equal(weight.read(), model.weights[name].read()) for name, weight in found.weights.items())


def test_a_checkpoint_whose_names_have_the_prefix_in_part_is_refused(gpt2: Path, tmp_path: Path) -> None:
    tensors = load_file(gpt2 / FILE)
    tensors["ln_f.weight"] = tensors.pop("transformer.ln_f.weight")
    with pytest.raises(CheckpointError, match=r"transformer\.ln_f\.weight.*ln_f\.weight") as caught:
        read_model(again(tmp_path, gpt2, tensors))
    assert caught.value.code == "MISSING_TENSOR"


def test_a_matrix_stored_as_other_families_do_is_refused(gpt2: Path, tmp_path: Path) -> None:
    tensors = load_file(gpt2 / FILE)
    tensors["transformer.h.0.mlp.c_fc.weight"] = tensors["transformer.h.0.mlp.c_fc.weight"].T.contiguous()
    with pytest.raises(CheckpointError, match=r"\[40, 32\], config.json implies \[32, 40\]") as caught:
        read_model(again(tmp_path, gpt2, tensors))
    assert caught.value.code == "SHAPE"


def test_keys_under_their_shared_names_mean_the_same(gpt2: Path, tmp_path: Path) -> None:
    """transformers takes either."""
    shared: dict[str, Any] = {"n_layer": ..., "num_hidden_layers": 4, "n_embd": ..., "hidden_size": 32}
    assert read_model(again(tmp_path, gpt2, **shared)).spec == read_model(gpt2).spec
    assert read_model(again(tmp_path, gpt2, num_hidden_layers=4)).spec == read_model(gpt2).spec
    with pytest.raises(UsageError, match="two values of num_hidden_layers: 4 and 3"):
        read_model(again(tmp_path, gpt2, num_hidden_layers=3))


def test_only_a_familys_own_names_are_exchanged() -> None:
    assert with_shared_keys({"model_type": "llama", "n_layer": 3}) == {"model_type": "llama", "n_layer": 3}
    assert with_shared_keys({"model_type": ["gpt2"], "n_layer": 3}) == {"model_type": ["gpt2"], "n_layer": 3}


def test_drop_lists_of_a_gpt2_are_a_plan_for_it(gpt2: Path, tmp_path: Path) -> None:
    folder = again(tmp_path, gpt2, drop_attn_list=[3], drop_mlp_list=[0, 1])
    plan = read_plan(folder, read_model(gpt2).spec)
    assert (plan.attention, plan.mlp) == ((3,), (0, 1))
    assert read_model(folder).spec.dropped("mlp") == (0, 1)


def test_experts_in_one_tensor_are_missing_ones(tmp_path: Path) -> None:
    """No release of transformers stores them so."""
    families.make(VARIANTS["mixtral"], tmp_path)
    tensors = load_file(tmp_path / FILE)
    names = [f"model.layers.0.block_sparse_moe.experts.{expert}.w2.weight" for expert in range(5)]
    tensors["model.layers.0.mlp.experts.down_proj"] = torch.stack([tensors.pop(name) for name in names])
    with pytest.raises(CheckpointError, match=r"experts\.0\.w2") as caught:
        read_model(again(tmp_path, tmp_path, tensors))
    assert caught.value.code == "MISSING_TENSOR"


def test_a_mixtral_whose_layers_lost_experts_is_read_by_its_list(tmp_path: Path) -> None:
    families.make(VARIANTS["mixtral"], tmp_path)
    tensors = load_file(tmp_path / FILE)
    prefix = "model.layers.2.block_sparse_moe."
    tensors[f"{prefix}gate.weight"] = tensors[f"{prefix}gate.weight"][:4].contiguous()
    for name in ("w1", "w2", "w3"):
        del tensors[f"{prefix}experts.4.{name}.weight"]
    model = read_model(again(tmp_path, tmp_path, tensors, num_local_experts=[5, 5, 4, 5]))
    assert [isinstance(layer.mlp, MoE) and layer.mlp.num_experts for layer in model.spec.layers] == [5, 5, 4, 5]
    assert model.declared == ("num_local_experts: num_local_experts by layer",)
    with pytest.raises(CheckpointError, match="missing"):
        read_model(again(tmp_path, tmp_path, tensors, num_local_experts=5))


def test_lists_of_expert_counts_may_name_dense_layers(tmp_path: Path) -> None:
    config = CONFIGS["deepseek, experts dropped by layer"]
    tensors = random_tensors(shapes_of(config))
    specs = [
        read_model(write(tmp_path, {**config, "n_routed_experts": [first, 5, 2, 3]}, tensors)).spec
        for first in (None, 5)
    ]
    assert specs[0] == specs[1]


def test_rows_of_the_head_of_baichuan_2_are_divided_once(tmp_path: Path) -> None:
    config = CONFIGS["baichuan2 7b"]
    tensors = random_tensors(shapes_of(config)) | {"lm_head.weight": torch.full((61, 32), 3.0, dtype=torch.bfloat16)}
    model = read_model(write(tmp_path, config, tensors))
    head = model.weights["head.weight"]
    assert isinstance(head, UnitRows)
    # 1 / sqrt(32) is no bfloat16
    assert (head.read() - 32**-0.5).abs().max() < 1e-7
    plan = lower(build(model.spec), model, dtype="float32")
    assert isinstance(next(iter(head.refs())), TensorRef)
    assert plan.vocab_size == 61
