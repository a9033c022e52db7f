"""What a model is: layers whose missing sublayers are simply None. Pure data, no weights, no torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from pyruntime.spec.bounds import (
    MAX_HEAD_DIM,
    MAX_HEADS,
    MAX_LAYERS,
    MAX_POSITION,
    MAX_VOCAB,
    check_bool,
    check_int,
    check_kind,
    check_real,
    require,
)
from pyruntime.spec.parts import Activation, Linear, Norm, Rope


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """Causal self-attention with its norms. A projection that is None was merged away: its input is used as it is.

    `pre` norms the input, `sub` the values before the output projection, `post` the output before the residual add.
    `q_norm` and `k_norm` are per head when their size is `head_dim`, else over all heads together. `window` keeps the
    last `window` positions, the current one included; `softcap` c maps scores s to c * tanh(s / c).
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    q: Linear | None
    k: Linear | None
    v: Linear | None
    o: Linear | None
    scale: float
    rope: Rope | None = None
    window: int | None = None
    softcap: float | None = None
    q_norm: Norm | None = None
    k_norm: Norm | None = None
    pre: Norm | None = None
    sub: Norm | None = None
    post: Norm | None = None
    residual: bool = True

    def __post_init__(self) -> None:
        check_int("attention num_heads", self.num_heads, 1, MAX_HEADS)
        check_int("attention num_kv_heads", self.num_kv_heads, 1, self.num_heads)
        check_int("attention head_dim", self.head_dim, 1, MAX_HEAD_DIM)
        require(
            self.num_heads % self.num_kv_heads == 0,
            f"attention num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}",
        )
        check_real("attention scale", self.scale, 0.0, 1e6)
        check_bool("attention residual", self.residual)
        if self.window is not None:
            check_int("attention window", self.window, 1, MAX_POSITION)
        if self.softcap is not None:
            check_real("attention softcap", self.softcap, 0.0, 1e6)
        if self.rope is not None:
            require(
                self.rope.dim <= self.head_dim,
                f"rope dim {self.rope.dim} is larger than head_dim {self.head_dim}",
            )
        self._check_widths()

    def _check_widths(self) -> None:
        wanted = {"q": self.q_size, "k": self.kv_size, "v": self.kv_size}
        for name, width in wanted.items():
            linear: Linear | None = getattr(self, name)
            found = self.in_size if linear is None else linear.out_features
            require(found == width, f"attention {name} gives {found} values; its heads need {width}")
            require(
                linear is None or linear.in_features == self.in_size,
                f"attention {name} reads {linear and linear.in_features} values; the others read {self.in_size}",
            )
        if self.o is not None:
            require(
                self.o.in_features == self.q_size,
                f"attention o reads {self.o.in_features} values; the heads give {self.q_size}",
            )
        for name, num_heads in (("q_norm", self.num_heads), ("k_norm", self.num_kv_heads)):
            norm: Norm | None = getattr(self, name)
            require(
                norm is None or norm.size in (self.head_dim, num_heads * self.head_dim),
                f"attention {name} spans {norm and norm.size} values; expected head_dim {self.head_dim} or all heads",
            )
        require(
            self.sub is None or self.sub.size == self.q_size,
            f"attention sub norm spans {self.sub and self.sub.size} values; the heads give {self.q_size}",
        )

    @property
    def in_size(self) -> int:
        """Width of the input."""
        known = next((p for p in (self.q, self.k, self.v) if p is not None), None)
        return self.q_size if known is None else known.in_features

    @property
    def out_size(self) -> int:
        """Width of the output."""
        return self.q_size if self.o is None else self.o.out_features

    @property
    def q_size(self) -> int:
        """Width of all query heads together."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of all key heads together, and of all value heads together."""
        return self.num_kv_heads * self.head_dim


@dataclass(frozen=True, slots=True, kw_only=True)
class MLP:
    """down(act(gate x) * up x), or down(act(up x)) where `gate` is None; `sub` norms the input of `down`."""

    gate: Linear | None
    up: Linear
    down: Linear
    activation: Activation
    pre: Norm | None = None
    sub: Norm | None = None
    post: Norm | None = None
    residual: bool = True

    def __post_init__(self) -> None:
        check_kind("mlp activation", self.activation, Activation)
        check_bool("mlp residual", self.residual)
        if self.gate is not None:
            require(
                (self.gate.in_features, self.gate.out_features) == (self.up.in_features, self.up.out_features),
                f"mlp gate is {self.gate.out_features}x{self.gate.in_features}; "
                f"up is {self.up.out_features}x{self.up.in_features}; they must be alike",
            )
        require(
            self.down.in_features == self.up.out_features,
            f"mlp down reads {self.down.in_features} values; up gives {self.up.out_features}",
        )
        require(
            self.sub is None or self.sub.size == self.down.in_features,
            f"mlp sub norm spans {self.sub and self.sub.size} values; down reads {self.down.in_features}",
        )

    @property
    def in_size(self) -> int:
        """Width of the input."""
        return self.up.in_features

    @property
    def out_size(self) -> int:
        """Width of the output."""
        return self.down.out_features


