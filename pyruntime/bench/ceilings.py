"""What the machine can do at best, read while something else is timed: the rates that a runtime is held against.

A step that makes one token per sequence cannot be faster than its bytes at the rate at which all threads together read
memory; a prompt cannot be faster than its operations at the rate at which they multiply and add in registers. Both
change from second to second on a machine that others use, so a reading is short and stands beside each sample.
"""

from __future__ import annotations

import time
from typing import Final

import torch

from pyruntime.bench.timing import Ceiling, Probe, best, matmul_side
from pyruntime.engine.memory import available_memory
from pyruntime.errors import UsageError
from pyruntime.ops._native import Native, load
from pyruntime.ops.memory import alloc_weights

_CPU: Final = torch.device("cpu")
# far more than any cache holds
_BUFFER_BYTES: Final = 1 << 30
_LEAST_BYTES: Final = 1 << 26
_HUGE_PAGE: Final = 1 << 21
# of memory that is free
_SHARE: Final = 0.25
_SECONDS: Final = 0.025
_FIRST_ROUNDS: Final = 64
_TORCH_REPEATS: Final = 2
# what the compiled probes multiply; the rest is torch's matrix product
_NATIVE_DTYPES: Final = (torch.float32, torch.bfloat16)


class Ceilings:
    """The ceilings of one device. It holds a buffer of 1 GiB, or a quarter of the memory that is free.

    On the CPU the compiled probes read and multiply with the threads and the instructions that plans of the target cpu
    run with. On another device, for other dtypes, or where the extension is not built, torch sums up and multiplies
    matrices; `names` says which.
    """

    def __init__(self, device: torch.device = _CPU) -> None:
        self.device = device
        self._native = _native() if device.type == "cpu" else None
        self._buffer = _buffer(_size(device), device)
        self._at = 0
        self._num_bytes = self._buffer.numel()
        self._rounds: dict[str, int] = {}
        self._matrices: dict[torch.dtype, torch.Tensor] = {}

    def probe(self, dtype: torch.dtype) -> Probe:
        """A function that takes one reading for plans of `dtype`."""
        return lambda: Ceiling(self.read_bandwidth(), self.multiply_rate(dtype))

    def names(self, dtype: torch.dtype) -> dict[str, str]:
        """Which probes read and multiply, and with what, JSON-ready."""
        size = f"{self._buffer.numel() / 2**30:.3g} GiB"
        read, multiply = (
            f"torch, sum over {size}",
            f"torch, {_short(dtype)} matrix product of {matmul_side(self.device)}",
        )
        if self._native is not None:
            how = f"{self._native.isa}, {self._native.num_threads} threads"
            read = f"native, {how}, {size}"
            if dtype in _NATIVE_DTYPES:
                multiply = f"native, {how}, {_multiplied(self._native, dtype)}"
        return {"read_probe": read, "multiply_probe": multiply}

    def read_bandwidth(self) -> float:
        """Bytes per second that the device's memory gives now, read from one end to the other by all threads."""
        if self._native is None:
            data = self._buffer.view(torch.float32)
            return self._buffer.numel() / best(data.sum, self.device, _TORCH_REPEATS)
        if self._at + self._num_bytes > self._buffer.numel():
            self._at = 0
        begin = time.perf_counter()
        num_bytes: int = self._native.module.read_probe(
            isa=self._native.isa,
            data=self._buffer.data_ptr() + self._at,
            num_bytes=self._num_bytes,
            num_threads=self._native.num_threads,
        )
        rate = num_bytes / (time.perf_counter() - begin)
        # the next reading goes on behind this one, where nothing is cached
        self._at += self._num_bytes
        wanted = int(rate * _SECONDS) // _HUGE_PAGE * _HUGE_PAGE
        self._num_bytes = min(max(wanted, _LEAST_BYTES), self._buffer.numel())
        return rate

    def multiply_rate(self, dtype: torch.dtype) -> float:
        """Floating-point operations per second that all threads together do now with values of `dtype`."""
        if self._native is None or dtype not in _NATIVE_DTYPES:
            side = matmul_side(self.device)
            if dtype not in self._matrices:
                self._matrices[dtype] = torch.ones((side, side), dtype=dtype, device=self.device)
            matrix = self._matrices[dtype]
            return 2 * side**3 / best(lambda: matrix @ matrix, self.device, _TORCH_REPEATS)
        name = _multiplied(self._native, dtype)
        if name not in self._rounds:
            # how many rounds fill the time is not known before
            self._rounds[name] = _FIRST_ROUNDS
            self.multiply_rate(dtype)
        rounds = self._rounds[name]
        begin = time.perf_counter()
        flops: int = self._native.module.multiply_probe(
            isa=self._native.isa, dtype=name, rounds=rounds, num_threads=self._native.num_threads
        )
        seconds = time.perf_counter() - begin
        self._rounds[name] = max(1, round(rounds * _SECONDS / seconds))
        return flops / seconds


def _native() -> Native | None:
    """The compiled extension, or None where it is not built. Raises UsageError ENV for variables that make no sense."""
    try:
        return load()
    except UsageError as error:
        if error.code != "NATIVE":
            raise
        return None


def _multiplied(native: Native, dtype: torch.dtype) -> str:
    # a copy without instructions for bfloat16 widens first
    return "bfloat16" if dtype is torch.bfloat16 and native.isa == "avx512_bf16" else "float32"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _size(device: torch.device) -> int:
    available = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory()
    size = _BUFFER_BYTES if available is None else min(_BUFFER_BYTES, int(available * _SHARE))
    return max(size // _HUGE_PAGE * _HUGE_PAGE, _HUGE_PAGE)


def _buffer(num_bytes: int, device: torch.device) -> torch.Tensor:
    """Memory like that of weights; it was written to, or all of it would be one page of zeros."""
    if device.type != "cpu":
        return torch.ones(num_bytes, dtype=torch.uint8, device=device)
    return alloc_weights((num_bytes,), torch.uint8).fill_(1)
