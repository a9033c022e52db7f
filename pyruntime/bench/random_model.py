"""Models with random weights, made when they are read: the cost of a shape can be measured without its checkpoint."""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import torch

from pyruntime.checkpoint import Model, Weight
from pyruntime.errors import UsageError
from pyruntime.spec import ModelSpec, NormKind, norm_names, sublayer_prefix, weight_shapes

_DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_STD: Final = 0.02
# a prime just below 2^20: with a power of two the rows of a matrix would repeat, and logits would be equal in pairs
_PERIOD: Final = 1048573


@dataclass(frozen=True, slots=True)
class RandomWeight:
    """A tensor of normal values around `centre`, the same for the same name and seed, made anew by every read.

    All tensors of a seed are cut from one block of about a million values, laid end to end from a place that the name
    gives: drawing billions of values would take minutes.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    seed: int
    centre: float = 0.0

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * _DTYPES[self.dtype].itemsize

    def refs(self) -> Iterator[Weight]:
        """Itself."""
        yield self

    def read(self) -> torch.Tensor:
        """The tensor, in memory that nobody else holds."""
        block = _block(self.seed)
        values = torch.empty(math.prod(self.shape), dtype=_DTYPES[self.dtype])
        start = zlib.crc32(self.name.encode()) % _PERIOD
        done = 0
        while done < len(values):
            piece = block[start : start + len(values) - done]
            target = values[done : done + len(piece)]
            target.copy_(piece + self.centre if self.centre else piece)
            done, start = done + len(piece), 0
        return values.reshape(self.shape)


def random_model(spec: ModelSpec, dtype: str = "bfloat16", seed: int = 0) -> Model:
    """A model of `spec` with normal weights of standard deviation 0.02, norm gains around one; nothing is stored.

    Its weights are deterministic and quick to make (see RandomWeight), but no trained model's: what is generated means
    nothing, and what a step costs is the same. Raises UsageError DTYPE.
    """
    if dtype not in _DTYPES:
        raise UsageError("DTYPE", f"dtype {dtype!r} of a random model is not known; expected {', '.join(_DTYPES)}")
    gains = _gains(spec)
    weights: dict[str, Weight] = {
        name: RandomWeight(name, shape, dtype, seed, gains.get(name, 0.0))
        for name, shape in weight_shapes(spec).items()
    }
    return Model(spec=spec, dense_spec=spec, weights=weights, dtype=dtype)


def _gains(spec: ModelSpec) -> dict[str, float]:
    """Names of the norms' gains, and the value at which each does nothing."""
    norms = {"final_norm": spec.final_norm}
    for layer in spec.layers:
        for kind, sublayer in layer.sublayers():
            prefix = sublayer_prefix(layer.index, kind)
            norms |= {prefix + name: getattr(sublayer, name) for name in norm_names(sublayer)}
    around_zero = (NormKind.RMS_ONE_PLUS, NormKind.LAYER_ONE_PLUS)
    return {
        f"{name}.weight": 0.0 if norm.kind in around_zero else 1.0 for name, norm in norms.items() if norm is not None
    }


@functools.lru_cache(maxsize=2)
def _block(seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(_PERIOD, generator=generator) * _STD
