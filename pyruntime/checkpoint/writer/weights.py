"""Weight files: safetensors of one tensor after another, in shards like Hugging Face's where they are large."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import torch

from pyruntime.checkpoint.folder import StoredTensor
from pyruntime.checkpoint.writer.folder import NewFolder

# of Hugging Face's writer
SHARD_BYTES: Final = 5 * 10**9
_CHUNK_BYTES: Final = 1 << 22
_SINGLE: Final = "model.safetensors"
_INDEX: Final = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True)
class NewTensor:
    """A tensor to be written; `chunks` gives its bytes in order, when its turn comes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    num_bytes: int
    chunks: Callable[[], Iterable[bytes | bytearray | memoryview]]


def stored_bytes(tensor: StoredTensor) -> Iterator[bytearray]:
    """The bytes of a stored tensor, a piece at a time."""
    start, end = tensor.info.start, tensor.info.start + tensor.info.num_bytes
    for begin in range(start, end, _CHUNK_BYTES):
        yield tensor.shard.read(begin, min(_CHUNK_BYTES, end - begin))


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of `tensor` as a file holds them."""
    flat = tensor.contiguous().reshape(-1).view(torch.uint8)
    return flat.numpy().data


def write_weights(
    folder: NewFolder, tensors: Sequence[NewTensor], shard_bytes: int, count: Callable[[int], None]
) -> None:
    """Write `tensors` as one file, or as shards of at most `shard_bytes` with their index, a tensor in each at least.

    `count` is called with the bytes of each piece. Raises OSError, and what reading a tensor raises.
    """
    shards = list(_shards(tensors, shard_bytes))
    names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = [_SINGLE]
    for name, shard in zip(names, shards, strict=True):
        _write(folder, name, shard, count)
    if len(shards) > 1:
        places = {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        total = sum(tensor.num_bytes for tensor in tensors)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        with folder.file(_INDEX) as file:
            file.write(json.dumps(index, indent=2).encode() + b"\n")


def _shards(tensors: Sequence[NewTensor], shard_bytes: int) -> Iterator[list[NewTensor]]:
    shard: list[NewTensor] = []
    size = 0
    for tensor in tensors:
        if shard and size + tensor.num_bytes > shard_bytes:
            yield shard
            shard, size = [], 0
        shard.append(tensor)
        size += tensor.num_bytes
    yield shard


def _write(folder: NewFolder, name: str, tensors: Sequence[NewTensor], count: Callable[[int], None]) -> None:
    # in a file of several dtypes, the wide ones first: then each tensor lies on a multiple of its values' size
    tensors = sorted(tensors, key=lambda tensor: tensor.dtype not in ("F64", "I64", "F32", "I32"))
    with folder.file(name) as file:
        file.write(_header(tensors))
        for tensor in tensors:
            done = 0
            for chunk in tensor.chunks():
                file.write(chunk)
                done += len(chunk)
                count(len(chunk))
            assert done == tensor.num_bytes, f"{tensor.name} gave {done} bytes instead of {tensor.num_bytes}"


def _header(tensors: Sequence[NewTensor]) -> bytes:
    # the metadata that transformers asks for
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for tensor in tensors:
        end = start + tensor.num_bytes
        entries[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
