"""mergekit's filters on models of several families: what they silence is dropped, what changes more is refused.

A filter is for every tensor whose full name it is a part of. The judge is transformers, weights scaled by that rule.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from pyruntime.checkpoint import read_model
from pyruntime.errors import UsageError
from pyruntime.passes import load_drop_plan
from pyruntime.spec import NormKind, weight_shapes
from tests import families
from tests.checkpoint.dialects.tiny import attention, mlp, spec_of
from tests.families import NUM_LAYERS, SIZES, VARIANTS, Variant
from tests.helpers import all_logits, hf_logits, make_plan, relative_error
from tests.specs import rms

# float32 against transformers in float32
LIMIT = 1e-5
TOKENS = [(7 * i * i + 3 * i) % SIZES["vocab_size"] for i in range(11)]
EVERY = tuple(range(NUM_LAYERS))
MODELS = {
    "llama with biases": Variant("Llama", {"num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True}),
    "llama": Variant("Llama", {"num_key_value_heads": 2}),
    **{name: VARIANTS[name] for name in ("gpt_neox", "gemma2", "qwen2", "qwen3", "phi3")},
}
# what is scaled to zero -> the attentions and the MLPs that add nothing then
DROPPED: dict[tuple[str, str], tuple[tuple[int, ...], tuple[int, ...]]] = {
    ("llama with biases", "o_proj"): (EVERY, ()),
    ("llama with biases", "mlp.down_proj"): ((), EVERY),
    ("llama with biases", "layers.2.self_attn.o_proj"): ((2,), ()),
    ("llama with biases", "self_attn"): (EVERY, ()),
    ("llama with biases", "model.layers."): (EVERY, EVERY),
    ("llama", "o_proj.weight"): (EVERY, ()),
    ("llama", "layers.1."): ((1,), (1,)),
    ("gpt_neox", "attention.dense"): (EVERY, ()),
    ("gpt_neox", "dense_4h_to_h"): ((), EVERY),
    ("gemma2", "o_proj"): (EVERY, ()),
    ("gemma2", "down_proj"): ((), EVERY),
    ("qwen2", "o_proj"): (EVERY, ()),
    ("qwen3", "down_proj"): ((), EVERY),
    ("phi3", "o_proj"): (EVERY, ()),
}
# and what is refused: a tensor that it names, or that there is none
REFUSED: dict[tuple[str, str], str] = {
    ("llama with biases", "o_proj.weight"): "self_attn.o_proj.weight is scaled by 0",
    ("llama with biases", "down_proj.bias"): "mlp.down_proj.bias is scaled by 0",
    ("llama", "lm_head"): "lm_head.weight is scaled by 0",
    ("llama", "embed"): "model.embed_tokens.weight is scaled by 0",
    ("llama", "model.norm"): "model.norm.weight is scaled by 0",
    ("llama", "layernorm"): "input_layernorm.weight is scaled by 0",
    ("llama", "nonsense"): "'nonsense'",
    ("llama", "o_proj.bias"): "'o_proj.bias'",
    ("gpt_neox", "down_proj"): "'down_proj'",
    ("gpt_neox", "dense.weight"): "attention.dense.weight is scaled by 0",
    ("gemma2", "post_feedforward"): "post_feedforward_layernorm.weight is scaled by 0",
    ("qwen2", "bias"): "self_attn.q_proj.bias is scaled by 0",
    ("qwen3", "q_norm"): "self_attn.q_norm.weight is scaled by 0",
    ("qwen3", "o_proj.bias"): "'o_proj.bias'",
    # tied: there is no such tensor
    ("qwen3", "lm_head"): "'lm_head'",
    ("phi3", "qkv_proj"): "self_attn.qkv_proj.weight is scaled by 0",
}


def merge(tmp_path: Path, wanted: str, num_layers: int = NUM_LAYERS) -> Path:
    path = tmp_path / "merge.yml"
    path.write_text(
        f"slices: [{{sources: [{{model: m, layer_range: [0, {num_layers}]}}]}}]\nmerge_method: passthrough\n"
        f"parameters: {{scale: [{{filter: {wanted}, value: 0.0}}, {{value: 1.0}}]}}\n"
    )
    return path


@pytest.fixture(scope="module", params=list(MODELS))
def judge(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Any]:
    folder = tmp_path_factory.mktemp("merged")
    return request.param, folder, families.make(MODELS[request.param], folder)


def test_what_a_filter_silences_is_dropped(judge: tuple[str, Path, Any], tmp_path: Path) -> None:
    name, folder, hf_model = judge
    for (model, wanted), (attentions, mlps) in DROPPED.items():
        if model != name:
            continue
        plan = load_drop_plan(merge(tmp_path, wanted), read_model(folder).spec)
        assert (plan.attention, plan.mlp) == (attentions, mlps), wanted
        scaled = copy.deepcopy(hf_model)
        with torch.no_grad():
            for tensor_name, parameter in scaled.named_parameters():
                parameter.mul_(0.0 if wanted in tensor_name else 1.0)
        (found,) = all_logits(make_plan(folder, plan), [TOKENS], 64)
        assert relative_error(found, hf_logits(scaled, TOKENS)) < LIMIT, wanted


def test_a_filter_that_changes_more_or_nothing_is_refused(judge: tuple[str, Path, Any], tmp_path: Path) -> None:
    name, folder, _ = judge
    for (model, wanted), why in REFUSED.items():
        if model == name:
            with pytest.raises(UsageError) as caught:
                load_drop_plan(merge(tmp_path, wanted), read_model(folder).spec)
            assert caught.value.code == "DROP_PLAN"
            assert why in str(caught.value), wanted


def test_a_norm_behind_a_sublayer_silences_it_where_its_gain_is_its_weight(tmp_path: Path) -> None:
    """Gemma names the norms; it multiplies by one more than the weight, so there a weight of zero is a gain of one."""
    for kind, silent in ((NormKind.RMS, True), (NormKind.RMS_ONE_PLUS, False)):
        spec = spec_of((attention(4, post=rms(64, kind=kind)), mlp(24)), family="gemma2")
        assert weight_shapes(spec)["layers.0.attention.post.weight"] == (64,)
        path = merge(tmp_path, "post_attention_layernorm", 1)
        if silent:
            assert load_drop_plan(path, spec).attention == (0,)
        else:
            with pytest.raises(UsageError, match="post_attention_layernorm"):
                load_drop_plan(path, spec)


def test_a_bias_behind_the_last_map_keeps_a_sublayer_alive(tmp_path: Path) -> None:
    post = rms(64, kind=NormKind.LAYER, bias=True)
    spec = spec_of((attention(4, post=post), mlp(24)), family="gemma2")
    with pytest.raises(UsageError, match="o_proj"):
        load_drop_plan(merge(tmp_path, "o_proj", 1), spec)


def test_a_scale_in_a_model_whose_tensor_names_nobody_knows_is_refused(tmp_path: Path) -> None:
    spec = spec_of((attention(4), mlp(24)), family="any_model")
    with pytest.raises(UsageError, match="any_model"):
        load_drop_plan(merge(tmp_path, "o_proj", 1), spec)
