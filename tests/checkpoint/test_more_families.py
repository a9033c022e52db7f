"""Baichuan and DeepSeek-MoE, which transformers has no class for, beside float64 mathematics of their own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pyruntime.bench.summary import describe, summary
from pyruntime.checkpoint import read_model
from pyruntime.checkpoint.families import FAMILIES
from pyruntime.checkpoint.fields import Fields
from pyruntime.checkpoint.weight import TensorRef
from pyruntime.errors import CheckpointError, UsageError
from pyruntime.graph import build
from pyruntime.passes import drop
from pyruntime.plan import lower
from pyruntime.spec import DropPlan, MoE
from tests import plain
from tests.checkpoint.plain_models import BASE, CONFIGS, WIDTH, random_tensors, shapes_of, write
from tests.helpers import TARGETS, all_logits, make_plan, relative_error

LIMIT = 1e-5
EVERY = (0, 1, 2, 3)
PATTERNS = {
    "nothing": DropPlan(),
    "last attention": DropPlan(attention=(3,)),
    "all attentions": DropPlan(attention=EVERY),
    "all mlps": DropPlan(mlp=EVERY),
    "mixed": DropPlan(attention=(1, 2), mlp=(0, 2)),
    "everything": DropPlan(attention=EVERY, mlp=EVERY),
}
PROMPT = [(7 * i * i + 3 * i) % 61 for i in range(23)]
RAGGED = [PROMPT[:1], PROMPT[5:8], PROMPT[::-1][:17], PROMPT]
MODES = {"full": 64, "decode": 1, "chunked": 7}
Made = tuple[Path, dict[str, Any], dict[str, torch.Tensor]]


@pytest.fixture(scope="module", params=list(CONFIGS))
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    config = CONFIGS[request.param]
    tensors = random_tensors(shapes_of(config))
    return write(tmp_path_factory.mktemp("plain"), config, tensors), config, tensors


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_logits_equal_float64_mathematics(made: Made, pattern: str, target: str) -> None:
    """Full forward, cached decode and chunked prefill of a ragged batch."""
    folder, config, tensors = made
    drops = PATTERNS[pattern]
    plan = make_plan(folder, drops, target=target)
    expected = [plain.logits(config, tensors, sequence, drops) for sequence in RAGGED]
    for mode, chunk in MODES.items():
        for found, logits in zip(all_logits(plan, RAGGED, chunk), expected, strict=True):
            assert relative_error(found, logits) < LIMIT, mode


def test_nothing_is_left_unread(made: Made) -> None:
    folder, _, tensors = made
    model = read_model(folder)
    assert not model.notes
    lower(build(model.spec), model)
    assert model.bytes_read == model.weight_bytes == sum(tensor.numel() * 4 for tensor in tensors.values())


def test_a_dropped_mixture_reads_no_byte_of_router_experts_and_norm(tmp_path: Path) -> None:
    config = {**CONFIGS["deepseek"], "drop_mlp_list": [2]}
    tensors = random_tensors(shapes_of(config))
    model = read_model(write(tmp_path, config, tensors))
    lower(build(model.spec), model)
    gone = ("model.layers.2.mlp.", "model.layers.2.post_attention_layernorm.")
    lost = sum(tensor.numel() * 4 for name, tensor in tensors.items() if name.startswith(gone))
    assert model.unread_bytes == lost > 0
    assert model.bytes_read == sum(tensor.numel() * 4 for tensor in tensors.values()) - lost
    assert not any(
        isinstance(ref, TensorRef) and ref.name.startswith(gone) for w in model.weights.values() for ref in w.refs()
    )


def test_a_compact_checkpoint_without_dropped_mixtures_is_whole(tmp_path: Path) -> None:
    config = {**CONFIGS["deepseek"], "drop_mlp_list": [2]}
    kept = {
        name: tensor
        for name, tensor in random_tensors(shapes_of(config)).items()
        if not name.startswith(("model.layers.2.mlp.", "model.layers.2.post_attention_layernorm."))
    }
    assert read_model(write(tmp_path, config, kept)).spec.layers[2].mlp is None


def test_mixtures_stand_where_original_layer_numbers_say(tmp_path: Path) -> None:
    """transformers' DeepSeek of LLM-Drop: the rule sees original ids, so a drop moves no mixture."""
    config = {**CONFIGS["deepseek, normalized, every other layer dense"], "drop_attn_list": [0], "drop_mlp_list": [0]}
    model = read_model(write(tmp_path, config, random_tensors(shapes_of(config))))
    assert [isinstance(layer.mlp, MoE) for layer in model.spec.layers] == [False, False, True, False]
    assert model.spec.layers[0].mlp is None


def test_drop_lists_of_bools_name_the_true_ones(tmp_path: Path) -> None:
    """The configuration class of LLM-Drop's DeepSeek would drop layers 0 and 1 instead."""
    config = {
        **CONFIGS["deepseek"],
        "drop_attn_list": [False, True, False, True],
        "drop_mlp_list": [True] + [False] * 3,
    }
    model = read_model(write(tmp_path, config, random_tensors(shapes_of(config))))
    assert (model.spec.dropped("attention"), model.spec.dropped("mlp")) == ((1, 3), (0,))


