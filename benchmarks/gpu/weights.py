"""Random weights that are made where they are wanted: gigabytes on a GPU in milliseconds, nothing over the bus."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Final

import torch

from pyruntime.bench import RandomWeight, random_model
from pyruntime.checkpoint import Model, Weight
from pyruntime.plan import DTYPES
from pyruntime.spec import ModelSpec

_STD: Final = 0.02


@dataclass(frozen=True, slots=True)
class DeviceWeight:
    """Normal values of standard deviation 0.02 around `centre`; the same for the same name, made anew by every read."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    device: str
    centre: float = 0.0

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    def refs(self) -> Iterator[Weight]:
        """Itself."""
        yield self

    def read(self) -> torch.Tensor:
        """The tensor, on its device."""
        generator = torch.Generator(self.device).manual_seed(zlib.crc32(self.name.encode()))
        dtype = DTYPES[self.dtype]
        values = torch.randn(self.shape, generator=generator, dtype=dtype, device=self.device).mul_(_STD)
        return values.add_(self.centre) if self.centre else values


def device_model(spec: ModelSpec, dtype: str, device: torch.device, dense: ModelSpec | None = None) -> Model:
    """A model of `spec` with weights that come into being on `device`; norm gains lie around the value of no effect.

    `dense` is what it was pruned from, where it was.
    """
    model = random_model(spec, dtype)
    weights: dict[str, Weight] = {}
    for name, each in model.weights.items():
        assert isinstance(each, RandomWeight)
        weights[name] = DeviceWeight(name, each.shape, dtype, str(device), each.centre)
    return replace(model, dense_spec=dense or spec, weights=weights)
