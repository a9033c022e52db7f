"""Residual streams of models with random weights, written from the formulas in float64."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pyruntime.spec import ModelSpec
from tests import naive
from tests.prune import oracle


def streams(spec: ModelSpec, weights: naive.Weights, sequences: Sequence[Sequence[int]]) -> oracle.Streams:
    """What every sublayer reads and adds; a row of ones stands where there is no sublayer."""
    found = oracle.Streams()
    rows: dict[tuple[str, int], list[tuple[oracle.Array, oracle.Array]]] = {}
    for sequence in sequences:
        x = weights["embedding.weight"][list(sequence)] * spec.embedding.scale
        if spec.embedding.positions is not None:
            x = x + weights["embedding.position.weight"][: len(sequence)]
        found.boundaries.append([x])
        for layer in spec.layers:
            entry, sums = x, []
            for kind, part in layer.sublayers():
                read = entry if layer.parallel else x
                prefix = f"layers.{layer.index}.{kind}."
                added = naive.sublayer(part, prefix, weights, read, list(sequence))
                rows.setdefault((kind, layer.index), []).append((read, added))
                sums.append(added)
                if not layer.parallel:
                    x = naive.linear(part.shortcut, prefix + "shortcut", weights, x) + added if part.residual else added
            if layer.parallel and sums:
                residual = next(part.residual for _, part in layer.sublayers())
                x = sum(sums) + (entry if residual else np.zeros_like(sums[0]))
            found.boundaries[-1].append(x)
    for kind in ("attention", "mlp"):
        for layer in spec.layers:
            pairs = rows.get((kind, layer.index), [(np.ones((1, 1)), np.ones((1, 1)))])
            x, added = (np.concatenate(each) for each in zip(*pairs, strict=True))
            getattr(found, kind).append((x, added))
    return found
