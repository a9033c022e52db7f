"""Lazy weights: a reference into a file, a tensor in memory, or an expression over them. Only `read` touches bytes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Protocol

import torch

from pyruntime.errors import CheckpointError, RunError

TORCH_DTYPES: Final = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class Shard:
    """One open safetensors file; `bytes_read` counts the tensor bytes that were asked of it.

    Reads copy exact counts instead of mapping the file: a mapped file that is truncated kills the process, and one
    that is overwritten changes the weights of a running model.
    """

    def __init__(self, path: Path, fd: int) -> None:
        self.path = path
        self.bytes_read = 0
        self._fd = fd

    def __del__(self) -> None:
        os.close(self._fd)

    def read(self, start: int, num_bytes: int) -> bytearray:
        """`num_bytes` bytes from offset `start`. Raises CheckpointError TRUNCATED or RunError IO."""
        buffer = bytearray(num_bytes)
        view = memoryview(buffer)
        done = 0
        while done < num_bytes:
            try:
                count = os.preadv(self._fd, [view[done:]], start + done)
            except OSError as error:
                raise RunError("IO", f"cannot read {self.path}: {error.strerror}") from None
            if count == 0:
                raise CheckpointError("TRUNCATED", f"{self.path.name}: ends before byte {start + num_bytes}")
            done += count
        self.bytes_read += num_bytes
        return buffer


class Weight(Protocol):
    """What a weight of a Model can do."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the tensor."""
        ...

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensor as stored."""
        ...

    def refs(self) -> Iterator[Weight]:
        """The stored tensors it is made of; two weights with an equal ref share storage."""
        ...

    def read(self) -> torch.Tensor:
        """The tensor, in its stored dtype, on the CPU."""
        ...


@dataclass(frozen=True, slots=True)
class TensorRef:
    """A tensor of a file, by place."""

    shard: Shard = field(repr=False)
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    num_bytes: int

    def refs(self) -> Iterator[Weight]:
        """Itself."""
        yield self

    def read(self) -> torch.Tensor:
        """The tensor's bytes, copied from the file."""
        dtype = TORCH_DTYPES[self.dtype]
        if self.num_bytes == 0:
            return torch.empty(self.shape, dtype=dtype)
        return torch.frombuffer(self.shard.read(self.start, self.num_bytes), dtype=dtype).reshape(self.shape)


@dataclass(frozen=True, slots=True, eq=False)
class InMemory:
    """A tensor that is there already: models made on the fly, and results of passes that computed."""

    tensor: torch.Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the tensor."""
        return tuple(self.tensor.shape)

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensor."""
        return self.tensor.numel() * self.tensor.element_size()

    def refs(self) -> Iterator[Weight]:
        """Itself."""
        yield self

    def read(self) -> torch.Tensor:
        """The tensor."""
        return self.tensor
