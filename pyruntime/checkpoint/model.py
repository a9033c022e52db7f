"""A model between its files and its graph: a specification and the lazy weights that belong to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pyruntime.checkpoint.weight import Shard, TensorRef, Weight
from pyruntime.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class PassReport:
    """What one pass saved (weights, their bytes as stored, cached values per token) and what it could not do."""

    name: str
    removed: tuple[str, ...]
    num_weights: int
    weight_bytes: int
    kv_values_per_token: int
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """`spec` says what is there, `weights` holds it by the names of `weight_shapes(spec)`, nothing more.

    `dense_spec` is the model before anything was dropped; `notes` are sentences for the user; `dtype` is the dtype the
    checkpoint was stored in ("float32", "bfloat16", "float16").
    """

    spec: ModelSpec
    dense_spec: ModelSpec
    weights: Mapping[str, Weight]
    dtype: str
    path: Path | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    reports: tuple[PassReport, ...] = ()

    @property
    def bytes_read(self) -> int:
        """Tensor bytes that were read from the files so far."""
        return sum(shard.bytes_read for shard in self._shards())

    @property
    def weight_bytes(self) -> int:
        """Bytes of all kept weights as stored; shared ones count once."""
        refs = {ref for weight in self.weights.values() for ref in weight.refs()}
        return sum(ref.num_bytes for ref in refs)

    def _shards(self) -> set[Shard]:
        refs = (ref for weight in self.weights.values() for ref in weight.refs())
        return {ref.shard for ref in refs if isinstance(ref, TensorRef)}
