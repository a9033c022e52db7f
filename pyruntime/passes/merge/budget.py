"""How much memory a merge needs, before a weight is read."""

from __future__ import annotations

import torch

from pyruntime.errors import RunError
from pyruntime.spec import MLP, Attention, ModelSpec, Replacement

_WIDE: int = torch.float64.itemsize


def budget_bytes(spec: ModelSpec, dtype: torch.dtype) -> int:
    """Bytes that `merge` and reading its result hold at a time, at most: one layer in float64, or the embedding.

    A layer counts [Q|K|V] three times (read, side by side, as Gram matrix or factors) and its largest other matrix
    three times (read, changed, turned round); the embedding twice, and as it is stored.
    """
    table = spec.embedding.vocab_size * spec.embedding.size
    return max([_layer_bytes(spec, i) for i in range(len(spec.layers))] + [table * (2 * _WIDE + dtype.itemsize)])


def check_budget(spec: ModelSpec, dtype: torch.dtype, max_memory: int | None) -> None:
    """Raise RunError MEMORY where that is more than `max_memory`."""
    needed = budget_bytes(spec, dtype)
    if max_memory is not None and needed > max_memory:
        raise RunError(
            "MEMORY",
            f"merging needs {needed / 2**30:.2f} GiB at a time; {max_memory / 2**30:.2f} GiB are allowed: raise "
            "--max-memory or use a machine with more",
        )


def _layer_bytes(spec: ModelSpec, index: int) -> int:
    projections, others = 0, [0]
    for _, sublayer in spec.layers[index].sublayers():
        match sublayer:
            case Attention():
                width = sublayer.q_size + 2 * sublayer.kv_size
                # the pivoted form's Gram matrix, and factors of a square one
                projections = 3 * sublayer.in_size * width + width**2 + 4 * sublayer.q_size**2
                others.append(sublayer.q_size * sublayer.out_size)
            case MLP():
                others += [sublayer.in_size * sublayer.up.out_features, sublayer.down.in_features * sublayer.out_size]
            case Replacement():
                others.append(sublayer.in_size * sublayer.out_size)
    return _WIDE * (projections + 3 * max(others))
