"""Weights that are computed when they are read: in float64 over other weights, and rounded to a dtype once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Final

import torch

from pyruntime.checkpoint.model import Model
from pyruntime.checkpoint.weight import TORCH_DTYPES, InMemory, TensorRef, Weight

_FLOAT64: Final = 8

Formula = Callable[..., torch.Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class Computed:
    """`formula` of the float64 `sources`, rounded to `dtype`. One that reads another one reads it unrounded."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    formula: Formula
    sources: tuple[Weight, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of the result."""
        return math.prod(self.shape) * self.dtype.itemsize

    def refs(self) -> Iterator[Weight]:
        """What the sources are made of."""
        for source in self.sources:
            yield from source.refs()

    def exact(self) -> torch.Tensor:
        """The tensor in float64, before it is rounded."""
        found = self.formula(*map(exact, self.sources))
        assert tuple(found.shape) == self.shape, (found.shape, self.shape)
        return found

    def read(self) -> torch.Tensor:
        """The tensor."""
        return self.exact().to(self.dtype).contiguous()


def exact(weight: Weight) -> torch.Tensor:
    """The values of `weight` in float64."""
    return weight.exact() if isinstance(weight, Computed) else weight.read().double()


def working_bytes(weight: Weight) -> int:
    """Bytes that reading `weight` takes at once: what is computed stands beside its sources, all in float64."""
    if isinstance(weight, Computed):
        return weight.num_bytes + _FLOAT64 * math.prod(weight.shape) + sum(map(_exact_bytes, weight.sources))
    return weight.num_bytes


def _exact_bytes(weight: Weight) -> int:
    return working_bytes(weight) + (0 if isinstance(weight, Computed) else _FLOAT64 * math.prod(weight.shape))


def stored_dtype(model: Model, weight: Weight) -> torch.dtype:
    """What `weight` is stored in, without reading it; that of `model` where a weight does not say."""
    if isinstance(weight, Computed):
        return weight.dtype
    for ref in weight.refs():
        if isinstance(ref, TensorRef):
            return TORCH_DTYPES[ref.dtype]
        if isinstance(ref, InMemory):
            return ref.tensor.dtype
    found = getattr(torch, model.dtype)
    assert isinstance(found, torch.dtype)
    return found


def stored_as(model: Model, dtype: str) -> Model:
    """`model` with all weights in `dtype`, so that what passes compute is rounded to this and to nothing narrower."""
    wanted = getattr(torch, dtype)
    # by weight, so that shared ones stay shared
    found: dict[Weight, Weight] = {
        weight: weight
        if stored_dtype(model, weight) is wanted
        else Computed(tuple(weight.shape), wanted, lambda values: values, (weight,))
        for weight in set(model.weights.values())
    }
    return replace(model, weights={name: found[each] for name, each in model.weights.items()}, dtype=dtype)
