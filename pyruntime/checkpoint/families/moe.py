"""Mixtral, Qwen2-MoE and DeepSeek-MoE (the 16B of the first generation): experts in place of MLPs."""

from typing import Final

from pyruntime.checkpoint.families.decoder import Decoder, Window
from pyruntime.checkpoint.families.experts import Experts
from pyruntime.checkpoint.families.family import Family
from pyruntime.checkpoint.families.keys import Key
from pyruntime.checkpoint.families.llama import HARMLESS, NAMES
from pyruntime.checkpoint.families.rope import RopeKeys
from pyruntime.checkpoint.fields import Fields
from pyruntime.errors import UsageError
from pyruntime.spec.bounds import MAX_EXPERTS, MAX_LAYERS, MAX_WIDTH

# they steer training
_ROUTER: Final = frozenset({"output_router_logits", "router_aux_loss_coef"})
_EXPERT: Final = {
    f"layers.{{}}.mlp.experts.{{}}.{role}": f"model.layers.{{}}.mlp.experts.{{}}.{role}_proj"
    for role in ("gate", "up", "down")
}


def _shared_names(name: str) -> dict[str, str]:
    return {f"layers.{{}}.mlp.shared.{role}": f"{name}.{role}_proj" for role in ("gate", "up", "down")}


MIXTRAL: Final = Family(
    model_types=("mixtral",),
    decoder=Decoder(
        norm_eps=Key("rms_norm_eps", 1e-5),
        rope=RopeKeys(default_theta=1e6),
        window=Window(Key("sliding_window")),
        experts=Experts(
            count=Key("num_local_experts", 8), top_k=Key("num_experts_per_tok", 2), width=Key("intermediate_size")
        ),
    ),
    names={
        **NAMES,
        "layers.{}.mlp.router": "model.layers.{}.block_sparse_moe.gate",
        **{
            f"layers.{{}}.mlp.experts.{{}}.{role}": f"model.layers.{{}}.block_sparse_moe.experts.{{}}.{name}"
            for role, name in {"gate": "w1", "up": "w3", "down": "w2"}.items()
        },
    },
    harmless=HARMLESS | _ROUTER | {"router_jitter_noise"},
    stale=("rotary_emb.inv_freq",),
)


def _qwen_slides(fields: Fields, index: int) -> bool:
    """Every other layer below `max_window_layers`, as transformers has it for this family alone."""
    return index % 2 == 0 and index < int(fields.integer("max_window_layers", 0, MAX_LAYERS, 28))


def _qwen_at(fields: Fields, index: int) -> bool:
    dense = fields.raw("mlp_only_layers", [])
    if not isinstance(dense, list) or not all(type(each) is int for each in dense):
        raise UsageError("CONFIG", f"config.json: mlp_only_layers is {str(dense)[:80]}; expected a list of layers")
    return index not in dense and (index + 1) % int(fields.integer("decoder_sparse_step", 1, MAX_LAYERS, 1)) == 0


QWEN2_MOE: Final = Family(
    model_types=("qwen2_moe",),
    decoder=Decoder(
        qkv_bias=Key("qkv_bias", True),
        window=Window(Key("sliding_window", 4096), _qwen_slides, listed=True, switch="use_sliding_window"),
        experts=Experts(
            count=Key("num_experts", 60),
            top_k=Key("num_experts_per_tok", 4),
            width=Key("moe_intermediate_size", 1408),
            normalize=Key("norm_topk_prob", False),
            shared_width=lambda fields: int(fields.integer("shared_expert_intermediate_size", 1, MAX_WIDTH, 5632)),
            gated=True,
            at=_qwen_at,
        ),
    ),
    names={
        **NAMES,
        **_EXPERT,
        **_shared_names("model.layers.{}.mlp.shared_expert"),
        "layers.{}.mlp.router": "model.layers.{}.mlp.gate",
        "layers.{}.mlp.shared_gate": "model.layers.{}.mlp.shared_expert_gate",
    },
    harmless=HARMLESS | _ROUTER | {"max_window_layers"},
)


def _deepseek_at(fields: Fields, index: int) -> bool:
    """By original layer numbers, whatever was dropped."""
    first = int(fields.integer("first_k_dense_replace", 0, MAX_LAYERS, 0))
    every = int(fields.integer("moe_layer_freq", 1, MAX_LAYERS, 1))
    fields.choice("scoring_func", {"softmax": True}, True)
    return fields.raw("n_routed_experts") is not None and index >= first and index % every == 0


def _deepseek_shared(fields: Fields) -> int | None:
    count = fields.integer("n_shared_experts", 1, MAX_EXPERTS, None)
    return None if count is None else int(count * fields.integer("moe_intermediate_size", 1, MAX_WIDTH, 1407))


DEEPSEEK: Final = Family(
    model_types=("deepseek",),
    decoder=Decoder(
        qkv_bias=Key("attention_bias", False),
        o_bias=Key("attention_bias", False),
        max_position=2048,
        experts=Experts(
            count=Key("n_routed_experts"),
            top_k=Key("num_experts_per_tok"),
            width=Key("moe_intermediate_size", 1407),
            normalize=Key("norm_topk_prob", False),
            scale=Key("routed_scaling_factor", 1.0),
            shared_width=_deepseek_shared,
            at=_deepseek_at,
        ),
    ),
    names={
        **NAMES,
        **_EXPERT,
        **_shared_names("model.layers.{}.mlp.shared_experts"),
        "layers.{}.mlp.router": "model.layers.{}.mlp.gate",
    },
    harmless=HARMLESS | {"pretraining_tp", "aux_loss_alpha", "seq_aux"},
    stale=("rotary_emb.inv_freq",),
)
