"""The probes: what they read and count, on every CPU path, and what they refuse. No rate is required of a machine."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch

from pyruntime.bench import Ceilings, ceilings
from pyruntime.errors import UsageError
from pyruntime.ops import _native

BLOCK = 4096
# lanes of a register times two operations a lane, of 12 chains of 4096 steps
ROUND = {"generic": 4 * 2, "avx2": 8 * 2, "avx512": 16 * 2, "avx512_bf16": 16 * 2}


@pytest.fixture
def native() -> ModuleType:
    return importlib.import_module("pyruntime._C")


@pytest.fixture
def data() -> torch.Tensor:
    """Five blocks whose first byte is aligned to 64."""
    memory = torch.zeros(6 * BLOCK, dtype=torch.uint8)
    start = -memory.data_ptr() % 64
    return memory[start : start + 5 * BLOCK]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A buffer of four megabytes and readings of about a millisecond."""
    monkeypatch.setattr(ceilings, "_BUFFER_BYTES", 1 << 22)
    monkeypatch.setattr(ceilings, "_LEAST_BYTES", 1 << 20)
    monkeypatch.setattr(ceilings, "_SECONDS", 1e-3)
    monkeypatch.setattr(ceilings, "_FIRST_ROUNDS", 1)


def each_isa() -> Iterator[str]:
    return iter(importlib.import_module("pyruntime._C").isa_available())


@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_every_isa_reads_every_byte_once(native: ModuleType, data: torch.Tensor, num_threads: int) -> None:
    for isa in native.isa_available():
        found = native.read_probe(isa=isa, data=data.data_ptr(), num_bytes=data.numel(), num_threads=num_threads)
        assert found == 5 * BLOCK


@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_every_isa_counts_its_operations(native: ModuleType, num_threads: int) -> None:
    for isa in native.isa_available():
        found = native.multiply_probe(isa=isa, dtype="float32", rounds=7, num_threads=num_threads)
        assert found == 7 * 12 * 4096 * ROUND[isa]
    if "avx512_bf16" in native.isa_available():
        found = native.multiply_probe(isa="avx512_bf16", dtype="bfloat16", rounds=5, num_threads=num_threads)
        assert found == 5 * 12 * 4096 * 16 * 4


READ_ERRORS: dict[str, tuple[dict[str, Any], str]] = {
    "null": ({"data": 0}, "data is at 0; expected a multiple of 64 that is not 0"),
    "misaligned": ({"data": 64 * 100 + 4}, "data is at 6404; expected a multiple of 64"),
    "nothing": ({"num_bytes": 0}, "num_bytes is 0; expected a positive multiple of 4096"),
    "less than nothing": ({"num_bytes": -BLOCK}, "num_bytes is -4096"),
    "a part of a block": ({"num_bytes": BLOCK + 64}, "num_bytes is 4160"),
    "no thread": ({"num_threads": 0}, "num_threads is 0; expected 1 to"),
    "too many threads": ({"num_threads": 1 << 20}, "num_threads is 1048576"),
    "unknown path": ({"isa": "neon"}, "CPU path 'neon' cannot run here"),
}


@pytest.mark.parametrize("what", READ_ERRORS)
def test_reading_refuses(native: ModuleType, data: torch.Tensor, what: str) -> None:
    changed, said = READ_ERRORS[what]
    good = {"isa": "generic", "data": data.data_ptr(), "num_bytes": BLOCK, "num_threads": 1}
    assert native.read_probe(**good) == BLOCK
    with pytest.raises(ValueError, match=said):
        native.read_probe(**{**good, **changed})


MULTIPLY_ERRORS: dict[str, tuple[dict[str, Any], str]] = {
    "no round": ({"rounds": 0}, "rounds is 0; expected 1 to"),
    "too many rounds": ({"rounds": (1 << 32) + 1}, "rounds is 4294967297"),
    "no thread": ({"num_threads": 0}, "num_threads is 0"),
    "dtype": ({"dtype": "float16"}, "dtype is float16 on generic; expected float32, or bfloat16 on avx512_bf16"),
    "bfloat16 without instructions": ({"dtype": "bfloat16"}, "dtype is bfloat16 on generic"),
    "unknown path": ({"isa": ""}, "CPU path '' cannot run here"),
}


@pytest.mark.parametrize("what", MULTIPLY_ERRORS)
def test_multiplying_refuses(native: ModuleType, what: str) -> None:
    changed, said = MULTIPLY_ERRORS[what]
    good = {"isa": "generic", "dtype": "float32", "rounds": 1, "num_threads": 1}
    assert native.multiply_probe(**good) > 0
    with pytest.raises(ValueError, match=said):
        native.multiply_probe(**{**good, **changed})


def plausible(rate: float, highest: float) -> bool:
    # a machine that does less than a million per second or more than any that exists is a mistake in the arithmetic
    return math.isfinite(rate) and 1e6 < rate < highest


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_readings_are_plausible_on_every_isa(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    for isa in each_isa():
        monkeypatch.setenv("PYRUNTIME_CPU_ISA", isa)
        found = Ceilings()
        probe = found.probe(dtype)
        # more readings than the buffer has room for
        for _ in range(6):
            reading = probe()
            assert plausible(reading.read_bandwidth, 1e13)
            assert plausible(reading.multiply_rate, 1e15)
        names = found.names(dtype)
        assert names["read_probe"].startswith(f"native, {isa}, ")
        assert names["read_probe"].endswith("0.00391 GiB")
        pairs = dtype is torch.bfloat16 and isa == "avx512_bf16"
        expected = "bfloat16" if pairs else "float32" if dtype is not torch.float64 else "torch, float64 matrix product"
        assert expected in names["multiply_probe"]


@pytest.mark.usefixtures("small")
def test_without_the_extension_torch_measures_and_the_result_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def not_built() -> _native.Native:
        raise UsageError("NATIVE", "it is not there")

    monkeypatch.setattr(ceilings, "load", not_built)
    found = Ceilings()
    reading = found.probe(torch.float32)()
    assert plausible(reading.read_bandwidth, 1e13)
    assert plausible(reading.multiply_rate, 1e15)
    assert found.names(torch.float32) == {
        "read_probe": "torch, sum over 0.00391 GiB",
        "multiply_probe": "torch, float32 matrix product of 512",
    }


@pytest.mark.usefixtures("small")
def test_a_path_that_cannot_run_is_no_reason_to_take_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYRUNTIME_CPU_ISA", "neon")
    with pytest.raises(UsageError, match="PYRUNTIME_CPU_ISA is 'neon'"):
        Ceilings()


def test_the_buffer_leaves_memory_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings, "available_memory", lambda: 40 << 20)
    assert ceilings._size(torch.device("cpu")) == 10 << 20
    for available in (None, 64 << 30):
        monkeypatch.setattr(ceilings, "available_memory", lambda available=available: available)
        assert ceilings._size(torch.device("cpu")) == 1 << 30
    monkeypatch.setattr(ceilings, "available_memory", lambda: 0)
    assert ceilings._size(torch.device("cpu")) == 2 << 20
