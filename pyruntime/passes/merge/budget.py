"""How much memory a merge needs, before a weight is read."""

from __future__ import annotations

from typing import Final

import torch

from pyruntime.errors import RunError
from pyruntime.passes.merge.gate import NUM_ROWS, SIDE
from pyruntime.spec import MLP, Attention, Layer, ModelSpec, Replacement

_WIDE: Final = torch.float64.itemsize


def num_changes(spec: ModelSpec) -> int:
    """Changes of basis that are held at a time: parallel layers are read by turns with the next ones."""
    return 2 if any(layer.parallel for layer in spec.layers) else 1


def budget_bytes(spec: ModelSpec, dtype: torch.dtype) -> int:
    """Bytes that `merge` and reading its result hold at a time, at most: one layer in float64, or the largest table.

    A layer counts [Q|K|V] three times (read, side by side, as Gram matrix or factors), its largest other matrix three
    times (read, changed, turned round), and the sample of the gate. Of the embedding, its positions and the head, the
    rows are held three times (read, scaled and changed; or read, changed and moved by an offset), as wide as the
    stream becomes, beside the change of basis.
    """
    layers = max([_layer_bytes(spec, layer) for layer in spec.layers], default=0)
    changes = num_changes(spec) * max([_change_bytes(layer) for layer in spec.layers], default=0)
    size = spec.embedding.size
    rows = max(spec.embedding.vocab_size, spec.embedding.positions or 0)
    wide = max(
        [size] + [each.q_size for _, each in spec.attentions()] + [each.kv_size for _, each in spec.attentions()]
    )
    return max(layers, rows * (_WIDE * (size + 2 * wide) + dtype.itemsize * wide)) + changes


def check_budget(spec: ModelSpec, dtype: torch.dtype, max_memory: int | None) -> None:
    """Raise RunError MEMORY where that is more than `max_memory`."""
    needed = budget_bytes(spec, dtype)
    if max_memory is not None and needed > max_memory:
        raise RunError(
            "MEMORY",
            f"merging needs {needed / 2**30:.2f} GiB at a time; {max_memory / 2**30:.2f} GiB are allowed: raise "
            "--max-memory or use a machine with more",
        )


def _change_bytes(layer: Layer) -> int:
    """Of a change of basis: its matrix and two factors, all at most as large as the widest projection."""
    attention = layer.attention
    if not isinstance(attention, Attention):
        return 0
    width = max(attention.q_size, attention.kv_size, attention.in_size, attention.out_size)
    return _WIDE * 4 * width**2


def _layer_bytes(spec: ModelSpec, layer: Layer) -> int:
    projections, others, sampled, written = 0, [0], 0, 0
    for _, sublayer in layer.sublayers():
        match sublayer:
            case Attention():
                width = sublayer.q_size + 2 * sublayer.kv_size
                # the pivoted form's Gram matrix
                projections = 3 * sublayer.in_size * width + width**2
                sampled += width
                written += min(SIDE, sublayer.q_size)
                others.append(sublayer.q_size * sublayer.out_size)
            case MLP():
                others += [sublayer.in_size * sublayer.up.out_features, sublayer.down.in_features * sublayer.out_size]
                sampled += 2 * min(SIDE, sublayer.up.out_features)
                written += min(SIDE, sublayer.down.in_features)
            case Replacement():
                others.append(sublayer.in_size * sublayer.out_size)
                sampled += min(SIDE, sublayer.linear.out_features)
                written += min(SIDE, sublayer.linear.in_features)
    # of what the gate compares: maps before and after, inputs, and the outputs of three paths
    size = spec.embedding.size
    sample = 2 * size * (sampled + written) + NUM_ROWS * (3 * sampled + written + 4 * size)
    return _WIDE * (projections + 3 * max(others) + sample)
