"""Decoder-only transformers as a table: what differs between families is a field, read with the names each one uses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Literal

from pyruntime.checkpoint.families.experts import Experts
from pyruntime.checkpoint.families.keys import Key
from pyruntime.checkpoint.families.rope import RopeKeys, rope_from
from pyruntime.checkpoint.fields import Fields
from pyruntime.errors import UsageError
from pyruntime.spec import (
    MLP,
    Activation,
    Attention,
    Embedding,
    Head,
    Layer,
    Linear,
    ModelSpec,
    MoE,
    Norm,
    NormKind,
    RopeKind,
)
from pyruntime.spec.bounds import MAX_HEAD_DIM, MAX_HEADS, MAX_LAYERS, MAX_POSITION, MAX_VOCAB, MAX_WIDTH

ACTIVATIONS: Final = {
    "silu": Activation.SILU,
    "swish": Activation.SILU,
    "gelu": Activation.GELU,
    "gelu_new": Activation.GELU_TANH,
    "gelu_fast": Activation.GELU_TANH,
    "gelu_pytorch_tanh": Activation.GELU_TANH,
    "relu": Activation.RELU,
    "relu2": Activation.RELU2,
}
_ROPE: Final = RopeKeys()
_NORM_EPS: Final = Key("rms_norm_eps", 1e-6)
_ACTIVATION: Final = Key("hidden_act", Activation.SILU)
# of all layers together: names are made of them before the files are opened
_MAX_EXPERTS_IN_ALL: Final = 1 << 16
_SLIDING: Final = {"sliding_attention": True, "full_attention": False}


@dataclass(frozen=True, slots=True)
class Window:
    """Sliding-window attention: which layers slide, and how wide the window is where `size` is not null.

    `slides` tells the layers apart; where `listed`, `layer_types` may list them, and a layer that slides needs a size.
    Without the key `switch` being true there is no window.
    """

    size: Key
    slides: Callable[[Fields, int], bool] = lambda fields, index: True
    listed: bool = False
    switch: str | None = None

    def at(self, fields: Fields, index: int) -> tuple[bool, int | None]:
        """Whether layer `index` slides, and the positions that it then sees, the current one included; None: all."""
        on = self.switch is None or fields.boolean(self.switch, False)
        kinds = fields.raw("layer_types") if self.listed else None
        slides = on and self.slides(fields, index) if kinds is None else _slides(kinds, fields, index)
        size: int | None = None
        if fields.optional(self.size.name, self.size.default) is not None and on:
            size = fields.integer(self.size.name, 1, MAX_POSITION, self.size.default)
        if self.listed and slides and size is None:
            raise UsageError(
                "CONFIG", f"config.json: {self.size.name} is null; layer {index} slides and needs a number"
            )
        return slides, size if slides else None


def _slides(kinds: Any, fields: Fields, index: int) -> bool:
    num_layers = fields.raw("num_hidden_layers")
    if not isinstance(kinds, list) or len(kinds) != num_layers:
        raise UsageError("CONFIG", f"config.json: layer_types is no list of {num_layers} names, one per layer")
    name = f"layer_types[{index}]"
    return bool(Fields({name: kinds[index]}).choice(name, _SLIDING))


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoder:
    """How a family builds its decoder. A `Key` is read from config.json; anything else holds for all its models.

    `norm` is the kind of every norm but those of q and k, which span a head, or all of them where `qk_norm` is "all";
    `head_dim` is the size of a head where the configuration does not say it (None: hidden_size / num_attention_heads);
    `softcap` and `head_softcap` as in the specification; `score_scale` is s for scores times s^-1/2 (None: the size of
    a head), or a function of fields, layer and size of a head that gives the factor itself. `scaled_embedding`
    multiplies the embedding by the square root of its width. `ffn_multiple` is the width of an MLP, in widths of the
    stream, where the configuration does not say it. `context` is the key of the longest context. `refused` are keys
    that are not supported unless they are null or false.
    """

    norm: NormKind = NormKind.RMS
    norm_eps: Key = _NORM_EPS
    norm_bias: bool = False
    gated: bool = True
    activation: Key = _ACTIVATION
    qkv_bias: bool | Key = False
    o_bias: bool | Key = False
    mlp_bias: bool | Key = False
    qk_norm: bool | Literal["all"] = False
    pre_norms: bool = True
    sub_norms: bool = False
    post_norms: bool = False
    parallel: bool | Key = False
    head_dim: int | None = None
    rope: RopeKeys | None = _ROPE
    alibi: bool = False
    learned_positions: bool = False
    window: Window | None = None
    score_scale: Key | Callable[[Fields, int, int], float] | None = None
    softcap: Key | None = None
    head_softcap: Key | None = None
    scaled_embedding: bool = False
    tied: bool = False
    ffn_multiple: int | None = None
    experts: Experts | None = None
    context: str = "max_position_embeddings"
    max_position: int | None = None
    refused: tuple[str, ...] = ()

    def spec(self, fields: Fields, family: str) -> ModelSpec:
        """The specification that `fields` describe. Raises UsageError CONFIG."""
        for name in self.refused:
            if fields.raw(name, False) is not False:
                raise UsageError("CONFIG", f"config.json: {name} is {str(fields.raw(name))[:80]}; not supported")
        if not fields.boolean("is_causal", True):
            raise UsageError("CONFIG", "config.json: is_causal is false; only causal decoders are supported")
        hidden_size = fields.integer("hidden_size", 1, MAX_WIDTH)
        vocab_size = fields.integer("vocab_size", 1, MAX_VOCAB)
        required = () if self.max_position is None else (self.max_position,)
        max_position = fields.integer(self.context, 1, MAX_POSITION, *required)
        num_layers = fields.integer("num_hidden_layers", 1, MAX_LAYERS)
        head_dim = self._head_dim(fields, hidden_size)
        # the model's own values must be right even where every layer has another one
        fields.integer("num_key_value_heads", 1, MAX_HEADS, None)
        fields.integer("intermediate_size", 1, MAX_WIDTH, None)
        layers = tuple(
            self._layer(fields.layer(index), index, hidden_size, head_dim, max_position) for index in range(num_layers)
        )
        _check_experts(layers)
        return ModelSpec(
            family=family,
            embedding=Embedding(
                vocab_size=vocab_size,
                size=hidden_size,
                scale=hidden_size**0.5 if self.scaled_embedding else 1.0,
                positions=max_position if self.learned_positions else None,
            ),
            layers=layers,
            final_norm=self._norm(fields, hidden_size),
            head=Head(
                linear=Linear(in_features=hidden_size, out_features=vocab_size),
                tied=fields.boolean("tie_word_embeddings", self.tied),
                softcap=_positive(fields, self.head_softcap),
            ),
            max_position=min((max_position, *_trained_contexts(layers))),
        )

    def _layer(self, fields: Fields, index: int, hidden_size: int, head_dim: int, max_position: int) -> Layer:
        return Layer(
            index=index,
            attention=self._attention(fields, index, hidden_size, head_dim, max_position),
            mlp=self._mlp(fields, index, hidden_size),
            parallel=_flag(fields, self.parallel),
        )

    def _head_dim(self, fields: Fields, hidden_size: int) -> int:
        """Size of a head where no layer says otherwise; a layer that lost heads keeps the size of the others."""
        found: int | None = fields.integer("head_dim", 1, MAX_HEAD_DIM, self.head_dim)
        if found is not None:
            return found
        num_heads = fields.integer("num_attention_heads", 1, MAX_HEADS)
        if hidden_size % num_heads:
            raise UsageError(
                "CONFIG",
                f"config.json: hidden_size {hidden_size} is no multiple of num_attention_heads {num_heads}; "
                "add head_dim",
            )
        return int(hidden_size // num_heads)

    def _attention(
        self, fields: Fields, index: int, hidden_size: int, default_head_dim: int, max_position: int
    ) -> Attention:
        num_heads = fields.integer("num_attention_heads", 1, MAX_HEADS)
        num_kv_heads = fields.integer("num_key_value_heads", 1, MAX_HEADS, None) or num_heads
        head_dim = fields.integer("head_dim", 1, MAX_HEAD_DIM, None) or default_head_dim
        bias = _flag(fields, self.qkv_bias)
        slides, window = (False, None) if self.window is None else self.window.at(fields, index)

        def project(heads: int) -> Linear:
            return Linear(in_features=hidden_size, out_features=heads * head_dim, bias=bias)

        rope = None
        if self.rope is not None:
            rope = rope_from(fields, self.rope, head_dim, max_position, sliding=slides)
        return Attention(
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            q=project(num_heads),
            k=project(num_kv_heads),
            v=project(num_kv_heads),
            o=Linear(in_features=num_heads * head_dim, out_features=hidden_size, bias=_flag(fields, self.o_bias)),
            scale=self._scale(fields, index, head_dim),
            rope=rope,
            alibi=self.alibi,
            window=window,
            softcap=_positive(fields, self.softcap),
            q_norm=self._qk_norm(fields, num_heads, head_dim),
            k_norm=self._qk_norm(fields, num_kv_heads, head_dim),
            pre=self._norm(fields, hidden_size) if self.pre_norms else None,
            sub=self._norm(fields, num_heads * head_dim) if self.sub_norms else None,
            post=self._norm(fields, hidden_size) if self.post_norms else None,
        )

    def _scale(self, fields: Fields, index: int, head_dim: int) -> float:
        match self.score_scale:
            case None:
                return float(head_dim**-0.5)
            case Key(name, default):
                return float(fields.real(name, 0.0, 1e6, default) ** -0.5)
            case given:
                return given(fields, index, head_dim)

    def _qk_norm(self, fields: Fields, num_heads: int, head_dim: int) -> Norm | None:
        if not self.qk_norm:
            return None
        size = num_heads * head_dim if self.qk_norm == "all" else head_dim
        return Norm(kind=self.norm, size=size, eps=self._eps(fields))

    def _mlp(self, fields: Fields, index: int, hidden_size: int) -> MLP | MoE:
        activation = fields.choice(self.activation.name, ACTIVATIONS, self.activation.default)
        if self.experts is not None and self.experts.at(fields, index):
            return self.experts.moe(fields, hidden_size, activation, self._norm(fields, hidden_size))
        ffn_size = self._ffn_size(fields, hidden_size)
        bias = _flag(fields, self.mlp_bias)
        widen = Linear(in_features=hidden_size, out_features=ffn_size, bias=bias)
        return MLP(
            gate=widen if self.gated else None,
            up=widen,
            down=Linear(in_features=ffn_size, out_features=hidden_size, bias=bias),
            activation=activation,
            pre=self._norm(fields, hidden_size) if self.pre_norms else None,
            sub=self._norm(fields, ffn_size) if self.sub_norms else None,
            post=self._norm(fields, hidden_size) if self.post_norms else None,
        )

    def _ffn_size(self, fields: Fields, hidden_size: int) -> int:
        if self.ffn_multiple is None:
            return int(fields.integer("intermediate_size", 1, MAX_WIDTH))
        return int(fields.integer("intermediate_size", 1, MAX_WIDTH, None) or self.ffn_multiple * hidden_size)

    def _norm(self, fields: Fields, size: int) -> Norm:
        return Norm(kind=self.norm, size=size, eps=self._eps(fields), bias=self.norm_bias)

    def _eps(self, fields: Fields) -> float:
        return float(fields.real(self.norm_eps.name, 0.0, 1.0, self.norm_eps.default))


def _flag(fields: Fields, value: bool | Key) -> bool:
    return value if isinstance(value, bool) else bool(fields.boolean(value.name, value.default))


def _positive(fields: Fields, key: Key | None) -> float | None:
    """A number above 0, or None where there is no such key or it is null."""
    if key is None or fields.optional(key.name, key.default) is None:
        return None
    return float(fields.real(key.name, 0.0, 1e6, key.default))


def _check_experts(layers: tuple[Layer, ...]) -> None:
    count = sum(layer.mlp.num_experts for layer in layers if isinstance(layer.mlp, MoE))
    if count > _MAX_EXPERTS_IN_ALL:
        raise UsageError(
            "CONFIG", f"config.json: {count} experts in all layers; at most {_MAX_EXPERTS_IN_ALL} are supported"
        )


def _trained_contexts(layers: tuple[Layer, ...]) -> set[int]:
    """Contexts beyond which `longrope` would change to other frequencies, under keys that are cached already."""
    ropes = [each.attention.rope for each in layers if isinstance(each.attention, Attention)]
    return {
        rope.original_max_position
        for rope in ropes
        if rope is not None and rope.kind is RopeKind.LONGROPE and rope.original_max_position is not None
    }
