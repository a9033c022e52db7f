"""Headers of safetensors files: each rule broken by hand, random mutations, and the safetensors library as oracle."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from pyruntime.checkpoint.header import TensorInfo, read_header
from pyruntime.errors import CheckpointError
from tests.checkpoint.craft import pack, watched_reads

A = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}
B = {"dtype": "F16", "shape": [3], "data_offsets": [16, 22]}
GOOD: dict[str, Any] = {"a": A, "b": B}
DATA = bytes(range(1, 23))


def parse(file: bytes) -> dict[str, TensorInfo]:
    fd = os.memfd_create("header")
    try:
        os.write(fd, file)
        return read_header(fd, "x.safetensors")
    finally:
        os.close(fd)


def a(**fields: Any) -> bytes:
    """The good file with fields of tensor a replaced."""
    return pack({"a": {**A, **fields}, "b": B}, DATA)


def b(**fields: Any) -> bytes:
    return pack({"a": A, "b": {**B, **fields}}, DATA)


def text(header: str) -> bytes:
    return pack(header.encode(), DATA)


def named(name: str) -> bytes:
    return pack({name: A, "b": B}, DATA)


A_TEXT, B_TEXT = json.dumps(A), json.dumps(B)
BAD: dict[str, tuple[bytes, str]] = {
    # L01
    "empty file": (b"", "HEADER_SIZE"),
    "seven bytes": (b"\0" * 7, "HEADER_SIZE"),
    "one byte more than the file": (pack(b"{}", header_bytes=3), "HEADER_SIZE"),
    "length 2^63": (pack(GOOD, DATA, header_bytes=1 << 63), "HEADER_SIZE"),
    "length 2^64 - 1": (pack(GOOD, DATA, header_bytes=(1 << 64) - 1), "HEADER_SIZE"),
    # L03
    "no header": (pack(b""), "HEADER_JSON"),
    "not UTF-8": (text('{"a":').replace(b"a", b"\xff"), "HEADER_JSON"),
    "not JSON": (text("{a: 1}"), "HEADER_JSON"),
    "cut short": (text(json.dumps(GOOD)[:-1]), "HEADER_JSON"),
    "an array": (text("[]"), "HEADER_JSON"),
    "null": (text("null"), "HEADER_JSON"),
    "leading space": (text(" " + json.dumps(GOOD)), "HEADER_JSON"),
    "byte order mark": (text("\ufeff" + json.dumps(GOOD)), "HEADER_JSON"),
    "trailing NUL": (text(json.dumps(GOOD) + "\0"), "HEADER_JSON"),
    "two values": (text(json.dumps(GOOD) + "{}"), "HEADER_JSON"),
    "nested in an entry": (text('{"a": ' + "[" * 9 + "]" * 9 + "}"), "HEADER_JSON"),
    "nested in the metadata": (text('{"__metadata__": {"x": ' + "[" * 9 + "]" * 9 + "}}"), "HEADER_JSON"),
    "nested a hundred thousand deep": (text('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}"), "HEADER_JSON"),
    "NaN": (text('{"__metadata__": {"x": NaN}}'), "HEADER_JSON"),
    "number of 5000 digits": (text('{"a": ' + "1" * 5000 + "}"), "HEADER_JSON"),
    "metadata of numbers": (pack({"__metadata__": {"x": 1}, **GOOD}, DATA), "HEADER_JSON"),
    "metadata a list": (pack({"__metadata__": ["x"], **GOOD}, DATA), "HEADER_JSON"),
    "half a surrogate pair": (text('{"__metadata__": {"x": "\\ud800"}}'), "HEADER_JSON"),
    "entry null": (pack({"a": None, "b": B}, DATA), "HEADER_JSON"),
    "entry without shape": (text('{"a": {"dtype": "F32", "data_offsets": [0, 16]}}'), "HEADER_JSON"),
    # L04
    "tensor twice": (text(f'{{"a": {A_TEXT}, "a": {A_TEXT}, "b": {B_TEXT}}}'), "DUPLICATE_NAME"),
    "tensor twice, once escaped": (text(f'{{"a": {A_TEXT}, "\\u0061": {A_TEXT}}}'), "DUPLICATE_NAME"),
    "inner key twice": (text(f'{{"a": {A_TEXT[:-1]}, "dtype": "F32"}}, "b": {B_TEXT}}}'), "DUPLICATE_NAME"),
    "metadata twice": (text('{"__metadata__": {}, "__metadata__": {}}'), "DUPLICATE_NAME"),
    "extra inner key": (a(stride=[2, 1]), "DUPLICATE_NAME"),
    # L05
    "overlap": (b(data_offsets=[14, 20]), "OFFSETS"),
    "same place": (pack({"a": A, "b": A}, DATA[:16]), "OFFSETS"),
    "hole": (pack({"a": A, "b": {**B, "data_offsets": [18, 24]}}, DATA + b"xx"), "OFFSETS"),
    "hole at the start": (pack({"a": {**A, "data_offsets": [4, 20]}}, DATA[:20]), "OFFSETS"),
    "tail bytes": (pack(GOOD, DATA + b"x"), "OFFSETS"),
    "data without tensors": (pack({}, b"x"), "OFFSETS"),
    "end before begin": (a(data_offsets=[16, 0]), "OFFSETS"),
    "negative begin": (a(data_offsets=[-16, 0]), "OFFSETS"),
    "minus zero": (a(data_offsets=[-0.0, 16]).replace(b"-0.0", b"  -0"), "OFFSETS"),
    "float offsets": (a(data_offsets=[0.0, 16.0]), "OFFSETS"),
    "bool offset": (a(data_offsets=[False, 16]), "OFFSETS"),
    "text offset": (a(data_offsets=["0", "16"]), "OFFSETS"),
    "three offsets": (a(data_offsets=[0, 8, 16]), "OFFSETS"),
    "one offset": (a(data_offsets=[16]), "OFFSETS"),
    "offsets of an object": (a(data_offsets={"begin": 0, "end": 16}), "OFFSETS"),
    "huge offsets": (a(data_offsets=[1 << 64, (1 << 64) + 16]), "OFFSETS"),
    "last tensor ends behind its size": (b(data_offsets=[16, 24]), "OFFSETS"),
    "shape too small for its offsets": (a(shape=[2, 1]), "OFFSETS"),
    "shape too large for its offsets": (a(shape=[2, 3]), "OFFSETS"),
    "shape whose product wraps to the right size": (a(shape=[1 << 62, 16]), "OFFSETS"),
    "shape beyond 64 bits": (a(shape=[1 << 64]), "OFFSETS"),
    "negative sizes": (a(shape=[-2, -2]), "OFFSETS"),
    "float size": (a(shape=[2, 2.0]), "OFFSETS"),
    "bool size": (a(shape=[4, True]), "OFFSETS"),
    "shape a number": (a(shape=4), "OFFSETS"),
    "nine sizes": (a(shape=[4, 1, 1, 1, 1, 1, 1, 1, 1]), "OFFSETS"),
    # L06
    "data cut short": (pack(GOOD, DATA[:-1]), "TRUNCATED"),
    "no data": (pack(GOOD), "TRUNCATED"),
    # L07
    "unknown dtype": (a(dtype="F31"), "DTYPE"),
    "dtype in small letters": (a(dtype="f32"), "DTYPE"),
    "dtype null": (a(dtype=None), "DTYPE"),
    "dtype a list": (a(dtype=["F32"]), "DTYPE"),
    # L08
    "empty name": (named(""), "TENSOR_NAME"),
    "NUL in a name": (named("a\0"), "TENSOR_NAME"),
    "escape sequence in a name": (named("a\x1b[2J"), "TENSOR_NAME"),
    "newline in a name": (named("a\nb"), "TENSOR_NAME"),
    "reversed text in a name": (named("a\u202eb"), "TENSOR_NAME"),
    "half a surrogate pair in a name": (text(f'{{"\\udc00": {A_TEXT}}}'), "HEADER_JSON"),
    "name of 513 bytes": (named("a" * 513), "TENSOR_NAME"),
    "name of 514 bytes in 257 letters": (named("é" * 257), "TENSOR_NAME"),
    "name that climbs": (named("a..b"), "TENSOR_NAME"),
    "name with a slash": (named("a/b"), "TENSOR_NAME"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_broken_rule_has_its_own_error(case: str) -> None:
    file, code = BAD[case]
    with watched_reads() as reads, pytest.raises(CheckpointError) as caught:
        parse(file)
    assert caught.value.code == code
    assert caught.value.exit_code == 3
    assert str(caught.value).startswith("x.safetensors: ")
    assert str(caught.value).isprintable()
    # the eight bytes and the header, never the data
    header_end = 8 + int.from_bytes(file[:8], "little")
    assert all(end <= (8 if code == "HEADER_SIZE" else header_end) for _, end in reads)


@pytest.mark.parametrize("case", [case for case, (_, code) in BAD.items() if code in ("OFFSETS", "DTYPE")])
def test_the_tensor_at_fault_is_named(case: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        parse(BAD[case][0])
    assert "'a'" in str(caught.value) or "'b'" in str(caught.value) or "after the last tensor" in str(caught.value)


def test_the_good_file_is_good() -> None:
    """Guards the table above: each of its files is this one with one thing changed."""
    found = parse(pack({"__metadata__": {"format": "pt"}, **GOOD}, DATA))
    assert {name: (info.dtype, info.shape, info.num_bytes) for name, info in found.items()} == {
        "a": ("F32", (2, 2), 16),
        "b": ("F16", (3,), 6),
    }
    # as the library of the format reads it
    assert parse(pack({"__metadata__": None, **GOOD}, DATA)).keys() == {"a", "b"}
    assert parse(named("a" * 512)).keys() == {"a" * 512, "b"}
    assert parse(pack({})) == {}


def sparse(tmp_path: Path, header_bytes: int) -> Path:
    path = tmp_path / "sparse.safetensors"
    with path.open("wb") as file:
        file.write(header_bytes.to_bytes(8, "little") + b"{")
        file.truncate(header_bytes + 8)
    return path


@pytest.mark.parametrize("header_bytes", [(16 << 20) + 1, 100 << 20, 1 << 40])
def test_a_header_above_the_cap_is_refused_before_it_is_read(tmp_path: Path, header_bytes: int) -> None:
    path = sparse(tmp_path, header_bytes)
    with path.open("rb") as file, watched_reads() as reads, pytest.raises(CheckpointError) as caught:
        read_header(file.fileno(), "x")
    assert caught.value.code == "HEADER_TOO_LARGE"
    assert reads == [(0, 8)]


def test_a_header_at_the_cap_is_read() -> None:
    padded = json.dumps(GOOD).encode().ljust(16 << 20)
    assert parse(pack(padded, DATA)).keys() == GOOD.keys()


def test_more_than_a_hundred_thousand_tensors_are_refused() -> None:
    empty = {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}
    with pytest.raises(CheckpointError) as caught:
        parse(pack({str(i): empty for i in range(100_001)}))
    assert caught.value.code == "HEADER_TOO_LARGE"


def test_a_duplicate_among_many_names_is_found_in_linear_time() -> None:
    keys = ",".join(f'"{i}":0' for i in [*range(30_000), 29_999])
    start = time.process_time()
    with pytest.raises(CheckpointError) as caught:
        parse(pack(f"{{{keys}}}".encode()))
    assert caught.value.code == "DUPLICATE_NAME"
    # a scan per name takes tens of seconds
    assert time.process_time() - start < 3


@pytest.mark.parametrize("field", ["shape", "data_offsets", "dtype"])
def test_a_huge_value_does_not_make_a_huge_message(field: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        parse(a(**{field: ["x" * 1000] * 1000}))
    assert len(caught.value.one_line()) < 5000


def library(file: bytes) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """What the safetensors library reads."""
    found = safetensors.deserialize(file)
    return {name: (info["dtype"], tuple(info["shape"]), bytes(info["data"])) for name, info in found}


def ours(file: bytes) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    return {
        name: (info.dtype, info.shape, file[info.start : info.start + info.num_bytes])
        for name, info in parse(file).items()
    }


DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.bool, torch.uint8, torch.int8, torch.int16]
DTYPES += [torch.int32, torch.int64, torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16, torch.uint32, torch.uint64]
shapes = st.lists(st.integers(0, 4), max_size=4)
names = st.text("abc.é_0", min_size=1, max_size=12).filter(lambda name: ".." not in name)


@given(st.dictionaries(names, st.tuples(st.sampled_from(DTYPES), shapes), max_size=8), st.booleans())
@settings(max_examples=150, deadline=None)
def test_what_the_library_writes_is_read_alike(wanted: dict[str, Any], metadata: bool) -> None:
    # position-dependent bytes, so that a wrong offset shows
    tensors = {
        name: torch.frombuffer(bytearray(os.urandom(64 * 16 * 8)), dtype=torch.uint8)[: _size(dtype, shape)]
        .view(dtype)
        .reshape(shape)
        for name, (dtype, shape) in wanted.items()
    }
    file = save(tensors, {"format": "pt"} if metadata else None)
    assert ours(file) == library(file)
    assert ours(file).keys() == wanted.keys()


def _size(dtype: torch.dtype, shape: list[int]) -> int:
    return torch.Size(shape).numel() * dtype.itemsize


def check_against_library(file: bytes) -> None:
    try:
        found = ours(file)
    except CheckpointError:
        return
    assert found == library(file)


TOKENS = [
    *(bytes([byte]) for byte in b' \t\n\0{}[]",:\\-+.eE0123456789_aF/\x1b\xc3\xff'),
    b"\\u0061",
    b"\\ud800",
    b"1e1",
]


def test_every_edit_of_one_byte_is_read_as_the_library_does_or_refused() -> None:
    header = json.dumps({"__metadata__": {"k": "v"}, **GOOD}, separators=(",", ":")).encode()
    for at in range(len(header)):
        for token in [b"", *TOKENS]:
            # in place of the byte, and before it
            for rest in (header[at + 1 :], header[at:]):
                check_against_library(pack(header[:at] + token + rest, DATA))


edits = st.lists(
    st.tuples(st.integers(0, 400), st.sampled_from(["insert", "replace", "delete"]), st.sampled_from(TOKENS)),
    min_size=1,
    max_size=3,
)


@given(edits, st.booleans())
@settings(max_examples=200, deadline=None)
def test_any_edit_of_the_bytes_is_read_as_the_library_does_or_refused(
    changes: list[tuple[int, str, bytes]], true_length: bool
) -> None:
    header = json.dumps({"__metadata__": {"k": "v"}, **GOOD}).encode()
    length = len(header)
    for place, kind, token in changes:
        at = place % len(header)
        cut = at if kind == "insert" else at + 1
        header = header[:at] + (b"" if kind == "delete" else token) + header[cut:]
    check_against_library(pack(header, DATA, None if true_length else length))


sizes = st.integers(-2, 30) | st.sampled_from([1 << 31, 1 << 62, 1 << 64, 1 << 70])
scalars = st.none() | st.booleans() | sizes | st.floats(allow_nan=False) | st.text(max_size=3)
values = scalars | st.lists(sizes | scalars, max_size=3) | st.sampled_from(["F32", "F16", "U8", "F64", "F4", "C64"])
fields = st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets", "other"]), values, max_size=2)
renames: dict[str, Callable[[str], str]] = {
    "same": str,
    "suffix": lambda name: name + ".é",
    "meta": lambda _: "__metadata__",
}


@given(fields, fields, st.sampled_from(sorted(renames)), st.integers(0, 40), st.booleans())
@settings(max_examples=200, deadline=None)
def test_any_edit_of_the_fields_is_read_as_the_library_does_or_refused(
    first: dict[str, Any], second: dict[str, Any], rename: str, data_bytes: int, honest: bool
) -> None:
    header = {renames[rename]("a"): {**A, **first}, "b": {**B, **second}}
    check_against_library(pack(header, DATA if honest else os.urandom(data_bytes)))
