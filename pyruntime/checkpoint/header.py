"""The header of a safetensors file, checked against the file before anything is allocated.

The format: 8 bytes N (little endian), N bytes of JSON {name: {dtype, shape, data_offsets}}, then the data, which the
offsets must cover without hole or overlap.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Any, Final

from pyruntime import env
from pyruntime.checkpoint.strict_json import parse
from pyruntime.errors import CheckpointError

MAX_TENSORS: Final = 100_000
MAX_NAME_BYTES: Final = 512
# so that no header can be made of more objects, lists or values than its tensors need; the rest is for metadata
_MOST: Final = {b"{": 2 * MAX_TENSORS, b"[": 3 * MAX_TENSORS, b":": 6 * MAX_TENSORS, b",": 14 * MAX_TENSORS}
# {name: {shape: [...]}} is three deep
_MAX_DEPTH: Final = 8
_KEYS: Final = frozenset({"dtype", "shape", "data_offsets"})
DTYPE_SIZES: Final = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1,
    "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4,
    "I64": 8, "U64": 8, "F64": 8,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies: `start` is its offset in bytes from the beginning of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    num_bytes: int


def header_bytes(fd: int, where: str) -> int:
    """How long the header of the open file `fd` says it is. Raises CheckpointError HEADER_SIZE or HEADER_TOO_LARGE."""
    file_bytes = os.fstat(fd).st_size
    if file_bytes < 8:
        raise CheckpointError(
            "HEADER_SIZE", f"{where}: has {file_bytes} bytes, a safetensors file at least 8; get the file again"
        )
    claimed = int.from_bytes(_pread(fd, 8, 0, where), "little")
    if claimed > file_bytes - 8:
        raise CheckpointError(
            "HEADER_SIZE",
            f"{where}: claims a header of {claimed} bytes; the file has {file_bytes}; get the file again",
        )
    most = env.max_header_bytes()
    if claimed > most:
        raise CheckpointError(
            "HEADER_TOO_LARGE",
            f"{where}: header of {claimed} bytes; at most {most} are read; if you trust the file, raise "
            "PYRUNTIME_MAX_HEADER_BYTES",
        )
    return claimed


def read_header(fd: int, where: str) -> dict[str, TensorInfo]:
    """All tensors of the open file `fd` by name, in file order.

    Raises CheckpointError HEADER_SIZE, HEADER_TOO_LARGE, HEADER_JSON, DUPLICATE_NAME, TENSOR_NAME, DTYPE, OFFSETS or
    TRUNCATED, each naming `where` and the tensor.
    """
    num_bytes = header_bytes(fd, where)
    text = _pread(fd, num_bytes, 8, where)
    # the format forbids leading space, and a parser would let it pass
    if text[:1] != b"{":
        raise CheckpointError("HEADER_JSON", f"{where}: the header does not begin with '{{'; get the file again")
    # before the parser makes objects of them; what writes the key in escapes is counted behind it
    _check_count(text.count(b'"data_offsets"'), where)
    for mark, most in _MOST.items():
        if text.count(mark) > most:
            raise CheckpointError(
                "HEADER_TOO_LARGE",
                f"{where}: the header has {text.count(mark)} times {mark.decode()!r}; {MAX_TENSORS} tensors, which is "
                f"the most that are read, need less than {most}",
            )
    entries = parse(text, where, "HEADER_JSON", _MAX_DEPTH, 5 * MAX_TENSORS)
    _check_metadata(entries.pop("__metadata__", None), where)
    _check_count(len(entries), where)
    data_start = 8 + num_bytes
    tensors = {name: _tensor(name, entry, data_start, where) for name, entry in entries.items()}
    _check_cover(tensors, data_start, os.fstat(fd).st_size, where)
    return tensors


def _pread(fd: int, count: int, start: int, where: str) -> bytes:
    text = os.pread(fd, count, start)
    if len(text) < count:
        raise CheckpointError("TRUNCATED", f"{where}: became shorter while its header was read; get the file again")
    return text


def _check_count(num_tensors: int, where: str) -> None:
    if num_tensors > MAX_TENSORS:
        raise CheckpointError("HEADER_TOO_LARGE", f"{where}: {num_tensors} tensors; at most {MAX_TENSORS} are read")


def _check_metadata(metadata: Any, where: str) -> None:
    if metadata is None:
        return
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError("HEADER_JSON", f"{where}: __metadata__ must map texts to texts")


def _tensor(name: str, entry: Any, data_start: int, where: str) -> TensorInfo:
    shown = f"{where}: tensor {name[:80]!r}"
    if not 0 < len(name.encode(errors="surrogatepass")) <= MAX_NAME_BYTES or ".." in name or "/" in name:
        raise CheckpointError("TENSOR_NAME", f"{shown}: names have 1 to {MAX_NAME_BYTES} bytes and no '/' or '..'")
    if not name.isprintable():
        raise CheckpointError("TENSOR_NAME", f"{shown}: the name holds control characters")
    if not isinstance(entry, dict) or not entry.keys() >= _KEYS:
        raise CheckpointError("HEADER_JSON", f"{shown}: expected exactly dtype, shape and data_offsets")
    if len(entry) > len(_KEYS):
        extra = min(entry.keys() - _KEYS)
        raise CheckpointError(
            "DUPLICATE_NAME", f"{shown}: has the extra key {extra[:80]!r}; expected dtype, shape and data_offsets once"
        )
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_SIZES:
        raise CheckpointError(
            "DTYPE", f"{shown}: dtype {str(dtype)[:80]!r} is not known; expected one of {', '.join(DTYPE_SIZES)}"
        )
    if not _sizes(shape) or len(shape) > 8:
        raise CheckpointError("OFFSETS", f"{shown}: shape {str(shape)[:80]} is no list of at most 8 sizes")
    if not _sizes(offsets) or len(offsets) != 2 or offsets[1] < offsets[0]:
        raise CheckpointError("OFFSETS", f"{shown}: data_offsets {str(offsets)[:80]} is no pair begin <= end")
    num_bytes = math.prod(shape) * DTYPE_SIZES[dtype]
    if num_bytes != offsets[1] - offsets[0]:
        raise CheckpointError(
            "OFFSETS", f"{shown}: {dtype} {shape} needs {num_bytes} bytes; its offsets span {offsets[1] - offsets[0]}"
        )
    return TensorInfo(dtype, tuple(shape), data_start + offsets[0], num_bytes)


def _sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(each) is int and 0 <= each < 1 << 63 for each in value)


def _check_cover(tensors: dict[str, TensorInfo], data_start: int, file_bytes: int, where: str) -> None:
    end, name = data_start, ""
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].num_bytes)):
        if info.start != end:
            fault = "overlaps the one before it" if info.start < end else f"leaves {info.start - end} bytes unused"
            raise CheckpointError("OFFSETS", f"{where}: tensor {name!r} {fault}; data must be covered exactly once")
        end += info.num_bytes
    if end > file_bytes:
        raise CheckpointError("TRUNCATED", f"{where}: the tensors need {end} bytes; the file has {file_bytes}")
    if end < file_bytes:
        raise CheckpointError(
            "OFFSETS", f"{where}: {file_bytes - end} bytes after the last tensor {name!r}; expected none"
        )
