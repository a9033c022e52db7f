"""The parts a sublayer is made of: linear maps, norms and rotary position embeddings, as frozen data."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from pyruntime.spec.bounds import (
    MAX_HEAD_DIM,
    MAX_POSITION,
    MAX_WIDTH,
    check_bool,
    check_int,
    check_kind,
    check_real,
    require,
)


class NormKind(StrEnum):
    """How a norm computes; `*_one_plus` multiply by (1 + weight)."""

    RMS = "rms"
    RMS_ONE_PLUS = "rms_one_plus"
    LAYER = "layer"
    LAYER_ONE_PLUS = "layer_one_plus"


class Activation(StrEnum):
    """Non-linearity of an MLP; relu2 is the square of relu."""

    SILU = "silu"
    GELU = "gelu"
    GELU_TANH = "gelu_tanh"
    RELU = "relu"
    RELU2 = "relu2"


class RopeKind(StrEnum):
    """How rotary frequencies are stretched for longer contexts."""

    DEFAULT = "default"
    LINEAR = "linear"
    DYNAMIC = "dynamic"
    LLAMA3 = "llama3"
    YARN = "yarn"
    LONGROPE = "longrope"


@dataclass(frozen=True, slots=True, kw_only=True)
class Linear:
    """y = x W^T (+ b), W stored as [out_features, in_features].

    A `triangular` map is square and zero above its diagonal: output i reads inputs 0 to i. Its rows are stored one
    after the other without the zeros, [n (n + 1) / 2].
    """

    in_features: int
    out_features: int
    bias: bool = False
    triangular: bool = False

    def __post_init__(self) -> None:
        check_int("linear in_features", self.in_features, 1, MAX_WIDTH)
        check_int("linear out_features", self.out_features, 1, MAX_WIDTH)
        check_bool("linear bias", self.bias)
        check_bool("linear triangular", self.triangular)
        require(
            not self.triangular or self.in_features == self.out_features,
            f"a triangular linear map is {self.out_features}x{self.in_features}; expected a square one",
        )

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Sizes of the stored weight."""
        n = self.in_features
        return (n * (n + 1) // 2,) if self.triangular else (self.out_features, n)


@dataclass(frozen=True, slots=True, kw_only=True)
class Norm:
    """A norm over the last `size` values; `weight` False is the weightless form, whose gain was folded away."""

    kind: NormKind
    size: int
    eps: float
    weight: bool = True
    bias: bool = False

    def __post_init__(self) -> None:
        check_kind("norm kind", self.kind, NormKind)
        check_int("norm size", self.size, 1, MAX_WIDTH)
        check_real("norm eps", self.eps, 0.0, 1.0)
        check_bool("norm weight", self.weight)
        check_bool("norm bias", self.bias)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rope:
    """Rotary position embedding over the first `dim` values of a head, halves rotated (not interleaved).

    `factor` stretches positions; `original_max_position` is the trained context of every kind but default and linear.
    `low_freq_factor` and `high_freq_factor` belong to llama3; `beta_fast`, `beta_slow` and `truncate` to yarn (Peng et
    al. 2023, "YaRN", sections 3.1-3.4); `divisors`, one per pair of values, to longrope within its trained context
    (Ding et al. 2024). `attention_factor` of the last two multiplies cos and sin.
    """

    kind: RopeKind
    dim: int
    theta: float
    factor: float = 1.0
    original_max_position: int | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    attention_factor: float | None = None
    truncate: bool = True
    divisors: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        check_kind("rope kind", self.kind, RopeKind)
        check_int("rope dim", self.dim, 2, MAX_HEAD_DIM)
        require(self.dim % 2 == 0, f"rope dim is {self.dim}; expected an even number")
        # below these bounds nothing turns, or a power of it leaves the range of floats
        check_real("rope theta", self.theta, 1.0, 1e12)
        check_real("rope factor", self.factor, 1e-3, 1e6)
        check_bool("rope truncate", self.truncate)
        needs: dict[str, tuple[str, ...]] = {
            RopeKind.DYNAMIC: ("original_max_position",),
            RopeKind.LLAMA3: ("original_max_position", "low_freq_factor", "high_freq_factor"),
            RopeKind.YARN: ("original_max_position", "beta_fast", "beta_slow", "attention_factor"),
            RopeKind.LONGROPE: ("original_max_position", "divisors", "attention_factor"),
        }
        for name in needs.get(self.kind, ()):
            require(getattr(self, name) is not None, f"rope kind {self.kind} needs {name}")
        if self.original_max_position is not None:
            check_int("rope original_max_position", self.original_max_position, 1, MAX_POSITION)
        for name in ("low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "attention_factor"):
            if getattr(self, name) is not None:
                check_real(f"rope {name}", getattr(self, name), 0.0, 1e6)
        if self.divisors is not None:
            require(
                isinstance(self.divisors, tuple) and 2 * len(self.divisors) == self.dim,
                f"rope divisors are {str(self.divisors)[:80]}; expected a tuple of {self.dim // 2}, one for each pair",
            )
            for divisor in self.divisors:
                check_real("rope divisor", divisor, 0.0, 1e6)
        if self.low_freq_factor is not None and self.high_freq_factor is not None:
            require(
                self.low_freq_factor < self.high_freq_factor,
                f"rope low_freq_factor {self.low_freq_factor} is not below high_freq_factor {self.high_freq_factor}",
            )
