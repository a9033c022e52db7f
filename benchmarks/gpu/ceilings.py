"""What the device can do at best: copying, reading, multiplying, starting kernels, waiting for all of a grid."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.clock import captured
from benchmarks.gpu.record import Section
from pyruntime.errors import RunError
from pyruntime.kernels.probe import barrier_kernel, count_kernel, read_kernel
from pyruntime.ops.gpu.device import gpu_info

_WARMUP: Final = 3
_READ_BLOCK: Final = 4096
_READ_PROGRAMS_PER_SM: Final = 8


def measure(bench: Bench, section: Section) -> None:
    """Fill in the bench's rates, and say them: bytes, operations and seconds each."""
    probes: tuple[tuple[str, Callable[[Bench], dict[str, Any]]], ...] = (
        ("copy", _copy),
        ("read", _read),
        ("multiply", _multiply),
        ("graph node", lambda each: _chain(each, early=False)),
        ("graph node, dependent launch", lambda each: _chain(each, early=True)),
        ("grid barrier", _barrier),
    )
    for name, probe in probes:
        bench.tidy()
        section.add({"name": name, **probe(bench)})
    found = {row["name"]: row for row in section.data["rows"]}
    bench.rates.copy = found["copy"]["bytes_per_second"]
    bench.rates.read = found["read"]["bytes_per_second"]
    bench.rates.multiply = found["multiply"]["flops_per_second"]


def _copy(bench: Bench) -> dict[str, Any]:
    """Bytes read and bytes written count."""
    source = torch.ones(bench.settings.copy_bytes // 4, dtype=torch.float32, device=bench.device)
    target = torch.empty_like(source)
    seconds = bench.clock.samples(lambda: target.copy_(source), bench.settings.probe_repeats, _WARMUP).median
    num_bytes = 2 * source.numel() * 4
    return {"bytes": num_bytes, "seconds": seconds, "bytes_per_second": num_bytes / seconds}


def _read(bench: Bench) -> dict[str, Any]:
    """The better of torch's sum and a kernel of our own."""
    values = torch.ones(bench.settings.read_bytes // 4, dtype=torch.float32, device=bench.device)
    num_programs = gpu_info(bench.device).num_sms * _READ_PROGRAMS_PER_SM
    sums = torch.empty(num_programs, dtype=torch.float32, device=bench.device)

    def ours() -> None:
        read_kernel[(num_programs,)](values, sums, values.numel(), BLOCK=_READ_BLOCK, num_warps=8)

    by_name = {
        name: bench.clock.samples(run, bench.settings.probe_repeats, _WARMUP).median
        for name, run in (("torch", lambda: values.sum()), ("triton", ours))
    }
    if float(sums.double().sum()) != values.numel():
        raise RunError("NUMERICS", f"read_kernel sums {values.numel()} ones to {float(sums.double().sum())}")
    seconds, num_bytes = min(by_name.values()), values.numel() * 4
    found = {"bytes": num_bytes, "seconds": seconds, "bytes_per_second": num_bytes / seconds}
    return {**found, "seconds_by_kernel": by_name}


def _multiply(bench: Bench) -> dict[str, Any]:
    """Random values: zeros would need less power and run faster."""
    side = bench.settings.matmul_side
    a, b = (torch.randn((side, side), dtype=bench.torch_dtype, device=bench.device) for _ in range(2))
    out = torch.empty_like(a)
    seconds = bench.clock.samples(lambda: torch.mm(a, b, out=out), bench.settings.probe_repeats, _WARMUP).median
    return {"side": side, "seconds": seconds, "flops_per_second": 2 * side**3 / seconds}


def _chain(bench: Bench, *, early: bool) -> dict[str, Any]:
    """Seconds from one kernel of a captured chain to the next; `early`: each may start before the last one ended."""
    info, length = gpu_info(bench.device), bench.settings.chain_length
    if early and not info.has_dependent_launch:
        return {"seconds": None, "why": f"{info.name} has no programmatic dependent launch"}
    counts = torch.zeros(info.num_sms, dtype=torch.int32, device=bench.device)
    options: dict[str, Any] = {"launch_pdl": True} if early else {}

    def run() -> None:
        for _ in range(length):
            count_kernel[(info.num_sms,)](counts, PDL=early, num_warps=1, **options)

    replay = captured(run, bench.device)
    counts.zero_()
    seconds = bench.clock.samples(replay, bench.settings.probe_repeats, _WARMUP).median
    expected = length * (bench.settings.probe_repeats + _WARMUP)
    if not bool((counts == expected).all()):
        raise RunError("NUMERICS", f"a chain counts to {counts.tolist()[:4]}, not {expected}: launches overtook others")
    return {"length": length, "seconds": seconds / length}


def _barrier(bench: Bench) -> dict[str, Any]:
    """Seconds of one barrier of as many programs as the device has processors."""
    info, count = gpu_info(bench.device), bench.settings.num_barriers
    # programs run one after the other in the interpreter, and would wait for ever
    num_programs = 1 if info.interpreted else info.num_sms
    ticket = torch.zeros(1, dtype=torch.int32, device=bench.device)
    options: dict[str, Any] = {} if info.interpreted else {"launch_cooperative_grid": True}

    def run(rounds: int) -> Callable[[], None]:
        def launch() -> None:
            ticket.zero_()
            barrier_kernel[(num_programs,)](ticket, rounds, num_warps=4, **options)

        return launch

    # what starting the kernel costs is in both
    few, many = (
        bench.clock.samples(run(rounds), bench.settings.probe_repeats, _WARMUP).median for rounds in (count, 2 * count)
    )
    if int(ticket) != 2 * count * num_programs:
        raise RunError("NUMERICS", f"a barrier counted {int(ticket)} arrivals, not {2 * count * num_programs}")
    return {"programs": num_programs, "seconds": (many - few) / count}