@pytest.mark.parametrize("counts", [[None, 5, 2, 4], [None, 5, 1, 3], [5, 5, 3, 3]])
def test_expert_counts_that_the_tensors_do_not_have_are_refused(tmp_path: Path, counts: list[int | None]) -> None:
    config = CONFIGS["deepseek, experts dropped by layer"]
    tensors = random_tensors(shapes_of(config))
    with pytest.raises((CheckpointError, UsageError)) as caught:
        read_model(write(tmp_path, {**config, "n_routed_experts": counts}, tensors))
    assert caught.value.code in ("MISSING_TENSOR", "UNEXPECTED_TENSOR", "SHAPE", "CONFIG")


@pytest.mark.parametrize(
    "model_type, changes, words",
    [
        ("deepseek", {"n_routed_experts": [None, 5, 0, 3]}, ["n_routed_experts", "0", "layer 2"]),
        ("deepseek", {"n_routed_experts": [5, 5]}, ["n_routed_experts", "4"]),
        ("deepseek", {"n_routed_experts": [None, 5, True, 3]}, ["n_routed_experts", "true"]),
        ("deepseek", {"n_routed_experts": 4097}, ["n_routed_experts", "4097"]),
        ("deepseek", {"n_routed_experts": "5"}, ["n_routed_experts"]),
        ("deepseek", {"num_experts_per_tok": 6}, ["top_k", "6"]),
        ("deepseek", {"num_experts_per_tok": ...}, ["num_experts_per_tok", "required"]),
        ("deepseek", {"scoring_func": "sigmoid"}, ["scoring_func", "softmax"]),
        ("deepseek", {"moe_layer_freq": 0}, ["moe_layer_freq"]),
        ("deepseek", {"first_k_dense_replace": -1}, ["first_k_dense_replace"]),
        ("deepseek", {"n_shared_experts": 4096, "moe_intermediate_size": 4096}, ["linear", "out_features"]),
        ("deepseek", {"norm_topk_prob": 1}, ["norm_topk_prob"]),
        ("deepseek", {"routed_scaling_factor": 0}, ["routed_scaling_factor"]),
        ("llama", {"num_local_experts": [8, 8, 8, 8]}, ["num_local_experts", "cannot differ"]),
        ("baichuan", {"tie_word_embeddings": True, "z_loss_weight": 0}, ["tie_word_embeddings"]),
        ("baichuan", {"hidden_size": 5120, "num_attention_heads": 40}, ["5120", "max_position_embeddings"]),
        ("baichuan", {"hidden_size": 4096, "max_position_embeddings": ..., "model_max_length": 4096}, ["4096", "rope"]),
        ("baichuan", {"max_position_embeddings": ...}, ["model_max_length", "required"]),
        ("qwen2_moe", {"mlp_only_layers": [0, "1"]}, ["mlp_only_layers"]),
        ("qwen2_moe", {"decoder_sparse_step": 0}, ["decoder_sparse_step"]),
        ("gpt2", {"n_layer": 5}, ["num_hidden_layers", "4", "5"]),
        ("gpt2", {"add_cross_attention": True}, ["add_cross_attention"]),
        ("gpt2", {"scale_attn_weights": "yes"}, ["scale_attn_weights"]),
    ],
)
def test_what_a_family_cannot_honour_is_refused_by_name(
    tmp_path: Path, model_type: str, changes: dict[str, Any], words: list[str]
) -> None:
    base = CONFIGS["deepseek"] if model_type == "deepseek" else BASE
    config = {**base, "model_type": model_type, **changes}
    (tmp_path / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))
    with pytest.raises(UsageError) as caught:
        read_model(tmp_path)
    assert caught.value.code == "CONFIG"
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_no_configuration_makes_more_experts_than_names_can_be_made_of() -> None:
    config = {**BASE, "model_type": "mixtral", "num_hidden_layers": 1024, "num_local_experts": 4096}
    with pytest.raises(UsageError, match="4194304 experts in all layers"):
        FAMILIES["mixtral"].spec(Fields(config))


def test_mixtures_are_shown_as_kept_and_their_counts_by_layer(tmp_path: Path) -> None:
    config = CONFIGS["deepseek, experts dropped by layer"]
    model = read_model(write(tmp_path, config, random_tensors(shapes_of(config))))
    text = "\n".join(describe(model, summary(model, 4, 1, 8)))
    assert "mlp         ####\n" in text
    assert "differ by layer     experts: 5 (x1), 2 (x1), 3 (x1)" in text
    # dense layers in front of mixtures are how this architecture is
    dense = CONFIGS["deepseek"]
    whole = read_model(write(tmp_path, dense, random_tensors(shapes_of(dense))))
    facts = summary(drop(whole, DropPlan((), (2,))), 4, 1, 8)
    assert facts["dense_weight_bytes"] == whole.weight_bytes
    assert facts["sizes_by_layer"] == {}


def test_experts_that_no_file_could_hold_are_refused_before_they_are_named(tmp_path: Path) -> None:
    config = {**CONFIGS["deepseek"], "n_routed_experts": 4096}
    tensors = random_tensors(shapes_of(CONFIGS["deepseek"]))
    with pytest.raises(CheckpointError, match=f"12288 experts .* the files hold {len(tensors)} tensors") as caught:
        read_model(write(tmp_path, config, tensors))
    assert caught.value.code == "MISSING_TENSOR"


def test_baichuan_2_is_known_by_its_vocabulary_too() -> None:
    """Configurations that somebody wrote anew may lack z_loss_weight; no other model has 125696 tokens."""
    config = {**BASE, "model_type": "baichuan", "hidden_size": WIDTH}
    assert not FAMILIES["baichuan"].of(Fields(config)).unit_rows
    assert FAMILIES["baichuan"].of(Fields({**config, "vocab_size": 125696})).unit_rows == {"head"}
