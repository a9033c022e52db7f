"""A model between its files and its graph: a specification and the lazy weights that belong to it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pyruntime.checkpoint.weight import TORCH_DTYPES, Shard, TensorRef, Weight
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
    checkpoint was stored in ("float32", "bfloat16", "float16"). `declared` is what config.json says is gone or differs,
    a line for each of its keys; `unread_bytes` of the files belong to sublayers that it says are gone.
    """

    spec: ModelSpec
    dense_spec: ModelSpec
    weights: Mapping[str, Weight]
    dtype: str
    path: Path | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    reports: tuple[PassReport, ...] = ()
    declared: tuple[str, ...] = ()
    unread_bytes: int = 0

    @property
    def bytes_read(self) -> int:
        """Tensor bytes that were read from the files so far."""
        return sum(shard.bytes_read for shard in self._shards())

    @property
    def weight_bytes(self) -> int:
        """Bytes of all kept weights as stored; shared ones count once."""
        # what is computed has a size of its own, whatever it is made of
        return sum(weight.num_bytes for weight in set(self.weights.values()))

    @property
    def num_values(self) -> int:
        """Values of all kept weights; shared ones count once."""
        return sum(math.prod(weight.shape) for weight in set(self.weights.values()))

    @property
    def dtype_conflict(self) -> str | None:
        """Why nothing but the user can name the dtype: the kept tensors differ from each other or from config.json."""
        names: dict[str, set[str]] = {}
        for ref in self._refs():
            if isinstance(ref, TensorRef):
                names.setdefault(str(TORCH_DTYPES[ref.dtype]).removeprefix("torch."), set()).add(ref.name)
        said = next((each for key in ("dtype", "torch_dtype") if (each := self.config.get(key)) is not None), None)
        if isinstance(said, str):
            # some programs write torch's own name, or that the files decide
            said = None if said == "auto" else said.removeprefix("torch.")
        if not names or (len(names) == 1 and said in (None, *names)):
            return None
        found = " and ".join(f"{dtype} ({len(own)}, such as {min(own)})" for dtype, own in sorted(names.items()))
        claim = "" if said is None else f", config.json says {str(said)[:40]!r}"
        return (
            f"the tensors are {found}{claim}; name the dtype to compute in (dtype='{self.dtype}', --dtype {self.dtype})"
        )

    def _refs(self) -> set[Weight]:
        return {ref for weight in self.weights.values() for ref in weight.refs()}

    def _shards(self) -> set[Shard]:
        return {ref.shard for ref in self._refs() if isinstance(ref, TensorRef)}
