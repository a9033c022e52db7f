"""Weights that are computed when they are read: in float64 over other weights, and rounded to a dtype once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from pyruntime.checkpoint.model import Model
from pyruntime.checkpoint.weight import TORCH_DTYPES, InMemory, TensorRef, Weight

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
    weights: dict[str, Weight] = {
        name: weight
        if stored_dtype(model, weight) is wanted
        else Computed(tuple(weight.shape), wanted, lambda values: values, (weight,))
        for name, weight in model.weights.items()
    }
    return replace(model, weights=weights, dtype=dtype)
