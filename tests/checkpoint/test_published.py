"""Configurations as their authors published them: every key is understood, and the weights they imply are as many."""

from __future__ import annotations

import math
from typing import Any

import pytest

from pyruntime.checkpoint.config_keys import notes_on_keys
from pyruntime.checkpoint.families import FAMILIES
from pyruntime.checkpoint.fields import Fields
from pyruntime.spec import MLP, Activation, Attention, RopeKind, weight_shapes

COMMON: dict[str, Any] = {
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.45.0",
    "use_cache": True,
}


def sizes(hidden: int, ffn: int, layers: int, heads: int, kv_heads: int, vocab: int, context: int) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "max_position_embeddings": context,
    }


GEMMA = {"hidden_activation": "gelu_pytorch_tanh", "attention_bias": False, "query_pre_attn_scalar": 256}
# configuration, and how many weights its authors' files hold
PUBLISHED: dict[str, tuple[dict[str, Any], int]] = {
    "TinyLlama 1.1B": (
        sizes(2048, 5632, 22, 32, 4, 32000, 2048)
        | {
            "model_type": "llama",
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "rope_scaling": None,
            "pretraining_tp": 1,
        },
        1_100_048_384,
    ),
    "Llama 3.2 1B": (
        sizes(2048, 8192, 16, 32, 8, 128256, 131072)
        | {"model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "mlp_bias": False}
        | {"attention_bias": False, "head_dim": 64, "pretraining_tp": 1, "tie_word_embeddings": True}
        | {
            "rope_scaling": {
                "factor": 32.0,
                "high_freq_factor": 4.0,
                "low_freq_factor": 1.0,
                "original_max_position_embeddings": 8192,
                "rope_type": "llama3",
            }
        },
        1_235_814_400,
    ),
    "Mistral 7B": (
        sizes(4096, 14336, 32, 32, 8, 32000, 32768)
        | {"model_type": "mistral", "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 10000.0}
        | {"sliding_window": 4096},
        7_241_732_096,
    ),
    "Qwen2.5 0.5B": (
        sizes(896, 4864, 24, 14, 2, 151936, 32768)
        | {"model_type": "qwen2", "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 1000000.0}
        | {"max_window_layers": 24, "sliding_window": 32768, "use_sliding_window": False, "tie_word_embeddings": True},
        494_032_768,
    ),
    "Qwen3 0.6B": (
        sizes(1024, 3072, 28, 16, 8, 151936, 40960)
        | {"model_type": "qwen3", "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 1000000, "head_dim": 128}
        | {"attention_bias": False, "max_window_layers": 28, "rope_scaling": None, "sliding_window": None}
        | {"use_sliding_window": False, "tie_word_embeddings": True},
        596_049_920,
    ),
    "Phi-3 mini 4k": (
        sizes(3072, 8192, 32, 32, 32, 32064, 4096)
        | {"model_type": "phi3", "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "embd_pdrop": 0.0}
        | {"attention_bias": False, "resid_pdrop": 0.0, "rope_scaling": None, "sliding_window": 2047}
        | {"original_max_position_embeddings": 4096},
        3_821_079_552,
    ),
    "Gemma 2 2B": (
        sizes(2304, 9216, 26, 8, 4, 256000, 8192)
        | GEMMA
        | {"model_type": "gemma2", "hidden_act": "gelu_pytorch_tanh", "rms_norm_eps": 1e-6, "rope_theta": 10000.0}
        | {"head_dim": 256, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "sliding_window": 4096}
        | {"cache_implementation": "hybrid", "tie_word_embeddings": True},
        2_614_341_888,
    ),
    "Gemma 3 1B": (
        sizes(1152, 6912, 26, 4, 1, 262144, 32768)
        | GEMMA
        | {"model_type": "gemma3_text", "rms_norm_eps": 1e-6, "rope_theta": 1000000, "rope_local_base_freq": 10000}
        | {"head_dim": 256, "attn_logit_softcapping": None, "final_logit_softcapping": None, "rope_scaling": None}
        | {"sliding_window": 512, "sliding_window_pattern": 6, "cache_implementation": "hybrid"}
        | {"tie_word_embeddings": True},
        999_885_952,
    ),
    "Pythia 70M": (
        sizes(512, 2048, 6, 8, 8, 50304, 2048)
        | {"model_type": "gpt_neox", "hidden_act": "gelu", "layer_norm_eps": 1e-5, "rotary_emb_base": 10000}
        | {"rotary_pct": 0.25, "use_parallel_residual": True, "num_key_value_heads": None},
        70_426_624,
    ),
    "Minitron 4B": (
        sizes(3072, 9216, 32, 24, 8, 256000, 4096)
        | {"model_type": "nemotron", "hidden_act": "relu2", "norm_eps": 1e-5, "rope_theta": 10000, "kv_channels": 128}
        | {"head_dim": 128, "partial_rotary_factor": 0.5, "mlp_bias": False, "attention_bias": False},
        # its card says 4.19 billion; by hand: two matrices of 256000 x 3072, and in each of 32 layers 2 x 3072 x 3072
        # and 2 x 3072 x 1024 for the attention, 2 x 3072 x 9216 for the MLP, two norms of 2 x 3072; one more at the end
        4_190_509_056,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_configuration_is_understood(name: str) -> None:
    config, num_weights = PUBLISHED[name]
    fields = Fields(COMMON | config)
    family = FAMILIES[config["model_type"]]
    spec = family.spec(fields)
    assert sum(math.prod(shape) for shape in weight_shapes(spec).values()) == num_weights
    assert notes_on_keys(fields, family, spec) == ()


# norm's eps, theta, rope, window of layer 0, activation
FACTS: dict[str, tuple[float, float, RopeKind, int | None, Activation]] = {
    "TinyLlama 1.1B": (1e-5, 1e4, RopeKind.DEFAULT, None, Activation.SILU),
    "Llama 3.2 1B": (1e-5, 5e5, RopeKind.LLAMA3, None, Activation.SILU),
    "Mistral 7B": (1e-5, 1e4, RopeKind.DEFAULT, 4096, Activation.SILU),
    "Qwen2.5 0.5B": (1e-6, 1e6, RopeKind.DEFAULT, None, Activation.SILU),
    "Qwen3 0.6B": (1e-6, 1e6, RopeKind.DEFAULT, None, Activation.SILU),
    "Phi-3 mini 4k": (1e-5, 1e4, RopeKind.DEFAULT, 2047, Activation.SILU),
    "Gemma 2 2B": (1e-6, 1e4, RopeKind.DEFAULT, 4096, Activation.GELU_TANH),
    "Gemma 3 1B": (1e-6, 1e4, RopeKind.DEFAULT, 512, Activation.GELU_TANH),
    "Pythia 70M": (1e-5, 1e4, RopeKind.DEFAULT, None, Activation.GELU),
    "Minitron 4B": (1e-5, 1e4, RopeKind.DEFAULT, None, Activation.RELU2),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_configuration_means_what_it_says(name: str) -> None:
    config, _ = PUBLISHED[name]
    spec = FAMILIES[config["model_type"]].spec(Fields(COMMON | config))
    attention, mlp = spec.layers[0].attention, spec.layers[0].mlp
    assert isinstance(attention, Attention) and isinstance(mlp, MLP)
    assert attention.rope is not None and attention.pre is not None
    found = (attention.pre.eps, attention.rope.theta, attention.rope.kind, attention.window, mlp.activation)
    assert found == FACTS[name]
    assert attention.head_dim == config.get("head_dim", config["hidden_size"] // config["num_attention_heads"])
    # Gemma scales scores by query_pre_attn_scalar, which is its head size here
    assert attention.scale == attention.head_dim**-0.5


def test_gemma_slides_where_its_report_says() -> None:
    """Gemma 2: every other layer, the first one slides; Gemma 3: five slide, the sixth does not, with its own theta."""
    config, _ = PUBLISHED["Gemma 2 2B"]
    second = [a.window for _, a in FAMILIES["gemma2"].spec(Fields(COMMON | config)).attentions()]
    assert second == [4096, None] * 13
    config, _ = PUBLISHED["Gemma 3 1B"]
    third = FAMILIES["gemma3_text"].spec(Fields(COMMON | config)).attentions()
    assert [i for i, a in third if a.window is None] == [5, 11, 17, 23]
    assert {a.window for _, a in third} == {None, 512}
    assert {(a.window, a.rope and a.rope.theta) for _, a in third} == {(512, 1e4), (None, 1e6)}


def test_pythia_turns_a_quarter_of_each_head() -> None:
    config, _ = PUBLISHED["Pythia 70M"]
    spec = FAMILIES["gpt_neox"].spec(Fields(COMMON | config))
    assert {a.rope and (a.rope.kind, a.rope.dim) for _, a in spec.attentions()} == {(RopeKind.DEFAULT, 16)}
