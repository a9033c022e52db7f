"""Lazy weights: a reference into a file, a tensor in memory, or an expression over them. Only `read` touches bytes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final, Protocol

import torch

from pyruntime.checkpoint.files import io_error
from pyruntime.errors import CheckpointError

TORCH_DTYPES: Final = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class Shard:
    """One open safetensors file; `bytes_read` counts the tensor bytes that were asked of it.

    Reads copy exact counts instead of mapping the file, and there is no other mode: a mapped file that is truncated
    kills the process, and one that is overwritten changes the weights of a running model. A file that was written to
    since it was opened is refused.
    """

    def __init__(self, path: Path, fd: int) -> None:
        self.path = path
        self.bytes_read = 0
        self._fd = fd
        self._size, self._modified = _size_and_time(fd)

    def __del__(self) -> None:
        os.close(self._fd)

    def read(self, start: int, num_bytes: int) -> bytearray:
        """`num_bytes` bytes from offset `start`. Raises CheckpointError TRUNCATED or CHANGED, or RunError IO."""
        buffer = bytearray(num_bytes)
        view = memoryview(buffer)
        done = 0
        try:
            while done < num_bytes:
                count = os.preadv(self._fd, [view[done:]], start + done)
                if count == 0:
                    raise CheckpointError("TRUNCATED", f"{self.path.name}: ends before byte {start + num_bytes}")
                done += count
            self._check_unchanged()
        except OSError as error:
            raise io_error(f"cannot read {self.path}", error) from None
        self.bytes_read += num_bytes
        return buffer

    def _check_unchanged(self) -> None:
        size, modified = _size_and_time(self._fd)
        if size < self._size:
            raise CheckpointError("TRUNCATED", f"{self.path.name}: has {size} bytes; it had {self._size} a moment ago")
        if (size, modified) != (self._size, self._modified):
            raise CheckpointError(
                "CHANGED", f"{self.path.name}: was written to since its header was read; load it when it is complete"
            )


def _size_and_time(fd: int) -> tuple[int, int]:
    status = os.fstat(fd)
    return status.st_size, status.st_mtime_ns


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
    """A tensor of a file, by place; `stride` are the bytes from one row to the next where its rows do not touch."""

    shard: Shard = field(repr=False)
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    num_bytes: int
    stride: int | None = None

    def refs(self) -> Iterator[Weight]:
        """Itself."""
        yield self

    def rows(self, begin: int, count: int) -> TensorRef:
        """`count` entries of the first dimension, from `begin` on."""
        row_bytes = self.num_bytes // self.shape[0]
        shape = (count, *self.shape[1:])
        return replace(self, shape=shape, start=self.start + begin * row_bytes, num_bytes=count * row_bytes)

    def columns(self, begin: int, count: int) -> TensorRef:
        """`count` columns of a matrix that is whole, from `begin` on."""
        num_rows, width = self.shape
        row_bytes = self.num_bytes // num_rows
        item = row_bytes // width
        start, num_bytes = self.start + begin * item, num_rows * count * item
        return replace(self, shape=(num_rows, count), start=start, num_bytes=num_bytes, stride=row_bytes)

    def read(self) -> torch.Tensor:
        """The tensor's bytes, copied from the file."""
        dtype = TORCH_DTYPES[self.dtype]
        if self.num_bytes == 0:
            return torch.empty(self.shape, dtype=dtype)
        return torch.frombuffer(self._bytes(), dtype=dtype).reshape(self.shape)

    def _bytes(self) -> bytearray:
        if self.stride is None:
            return self.shard.read(self.start, self.num_bytes)
        row_bytes = self.num_bytes // self.shape[0]
        return bytearray().join(
            self.shard.read(self.start + row * self.stride, row_bytes) for row in range(self.shape[0])
        )


@dataclass(frozen=True, slots=True)
class Rows:
    """Runs of rows of a stored tensor, one below the other."""

    pieces: tuple[TensorRef, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the tensor."""
        return (sum(piece.shape[0] for piece in self.pieces), *self.pieces[0].shape[1:])

    @property
    def num_bytes(self) -> int:
        """Bytes of the rows as stored."""
        return sum(piece.num_bytes for piece in self.pieces)

    def refs(self) -> Iterator[Weight]:
        """The runs."""
        yield from self.pieces

    def read(self) -> torch.Tensor:
        """The runs, joined."""
        return torch.cat([piece.read() for piece in self.pieces])


@dataclass(frozen=True, slots=True)
class Transposed:
    """A stored matrix, turned around: GPT-2 stores [in_features, out_features]."""

    tensor: TensorRef

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the matrix."""
        return self.tensor.shape[::-1]

    @property
    def num_bytes(self) -> int:
        """Bytes of the matrix as stored."""
        return self.tensor.num_bytes

    def refs(self) -> Iterator[Weight]:
        """What is stored."""
        yield self.tensor

    def read(self) -> torch.Tensor:
        """The matrix."""
        return self.tensor.read().T.contiguous()


@dataclass(frozen=True, slots=True)
class UnitRows:
    """A stored matrix, each row divided by its length: the head of Baichuan 2."""

    tensor: TensorRef

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the matrix."""
        return self.tensor.shape

    @property
    def num_bytes(self) -> int:
        """Bytes of the matrix as stored."""
        return self.tensor.num_bytes

    def refs(self) -> Iterator[Weight]:
        """What is stored."""
        yield self.tensor

    def read(self) -> torch.Tensor:
        """The matrix in float32, whatever it is stored in: the quotients are not rounded twice."""
        return torch.nn.functional.normalize(self.tensor.read().float())


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


def check_finite(name: str, tensor: torch.Tensor, where: str = "", advice: str = "get the weights again") -> None:
    """Raise CheckpointError NOT_FINITE if a value of `tensor`, which the user knows as `name`, is NaN or infinite."""
    # one fast pass: where there is a NaN, it is the least and the greatest value
    if tensor.numel() == 0 or all(map(torch.isfinite, torch.aminmax(tensor))):
        return
    bad = ~torch.isfinite(tensor)
    # of equal bytes argmax gives the first
    first = torch.unravel_index(bad.flatten().view(torch.uint8).argmax(), tensor.shape)
    index = [int(each) for each in first]
    raise CheckpointError(
        "NOT_FINITE",
        f"{name}: {int(bad.count_nonzero())} of {tensor.numel()} values are NaN or infinite{where}, first {index} = "
        f"{tensor[tuple(index)].item()}; {advice}, or pass check_weights=False (--no-check-weights)",
    )
