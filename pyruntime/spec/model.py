"""What a model is: layers whose missing sublayers are simply None. Pure data, no weights, no torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from pyruntime.spec.attention import Attention
from pyruntime.spec.bounds import (
    MAX_EXPERTS,
    MAX_LAYERS,
    MAX_POSITION,
    MAX_VOCAB,
    check_bool,
    check_int,
    check_kind,
    check_real,
    require,
)
from pyruntime.spec.parts import Activation, Linear, Norm


@dataclass(frozen=True, slots=True, kw_only=True)
class MLP:
    """down(act(gate x) * up x), or down(act(up x)) where `gate` is None; `sub` norms the input of `down`.

    `shortcut` as in Attention.
    """

    gate: Linear | None
    up: Linear
    down: Linear
    activation: Activation
    pre: Norm | None = None
    sub: Norm | None = None
    post: Norm | None = None
    residual: bool = True
    shortcut: Linear | None = None

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
    shortcut: Linear | None = None

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


@dataclass(frozen=True, slots=True, kw_only=True)
class MoE:
    """A mixture of experts: the `top_k` experts with the largest softmax(router x), each weighted by its probability.

    Every expert is alike and has the parts of an MLP. `normalize` divides the chosen probabilities by their sum;
    `routed_scale` multiplies them afterwards. `shared` is an MLP that every token passes, times sigmoid(shared_gate x)
    where there is such a gate.
    """

    num_experts: int
    top_k: int
    router: Linear
    gate: Linear
    up: Linear
    down: Linear
    activation: Activation
    normalize: bool = True
    routed_scale: float = 1.0
    shared: MLP | None = None
    shared_gate: Linear | None = None
    pre: Norm | None = None
    post: Norm | None = None
    residual: bool = True
    shortcut: Linear | None = None

    def __post_init__(self) -> None:
        check_int("moe num_experts", self.num_experts, 1, MAX_EXPERTS)
        check_int("moe top_k", self.top_k, 1, self.num_experts)
        check_kind("moe activation", self.activation, Activation)
        check_bool("moe normalize", self.normalize)
        check_real("moe routed_scale", self.routed_scale, 0.0, 1e6)
        check_bool("moe residual", self.residual)
        width = self.gate.in_features
        ffn = self.gate.out_features
        maps = {"up": (self.up, width, ffn), "down": (self.down, ffn, width)}
        maps["router"] = (self.router, width, self.num_experts)
        if self.shared_gate is not None:
            maps["shared_gate"] = (self.shared_gate, width, 1)
        for name, (linear, inputs, outputs) in maps.items():
            require(
                (linear.in_features, linear.out_features) == (inputs, outputs),
                f"moe {name} is {linear.out_features}x{linear.in_features}; expected {outputs}x{inputs}",
            )
        require(self.shared is not None or self.shared_gate is None, "moe shared_gate has no shared MLP")
        if self.shared is not None:
            widths = (self.shared.in_size, self.shared.out_size)
            require(widths == (width, width), f"moe shared maps {widths[0]} values to {widths[1]}; expected {width}")
            own = (self.shared.pre, self.shared.post, self.shared.shortcut)
            require(own == (None, None, None), "moe shared has norms or a shortcut; they belong to the whole")

    @property
    def in_size(self) -> int:
        """Width of the input."""
        return self.gate.in_features

    @property
    def out_size(self) -> int:
        """Width of the output."""
        return self.down.out_features


Sublayer = Attention | MLP | MoE | Replacement


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One decoder layer under its original number; a dropped sublayer is None.

    `parallel` layers feed attention and MLP the same input and add up what comes out, and the input itself where they
    have residuals (GPT-NeoX); serial ones feed one into the other.
    """

    index: int
    attention: Attention | Replacement | None
    mlp: MLP | MoE | Replacement | None
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
            _check_residual(where, sublayer)
            require(
                not self.parallel or sublayer.shortcut is None, f"{where} is parallel and has a shortcut; not supported"
            )
        found = [sublayer for _, sublayer in self.sublayers()]
        require(
            not self.parallel or len({(each.residual, each.out_size) for each in found}) < 2,
            f"layer {self.index} is parallel; its sublayers must both have residuals, or neither, and be equally wide",
        )

    def sublayers(self) -> Iterator[tuple[str, Sublayer]]:
        """The sublayers that exist, in order, as ("attention" | "mlp", sublayer)."""
        if self.attention is not None:
            yield "attention", self.attention
        if self.mlp is not None:
            yield "mlp", self.mlp


def _check_residual(where: str, sublayer: Sublayer) -> None:
    shortcut = sublayer.shortcut
    if shortcut is None:
        require(
            not sublayer.residual or sublayer.in_size == sublayer.out_size,
            f"{where} adds {sublayer.out_size} values to a stream of {sublayer.in_size}",
        )
        return
    require(sublayer.residual, f"{where} has a shortcut and no residual; a shortcut lies on the residual")
    require(
        (shortcut.in_features, shortcut.out_features) == (sublayer.in_size, sublayer.out_size),
        f"{where} shortcut is {shortcut.out_features}x{shortcut.in_features}; "
        f"the sublayer is {sublayer.out_size}x{sublayer.in_size}",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Embedding:
    """Token embedding table [vocab_size, size]; rows are multiplied by `scale`.

    `positions` is the number of rows of a second, learned table that adds a row for each position (GPT-2).
    """

    vocab_size: int
    size: int
    scale: float = 1.0
    positions: int | None = None

    def __post_init__(self) -> None:
        check_int("embedding vocab_size", self.vocab_size, 1, MAX_VOCAB)
        check_int("embedding size", self.size, 1, 1 << 20)
        check_real("embedding scale", self.scale, 0.0, 1e6)
        if self.positions is not None:
            check_int("embedding positions", self.positions, 1, MAX_POSITION)


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """Last linear map to the vocabulary; a `tied` head uses the embedding table. `softcap` as in Attention."""

    linear: Linear
    tied: bool
    softcap: float | None = None

    def __post_init__(self) -> None:
        check_bool("head tied", self.tied)
        require(not (self.tied and self.linear.triangular), "a tied head uses the embedding, which is not triangular")
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
        known = self.embedding.positions
        require(
            known is None or self.max_position <= known, f"max_position is {self.max_position}; {known} are embedded"
        )
        width = self.embedding.size
        for position, layer in enumerate(self.layers):
            require(layer.index == position, f"layer {layer.index} stands at place {position}")
            entry = width
            for kind, sublayer in layer.sublayers():
                expected = entry if layer.parallel else width
                require(
                    sublayer.in_size == expected,
                    f"layer {position} {kind} reads {sublayer.in_size} values; the stream has {expected}",
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
