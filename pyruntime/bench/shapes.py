"""Shapes of published models: their dimensions without their weights, one JSON file each in model_shapes/."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

from pyruntime.checkpoint.strict_json import read_object
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
    Norm,
    NormKind,
    Rope,
    RopeKind,
)
from pyruntime.spec.bounds import (
    MAX_HEAD_DIM,
    MAX_HEADS,
    MAX_LAYERS,
    MAX_POSITION,
    MAX_VOCAB,
    MAX_WIDTH,
    check_bool,
    check_int,
)

_FOLDER: Final = Path(__file__).parent / "model_shapes"
_INTEGERS: Final = {
    "hidden_size": MAX_WIDTH,
    "ffn_size": MAX_WIDTH,
    "num_layers": MAX_LAYERS,
    "num_heads": MAX_HEADS,
    "num_kv_heads": MAX_HEADS,
    "head_dim": MAX_HEAD_DIM,
    "vocab_size": MAX_VOCAB,
    "max_position": MAX_POSITION,
}
_BOOLEANS: Final = ("tied_head", "gated", "qkv_bias", "bias", "parallel")


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A model whose layers are all alike. `source` is the Hub id of the configuration that the figures were taken from.

    `bias`: every linear map but the head, and every norm, has one; `qkv_bias`: q, k and v alone. `parallel`: attention
    and MLP read the same stream. `window`: positions that an attention sees, where the configuration limits them.
    """

    source: str
    family: str
    hidden_size: int
    ffn_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_position: int
    tied_head: bool
    norm: NormKind
    norm_eps: float
    activation: Activation
    gated: bool
    rope: Rope
    qkv_bias: bool = False
    bias: bool = False
    parallel: bool = False
    window: int | None = None

    def __post_init__(self) -> None:
        # the specification checks what is left; arithmetic comes before that
        for name, limit in _INTEGERS.items():
            check_int(name, getattr(self, name), 1, limit)
        for name in _BOOLEANS:
            check_bool(name, getattr(self, name))
        for name in ("source", "family"):
            if not isinstance(getattr(self, name), str):
                raise UsageError("SHAPE", f"{name} is {getattr(self, name)!r}; expected text")

    def spec(self) -> ModelSpec:
        """The specification of a model of this shape."""
        head = Linear(in_features=self.hidden_size, out_features=self.vocab_size)
        return ModelSpec(
            family=self.family,
            embedding=Embedding(vocab_size=self.vocab_size, size=self.hidden_size),
            layers=tuple(
                Layer(index=i, attention=self._attention(), mlp=self._mlp(), parallel=self.parallel)
                for i in range(self.num_layers)
            ),
            final_norm=self._norm(),
            head=Head(linear=head, tied=self.tied_head),
            max_position=self.max_position,
        )

    def _attention(self) -> Attention:
        q_size, kv_size = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        bias = self.bias or self.qkv_bias
        kv = Linear(in_features=self.hidden_size, out_features=kv_size, bias=bias)
        return Attention(
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            q=Linear(in_features=self.hidden_size, out_features=q_size, bias=bias),
            k=kv,
            v=kv,
            o=Linear(in_features=q_size, out_features=self.hidden_size, bias=self.bias),
            scale=self.head_dim**-0.5,
            rope=self.rope,
            window=self.window,
            pre=self._norm(),
        )

    def _mlp(self) -> MLP:
        widen = Linear(in_features=self.hidden_size, out_features=self.ffn_size, bias=self.bias)
        return MLP(
            gate=widen if self.gated else None,
            up=widen,
            down=Linear(in_features=self.ffn_size, out_features=self.hidden_size, bias=self.bias),
            activation=self.activation,
            pre=self._norm(),
        )

    def _norm(self) -> Norm:
        return Norm(kind=self.norm, size=self.hidden_size, eps=self.norm_eps, bias=self.bias)


def shape_names() -> tuple[str, ...]:
    """Names of the shapes that ship with the package, in alphabetical order."""
    return tuple(sorted(path.stem for path in _FOLDER.glob("*.json")))


def shape_spec(name: str) -> ModelSpec:
    """The specification of the shape called `name`. Raises UsageError SHAPE for a name that is not there."""
    if name not in shape_names():
        raise UsageError("SHAPE", f"shape {name!r} does not exist; expected one of {', '.join(shape_names())}")
    path = _FOLDER / f"{name}.json"
    try:
        return parse_shape(read_object(path, "SHAPE")).spec()
    except UsageError as error:
        raise UsageError("SHAPE", f"{path.name}: {error}") from None


def parse_shape(data: Mapping[str, Any]) -> Shape:
    """The shape in `data`. Raises UsageError SHAPE for an unknown or missing key, SPEC for a value out of bounds."""
    _check_keys(Shape, data, "a shape")
    rope = data["rope"]
    if not isinstance(rope, Mapping):
        raise UsageError("SHAPE", f"rope is {rope!r}; expected an object")
    _check_keys(Rope, rope, "rope")
    known = {
        "norm": _member(NormKind, data["norm"], "norm"),
        "activation": _member(Activation, data["activation"], "activation"),
        "rope": Rope(**{**rope, "kind": _member(RopeKind, rope["kind"], "rope kind")}),
    }
    return Shape(**{**data, **known})


def _check_keys(kind: type[Shape | Rope], data: Mapping[str, Any], where: str) -> None:
    names = {field.name: field.default is MISSING for field in fields(kind)}
    unknown = sorted(set(data) - set(names))
    if unknown:
        raise UsageError("SHAPE", f"{where} has the unknown keys {unknown}; expected {', '.join(names)}")
    missing = [name for name, required in names.items() if required and name not in data]
    if missing:
        raise UsageError("SHAPE", f"{where} lacks {', '.join(missing)}; add them")


def _member(kind: type[StrEnum], value: Any, where: str) -> StrEnum:
    if value not in [member.value for member in kind]:
        raise UsageError("SHAPE", f"{where} is {value!r}; expected one of {', '.join(kind)}")
    return kind(value)