@dataclass(frozen=True, slots=True, kw_only=True)
class Replacement:
    """One linear map in place of a whole sublayer (`replace_with_linear` of Nemotron-NAS): no scores, no KV cache."""

    linear: Linear
    pre: Norm | None = None
    post: Norm | None = None
    residual: bool = True

    def __post_init__(self) -> None:
        check_bool("replacement residual", self.residual)

    @property
    def in_size(self) -> int:
        """Width of the input."""
        return self.linear.in_features

    @property
    def out_size(self) -> int:
        """Width of the output."""
        return self.linear.out_features


Sublayer = Attention | MLP | Replacement


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One decoder layer under its original number; a dropped sublayer is None.

    `parallel` layers add attention and MLP to the same input (GPT-NeoX); serial ones feed one into the other.
    """

    index: int
    attention: Attention | Replacement | None
    mlp: MLP | Replacement | None
    parallel: bool = False

    def __post_init__(self) -> None:
        check_int("layer index", self.index, 0, MAX_LAYERS - 1)
        check_bool("layer parallel", self.parallel)
        for kind, sublayer in self.sublayers():
            where = f"layer {self.index} {kind}"
            for place in ("pre", "post"):
                norm: Norm | None = getattr(sublayer, place)
                width = sublayer.in_size if place == "pre" else sublayer.out_size
                require(norm is None or norm.size == width, f"{where} {place} norm does not span its {width} values")
            require(
                not sublayer.residual or sublayer.in_size == sublayer.out_size,
                f"{where} adds {sublayer.out_size} values to a stream of {sublayer.in_size}",
            )
            require(not self.parallel or sublayer.residual, f"{where} is parallel and has no residual; not supported")

    def sublayers(self) -> Iterator[tuple[str, Sublayer]]:
        """The sublayers that exist, in order, as ("attention" | "mlp", sublayer)."""
        if self.attention is not None:
            yield "attention", self.attention
        if self.mlp is not None:
            yield "mlp", self.mlp


@dataclass(frozen=True, slots=True, kw_only=True)
class Embedding:
    """Token embedding table [vocab_size, size]; rows are multiplied by `scale`."""

    vocab_size: int
    size: int
    scale: float = 1.0

    def __post_init__(self) -> None:
        check_int("embedding vocab_size", self.vocab_size, 1, MAX_VOCAB)
        check_int("embedding size", self.size, 1, 1 << 20)
        check_real("embedding scale", self.scale, 0.0, 1e6)


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """Last linear map to the vocabulary; a `tied` head uses the embedding table. `softcap` as in Attention."""

    linear: Linear
    tied: bool
    softcap: float | None = None

    def __post_init__(self) -> None:
        check_bool("head tied", self.tied)
        if self.softcap is not None:
            check_real("head softcap", self.softcap, 0.0, 1e6)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """A whole model. `max_position` is the longest context it was made for, in tokens."""

    family: str
    embedding: Embedding
    layers: tuple[Layer, ...]
    final_norm: Norm | None
    head: Head
    max_position: int

    def __post_init__(self) -> None:
        check_int("max_position", self.max_position, 1, MAX_POSITION)
        check_int("number of layers", len(self.layers), 1, MAX_LAYERS)
        width = self.embedding.size
        for position, layer in enumerate(self.layers):
            require(layer.index == position, f"layer {layer.index} stands at place {position}")
            for kind, sublayer in layer.sublayers():
                require(
                    sublayer.in_size == width,
                    f"layer {position} {kind} reads {sublayer.in_size} values; the stream has {width}",
                )
                width = sublayer.out_size
        require(
            self.final_norm is None or self.final_norm.size == width, f"the final norm does not span {width} values"
        )
        linear = self.head.linear
        require(linear.in_features == width, f"the head reads {linear.in_features} values; the stream has {width}")
        require(
            linear.out_features == self.embedding.vocab_size,
            f"the head gives {linear.out_features} logits; the vocabulary has {self.embedding.vocab_size}",
        )
        require(
            not self.head.tied or width == self.embedding.size, "a tied head needs a stream as wide as the embedding"
        )

    @property
    def vocab_size(self) -> int:
        """Number of rows of the embedding: the bound of every token id."""
        return self.embedding.vocab_size

    def attentions(self) -> tuple[tuple[int, Attention], ...]:
        """Kept attentions as (layer index, attention), in order; their position is their KV slot."""
        return tuple((each.index, each.attention) for each in self.layers if isinstance(each.attention, Attention))

    def dropped(self, kind: str) -> tuple[int, ...]:
        """Indices of the layers whose `kind` ("attention" or "mlp") is gone."""
        return tuple(layer.index for layer in self.layers if getattr(layer, kind) is None)
