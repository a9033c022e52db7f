"""What a merge may do, what it must not exceed, and what it says of each layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

import torch

from pyruntime.checkpoint import PassReport
from pyruntime.passes.fold.gate import CONDITION_LIMITS, NMSE_LIMIT


class MergeKind(StrEnum):
    """Which projections to merge away (docs/merging.md): `x+p` both that of queries, keys or values and the output's.

    `PIVOTED` merges as much as `Q_P`, through the best-conditioned columns of [Q|K|V]. `TRIANGULAR` halves Q and P
    behind RMSNorm. `AUTO` takes what fits each layer.
    """

    Q_P = "q+p"
    K_P = "k+p"
    V_P = "v+p"
    Q = "q"
    P = "p"
    PIVOTED = "pivoted"
    TRIANGULAR = "triangular"
    AUTO = "auto"


class Form(StrEnum):
    """How one matrix of a layer went: through the inverse of Q, K or V, of chosen columns, or by a rotation."""

    Q = "q"
    K = "k"
    V = "v"
    P = "p"
    PIVOTED = "pivoted"
    TRIANGULAR = "triangular"


class GateMode(StrEnum):
    """What becomes of a layer whose merge the gate does not let pass."""

    REFUSE = "refuse"
    FALL_BACK = "fall-back"
    FORCE = "force"


# of the matrix that is inverted, by the dtype the model runs in
MAX_COND: Final = CONDITION_LIMITS
# of queries, keys, values and what the MLP makes of its input, in the dtype the model runs in
MAX_NMSE: Final = NMSE_LIMIT


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeOptions:
    """`gate` None falls back for `AUTO` and refuses otherwise.

    `dtype` is what the merged model will run in, `store_dtype` what its weights are rounded to before that; None is the
    model's own. `max_memory` bounds the bytes that the pass holds at a time. `streams` holds, for each layer whose
    norms of q, k and v may cancel the one before them, vectors [n, size] that its attention really reads; without them
    that norm stays.
    """

    kind: MergeKind = MergeKind.Q_P
    gate: GateMode | None = None
    dtype: str | None = None
    store_dtype: str | None = None
    max_memory: int | None = None
    streams: Mapping[int, torch.Tensor] = field(default_factory=dict, repr=False, compare=False)

    @property
    def gate_mode(self) -> GateMode:
        """What the gate does."""
        if self.gate is not None:
            return self.gate
        return GateMode.FALL_BACK if self.kind is MergeKind.AUTO else GateMode.REFUSE


@dataclass(frozen=True, slots=True)
class Measured:
    """`cond` of the inverted matrix, None without inverse; `nmse` of what the layer computes, `unmerged` before.

    `drift` is the largest change of a normed query, key or value by the epsilon that a cancelled norm leaves behind.
    """

    cond: float | None
    nmse: float
    unmerged: float
    drift: float | None = None


@dataclass(frozen=True, slots=True)
class LayerMerge:
    """What became of one layer. `entry` replaced Q (or K, V), `output` P; None: left as it was, `notes` say why.

    `num_weights` are the weights that a token no longer reads.
    """

    index: int
    entry: Form | None = None
    output: Form | None = None
    entry_measured: Measured | None = None
    output_measured: Measured | None = None
    num_weights: int = 0
    forced: bool = False
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class MergeReport(PassReport):
    """`layers` in order; `read_before` and `read_after` are the weights that one token reads."""

    layers: tuple[LayerMerge, ...] = ()
    read_before: int = 0
    read_after: int = 0
