"""The transformers model that computes what a pyruntime Model computes, from the same weights, without a third copy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import nn
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from pyruntime.checkpoint import Model
from pyruntime.checkpoint.families import FAMILIES
from pyruntime.checkpoint.families.decoder import ACTIVATIONS
from pyruntime.errors import UsageError
from pyruntime.spec import MLP, Attention, ModelSpec, RopeKind

_CLASSES: Final[Mapping[str, tuple[Any, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "gpt_neox": (GPTNeoXConfig, GPTNeoXForCausalLM),
}
_ROPES: Final = (RopeKind.DEFAULT, RopeKind.LINEAR, RopeKind.LLAMA3)


class MlpLayer(nn.Module):
    """What is left of a decoder layer without its attention: no norm, no projection, no cache and no time for it."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.post_attention_layernorm = layer.post_attention_layernorm
        self.mlp = layer.mlp

    def forward(self, hidden_states: torch.Tensor, **_: Any) -> torch.Tensor:
        """The MLP and the residual add; masks, positions and cache are for layers with an attention."""
        result: torch.Tensor = hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))
        return result


def twin(model: Model, dtype: torch.dtype) -> Any:
    """The transformers model of `model`, in `dtype`, ready to run.

    It is made without memory and filled tensor by tensor. Attentions that `model` goes without are taken out as a user
    of eager transformers would do it: the layer keeps its MLP alone, and the others are numbered anew, so that position
    0 of the cache belongs to an attention that exists. Raises UsageError PEER for what transformers cannot express.
    """
    config = config_of(model.dense_spec)
    with torch.device("meta"):
        found = _CLASSES[model.spec.family][1]._from_config(config, dtype=dtype)
    _take_out(found, model.spec)
    for name, tensor in _tensors(model, dtype):
        _put(found, name, tensor)
    if model.spec.head.tied:
        found.tie_weights()
    # its frequencies are no weights, so they were made without memory too
    found.base_model.rotary_emb = type(found.base_model.rotary_emb)(config)
    left = [name for name, each in (*found.named_parameters(), *found.named_buffers()) if each.is_meta]
    if left:
        raise UsageError(
            "PEER", f"the model has no values for {', '.join(left[:3])} of transformers' {config.model_type}"
        )
    return found.eval()


def config_of(spec: ModelSpec) -> Any:
    """transformers' configuration of a dense `spec` whose layers are alike. Raises UsageError PEER."""
    if spec.family not in _CLASSES:
        raise UsageError(
            "PEER", f"family {spec.family!r} has no transformers twin here; use one of {', '.join(_CLASSES)}"
        )
    attention, mlp = spec.layers[0].attention, spec.layers[0].mlp
    alike = all((each.attention, each.mlp) == (attention, mlp) for each in spec.layers)
    if not alike or not isinstance(attention, Attention) or not isinstance(mlp, MLP) or spec.final_norm is None:
        raise UsageError("PEER", "the twin needs a model whose dense layers are all alike; use another model")
    values: dict[str, Any] = {
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.embedding.size,
        "intermediate_size": mlp.down.in_features,
        "num_hidden_layers": len(spec.layers),
        "num_attention_heads": attention.num_heads,
        "hidden_act": next(name for name, kind in ACTIVATIONS.items() if kind is mlp.activation),
        "max_position_embeddings": spec.max_position,
        "tie_word_embeddings": spec.head.tied,
        "rope_parameters": _rope(attention),
        "pad_token_id": None,
    }
    if spec.family == "gpt_neox":
        values |= {"layer_norm_eps": spec.final_norm.eps, "use_parallel_residual": spec.layers[0].parallel}
    else:
        values |= {"rms_norm_eps": spec.final_norm.eps, "num_key_value_heads": attention.num_kv_heads}
        values |= {"head_dim": attention.head_dim}
    if spec.family == "llama":
        values |= {"attention_bias": attention.q is not None and attention.q.bias, "mlp_bias": mlp.up.bias}
    if spec.family == "mistral":
        values |= {"sliding_window": attention.window}
    return _CLASSES[spec.family][0](**values)


def _rope(attention: Attention) -> dict[str, Any]:
    rope = attention.rope
    if rope is None or rope.kind not in _ROPES:
        raise UsageError("PEER", f"rope {rope and rope.kind} has no twin here; expected one of {', '.join(_ROPES)}")
    values: dict[str, Any] = {"rope_type": rope.kind.value, "rope_theta": rope.theta}
    if rope.kind is not RopeKind.DEFAULT:
        values["factor"] = rope.factor
    if rope.kind is RopeKind.LLAMA3:
        values["low_freq_factor"] = rope.low_freq_factor
        values["high_freq_factor"] = rope.high_freq_factor
        values["original_max_position_embeddings"] = rope.original_max_position
    return (
        {**values, "partial_rotary_factor": rope.dim / attention.head_dim} if rope.dim < attention.head_dim else values
    )


def _take_out(found: Any, spec: ModelSpec) -> None:
    if spec.dropped("mlp"):
        raise UsageError(
            "PEER", f"MLPs {list(spec.dropped('mlp'))} are dropped; the twin can go without attentions only"
        )
    layers = found.base_model.layers
    for slot, (index, _) in enumerate(spec.attentions()):
        attention = layers[index].attention if spec.family == "gpt_neox" else layers[index].self_attn
        attention.layer_idx = slot
    for index in spec.dropped("attention"):
        layers[index] = MlpLayer(layers[index])


def _tensors(model: Model, dtype: torch.dtype) -> Any:
    """(transformers' name, values) of every weight, one at a time."""
    family = FAMILIES[model.spec.family]
    for name, weight in model.weights.items():
        parts, _ = family.fused_with(name)
        if name == parts[0]:
            values = [weight.read(), *(model.weights[part].read() for part in parts[1:])]
            tensor = values[0] if len(values) == 1 else _interleaved(values, model.spec)
            # the checkpoints' name of GPT-NeoX's head is not the class's
            yield family.tensor_name(name).replace("embed_out.", "lm_head."), tensor.to(dtype)


def _interleaved(qkv: list[torch.Tensor], spec: ModelSpec) -> torch.Tensor:
    """GPT-NeoX stores q, k and v of one head after the other."""
    (_, attention), *_ = spec.attentions()
    heads = [each.reshape(attention.num_heads, attention.head_dim, *each.shape[1:]) for each in qkv]
    return torch.cat(heads, dim=1).reshape(-1, *qkv[0].shape[1:])


def _put(found: Any, name: str, tensor: torch.Tensor) -> None:
    module, _, role = name.rpartition(".")
    owner = found.get_submodule(module)
    if owner._parameters.get(role) is None or owner._parameters[role].shape != tensor.shape:
        raise UsageError(
            "PEER", f"transformers has no {name} of shape {tuple(tensor.shape)}; the twin is not the same model"
        )
    owner._parameters[role] = nn.Parameter(tensor, requires_grad=False)
