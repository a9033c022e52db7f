"""Causal self-attention as data: which projections exist, where merged ones went, what is cached."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from enum import StrEnum

from pyruntime.spec.bounds import (
    MAX_HEAD_DIM,
    MAX_HEADS,
    MAX_POSITION,
    check_bool,
    check_int,
    check_kind,
    check_real,
    require,
)
from pyruntime.spec.parts import Linear, Norm, Rope


class Cached(StrEnum):
    """What one token leaves in the cache of an attention.

    Everything but `KEYS_VALUES` is slim attention (Graef et al., arXiv 2503.05840): keys as projected, from which `v`
    makes the values; or the normed input, from which `k` and `v` are made anew.
    """

    KEYS_VALUES = "keys_values"
    KEYS = "keys"
    INPUTS = "inputs"


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """Causal self-attention with its norms. A projection that is None was merged away: its input is used as it is.

    `pre` norms the input, `sub` the values before the output projection, `post` the output before the residual add.
    `q_norm`, `k_norm` and `v_norm` are per head when their size is `head_dim`, else over all heads together. `window`
    keeps the last `window` positions, the current one included; `softcap` c maps scores s to c * tanh(s / c); `alibi`
    adds slope * (position seen - own position) to scores (Press et al. 2022). `shortcut` maps the residual (SliceGPT).

    `columns` says, for each value of queries, keys and values (in this order), where it comes from: c below `in_size`
    is value c of the input, others are value c - in_size of `rest`; q, k and v are then None. `table` takes them from a
    row per token, [vocab, q_size + 2 kv_size], and reads no input at all. `cached` says what the cache holds.

    `shaped` attention is softmax_gain * softmax + identity_gain * I - centre_gain * U per head, U being the mean over
    all visible positions (He & Hofmann, arXiv 2311.01906, section 4.1).
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
    v_norm: Norm | None = None
    columns: tuple[int, ...] | None = None
    rest: Linear | None = None
    table: bool = False
    cached: Cached = Cached.KEYS_VALUES
    shaped: bool = False
    alibi: bool = False
    shortcut: Linear | None = None

    def __post_init__(self) -> None:
        check_int("attention num_heads", self.num_heads, 1, MAX_HEADS)
        check_int("attention num_kv_heads", self.num_kv_heads, 1, self.num_heads)
        check_int("attention head_dim", self.head_dim, 1, MAX_HEAD_DIM)
        require(
            self.num_heads % self.num_kv_heads == 0,
            f"attention num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}",
        )
        check_real("attention scale", self.scale, 0.0, 1e6)
        for name in ("residual", "table", "shaped", "alibi"):
            check_bool(f"attention {name}", getattr(self, name))
        check_kind("attention cached", self.cached, Cached)
        if self.window is not None:
            check_int("attention window", self.window, 1, MAX_POSITION)
        if self.softcap is not None:
            check_real("attention softcap", self.softcap, 0.0, 1e6)
        if self.rope is not None:
            require(
                self.rope.dim <= self.head_dim,
                f"rope dim {self.rope.dim} is larger than head_dim {self.head_dim}",
            )
        self._check_sources()
        self._check_norms()
        require(
            self.o is None or self.o.in_features == self.q_size,
            f"attention o reads {self.o and self.o.in_features} values; the heads give {self.q_size}",
        )

    def _check_sources(self) -> None:
        """Queries, keys and values come from one place each."""
        packed = self.columns is not None or self.rest is not None or self.table
        require(
            not packed or (self.q, self.k, self.v) == (None, None, None),
            "attention has q, k or v beside columns or a table; one of them must go",
        )
        require(
            not packed or self.cached is Cached.KEYS_VALUES, f"attention caches {self.cached}; only with q, k and v"
        )
        if self.table:
            require((self.columns, self.rest, self.pre) == (None, None, None), "an attention with a table has no input")
        elif packed:
            self._check_columns()
        else:
            self._check_projections()

    def _check_columns(self) -> None:
        require(self.columns is not None and self.rest is not None, "attention columns and rest need each other")
        assert self.columns is not None and self.rest is not None
        width = self.q_size + 2 * self.kv_size
        require(
            isinstance(self.columns, tuple) and len(self.columns) == width,
            f"attention columns are not {width}, one for each value of queries, keys and values",
        )
        known = self.rest.in_features + self.rest.out_features
        for column in self.columns:
            check_int("attention column", column, 0, known - 1)
        twice = [column for column, count in Counter(self.columns).items() if count > 1]
        require(not twice, f"attention columns name {twice[:3]} more than once")

    def _check_projections(self) -> None:
        # keys that are cached give the values
        inputs = {"v": self.kv_size} if self.cached is Cached.KEYS else {}
        require(
            self.cached is Cached.KEYS_VALUES or (self.k is not None and self.v is not None),
            f"attention caches {self.cached} and lacks k or v, which its values are made with",
        )
        for name, width in {"q": self.q_size, "k": self.kv_size, "v": self.kv_size}.items():
            linear: Linear | None = getattr(self, name)
            found = self.in_size if linear is None else linear.out_features
            require(found == width, f"attention {name} gives {found} values; its heads need {width}")
            expected = inputs.get(name, self.in_size)
            require(
                linear is None or linear.in_features == expected,
                f"attention {name} reads {linear and linear.in_features} values; expected {expected}",
            )

    def _check_norms(self) -> None:
        for name, num_heads in (
            ("q_norm", self.num_heads),
            ("k_norm", self.num_kv_heads),
            ("v_norm", self.num_kv_heads),
        ):
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
        """Width of the input; an attention with a table reads none, and stands on a stream as wide as its output."""
        if self.table:
            return self.out_size
        linears = (self.rest, self.q, self.k, None if self.cached is Cached.KEYS else self.v)
        known = next((linear for linear in linears if linear is not None), None)
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

    @property
    def cached_size(self) -> int:
        """Values that one token leaves in the cache."""
        return {
            Cached.KEYS_VALUES: 2 * self.kv_size,
            Cached.KEYS: self.kv_size,
            Cached.INPUTS: self.in_size,
        }[self.cached]
