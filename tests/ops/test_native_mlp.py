"""The compiled float32 MLP against the formula in float64, on every CPU path this machine has."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pyruntime.errors import UsageError
from pyruntime.ops import _native

# float32 matrix product: the limit of law 3
NMSE_LIMIT = 1e-6
EPS = 1e-5
SIZES = (1, 63, 100, 1000)
GUARD = 64
SENTINEL = -12345.0

ISAS = _native.load().module.isa_available()


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("PYRUNTIME_CPU_ISA", request.param)
    return request.param


def inputs(rows: int, hidden: int, ffn: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(rows * 1_000_003 + hidden * 1009 + ffn)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=generator) * scale

    return {
        "x": normal(rows, hidden),
        "norm_weight": 1.0 + normal(hidden, scale=0.2),
        "gate": normal(ffn, hidden, scale=hidden**-0.5),
        "up": normal(ffn, hidden, scale=hidden**-0.5),
        "down": normal(hidden, ffn, scale=ffn**-0.5),
        "residual": normal(rows, hidden),
    }


def formula(tensors: dict[str, Tensor], eps: float = EPS) -> Tensor:
    t = {name: tensor.double() for name, tensor in tensors.items()}
    normed = t["x"] / (t["x"].pow(2).mean(-1, keepdim=True) + eps).sqrt() * t["norm_weight"]
    gated = normed @ t["gate"].T
    return t["residual"] + (gated / (1 + (-gated).exp()) * (normed @ t["up"].T)) @ t["down"].T


def nmse(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).pow(2).sum() / expected.pow(2).sum())


def raw_arguments(tensors: dict[str, Tensor], out: Tensor, scratch: Tensor) -> dict[str, Any]:
    rows, hidden = tensors["x"].shape
    ffn = tensors["gate"].shape[0]
    pointers = {name: tensor.data_ptr() for name, tensor in tensors.items()}
    sizes = {"rows": rows, "hidden": hidden, "ffn": ffn, "scratch_size": rows * (hidden + ffn), "num_threads": 2}
    return {**pointers, **sizes, "isa": "generic", "eps": EPS, "out": out.data_ptr(), "scratch": scratch.data_ptr()}


@pytest.mark.parametrize("rows", [1, 2, 7])
@pytest.mark.parametrize("ffn", SIZES)
@pytest.mark.parametrize("hidden", SIZES)
def test_mlp_matches_the_formula_in_float64(isa: str, hidden: int, ffn: int, rows: int) -> None:
    tensors = inputs(rows, hidden, ffn)
    found = _native.mlp_float32(**tensors, eps=EPS)
    assert nmse(found, formula(tensors)) < NMSE_LIMIT


def test_more_rows_than_one_block_match_the_formula(isa: str) -> None:
    tensors = inputs(37, 100, 63)
    assert nmse(_native.mlp_float32(**tensors, eps=EPS), formula(tensors)) < NMSE_LIMIT


def test_large_gates_saturate_without_nan(isa: str) -> None:
    tensors = inputs(2, 63, 100)
    tensors["gate"] *= 1000.0
    assert nmse(_native.mlp_float32(**tensors, eps=EPS), formula(tensors)) < NMSE_LIMIT


def test_every_output_is_written_and_nothing_beside_it(isa: str) -> None:
    rows, hidden, ffn = 7, 63, 101
    tensors = inputs(rows, hidden, ffn)
    out = torch.full((GUARD + rows * hidden + GUARD,), SENTINEL)
    scratch = torch.full((GUARD + rows * (hidden + ffn) + GUARD,), SENTINEL)
    out[GUARD:-GUARD] = math.nan
    scratch[GUARD:-GUARD] = math.nan
    arguments = raw_arguments(tensors, out[GUARD:], scratch[GUARD:])
    _native.load().module.mlp(**{**arguments, "isa": isa})
    assert nmse(out[GUARD:-GUARD].view(rows, hidden), formula(tensors)) < NMSE_LIMIT
    for buffer in (out, scratch):
        assert bool((buffer[:GUARD] == SENTINEL).all())
        assert bool((buffer[-GUARD:] == SENTINEL).all())


def test_nothing_beyond_the_inputs_is_used(isa: str) -> None:
    tensors = inputs(3, 63, 101)
    guarded = {}
    for name, tensor in tensors.items():
        buffer = torch.full((GUARD + tensor.numel() + GUARD,), math.nan)
        guarded[name] = buffer[GUARD:-GUARD].view(tensor.shape).copy_(tensor)
    assert torch.equal(_native.mlp_float32(**guarded, eps=EPS), _native.mlp_float32(**tensors, eps=EPS))


@pytest.mark.parametrize("batch", [2, 3, 4, 7, 16, 17, 33])
def test_a_row_is_bit_identical_whatever_the_batch(isa: str, batch: int) -> None:
    tensors = inputs(33, 100, 167)
    together = _native.mlp_float32(**cut(tensors, slice(0, batch)), eps=EPS)
    alone = [_native.mlp_float32(**cut(tensors, slice(row, row + 1)), eps=EPS) for row in range(batch)]
    assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize("threads", ["1", "2", "5"])
def test_the_result_does_not_depend_on_the_number_of_threads(
    isa: str, threads: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = inputs(5, 100, 1000)
    default = _native.mlp_float32(**tensors, eps=EPS)
    monkeypatch.setenv("PYRUNTIME_NUM_THREADS", threads)
    assert torch.equal(_native.mlp_float32(**tensors, eps=EPS), default)


def cut(tensors: dict[str, Tensor], rows: slice) -> dict[str, Tensor]:
    return {name: t[rows].contiguous() if name in ("x", "residual") else t for name, t in tensors.items()}


def test_the_output_may_be_the_residual(isa: str) -> None:
    tensors = inputs(20, 63, 100)
    expected = formula(tensors)
    scratch = torch.empty(20 * 163)
    arguments = raw_arguments(tensors, tensors["residual"], scratch)
    _native.load().module.mlp(**{**arguments, "isa": isa})
    assert nmse(tensors["residual"], expected) < NMSE_LIMIT


def test_no_rows_give_no_rows() -> None:
    tensors = inputs(2, 63, 100)
    empty = cut(tensors, slice(0, 0))
    assert _native.mlp_float32(**empty, eps=EPS).shape == (0, 63)


@pytest.mark.parametrize("isa_name", ["sse9", "AVX2", "avx512_fp16"])
def test_unknown_isa_is_refused_with_the_list_of_this_cpu(isa_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYRUNTIME_CPU_ISA", isa_name)
    with pytest.raises(UsageError, match="this CPU has generic"):
        _native.load()
    tensors = inputs(1, 3, 5)
    arguments = raw_arguments(tensors, torch.empty(1, 3), torch.empty(8))
    monkeypatch.delenv("PYRUNTIME_CPU_ISA")
    with pytest.raises(ValueError, match=f"'{isa_name}' cannot run here; this CPU has generic"):
        _native.load().module.mlp(**{**arguments, "isa": isa_name})


BAD_TENSORS: dict[str, tuple[str, Callable[[Tensor], Tensor], str]] = {
    "float64": ("gate", lambda t: t.double(), "expected torch.float32"),
    "transposed": ("down", lambda t: t.T.contiguous().T, "contiguous"),
    "wrong shape": ("up", lambda t: t[:-1].contiguous(), "expected \\[5, 4\\]"),
    "swapped": ("down", lambda t: t.T.contiguous(), "expected \\[4, 5\\]"),
    "other device": ("norm_weight", lambda t: t.to("meta"), "expected cpu"),
    "one dimension": ("x", lambda t: t[0], "expected \\[rows, hidden\\]"),
    "fewer residuals": ("residual", lambda t: t[:1].contiguous(), "expected \\[2, 4\\]"),
    "no units": ("gate", lambda t: t[:0], "at least 1"),
}


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_bad_tensors_are_refused(case: str) -> None:
    name, spoil, message = BAD_TENSORS[case]
    tensors = inputs(2, 4, 5)
    tensors[name] = spoil(tensors[name])
    with pytest.raises(UsageError, match=message):
        _native.mlp_float32(**tensors, eps=EPS)


@pytest.mark.parametrize("eps", [-1.0, math.nan, math.inf])
def test_bad_eps_is_refused(eps: float) -> None:
    with pytest.raises(UsageError, match="eps is"):
        _native.mlp_float32(**inputs(1, 4, 5), eps=eps)


BAD_ARGUMENTS: dict[str, tuple[dict[str, Any], str]] = {
    "null input": ({"gate": 0}, "gate is a null pointer"),
    "null output": ({"out": 0}, "out is a null pointer"),
    "odd address": ({"x": 4097}, "x is not aligned"),
    "no rows": ({"rows": 0}, "expected sizes of at least 1"),
    "negative size": ({"hidden": -4}, "expected sizes of at least 1"),
    "overflow": ({"hidden": 1 << 62, "ffn": 1 << 62}, "more than fits in memory"),
    "end of memory": ({"up": (1 << 64) - 8}, "end of the address space"),
    "short scratch": ({"scratch_size": 17}, "expected at least 18"),
    "bad eps": ({"eps": math.nan}, "eps is nan"),
    "bad threads": ({"num_threads": -1}, "num_threads is -1"),
}


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_bad_raw_arguments_raise(case: str) -> None:
    change, message = BAD_ARGUMENTS[case]
    tensors = inputs(2, 4, 5)
    out, scratch = torch.empty(2, 4), torch.empty(18)
    with pytest.raises(ValueError, match=message):
        _native.load().module.mlp(**{**raw_arguments(tensors, out, scratch), **change})


def test_overlapping_memory_is_refused() -> None:
    tensors = inputs(2, 4, 5)
    out, scratch = torch.empty(2, 4), torch.empty(18)
    arguments = raw_arguments(tensors, out, scratch)
    for change in (
        {"out": arguments["residual"] + 4},
        {"out": arguments["down"]},
        {"scratch": arguments["x"]},
        {"out": arguments["scratch"] + 16},
    ):
        with pytest.raises(ValueError, match="overlaps"):
            _native.load().module.mlp(**{**arguments, **change})


def test_a_forked_child_computes_too() -> None:
    tensors = inputs(4, 100, 1000)
    native = _native.load()
    native = _native.Native(native.module, native.isa, 2)
    expected = _native.mlp_float32(**tensors, eps=EPS, native=native)
    child = os.fork()
    if child == 0:
        # a lost worker would hang here for ever
        signal.alarm(20)
        os._exit(0 if torch.equal(_native.mlp_float32(**tensors, eps=EPS, native=native), expected) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def quota_tree(root: Path, version: int) -> tuple[str, str]:
    membership = root / "membership"
    if version == 2:
        membership.write_text("0::/outer/inner\n")
        base = root
        (base / "outer/inner").mkdir(parents=True)
        (base / "outer/cpu.max").write_text("150000 100000\n")
        (base / "outer/inner/cpu.max").write_text("max 100000\n")
    else:
        membership.write_text("5:memory:/outer\n4:cpu,cpuacct:/outer\n")
        base = root / "cpu,cpuacct"
        (base / "outer").mkdir(parents=True)
        (base / "cpu.cfs_quota_us").write_text("-1\n")
        (base / "outer/cpu.cfs_quota_us").write_text("150000\n")
        (base / "outer/cpu.cfs_period_us").write_text("100000\n")
    return str(membership), str(root)


@pytest.mark.parametrize("version", [1, 2])
def test_the_cgroup_quota_limits_the_threads(tmp_path: Path, version: int) -> None:
    assert _native.load().module.cgroup_cpus(*quota_tree(tmp_path, version)) == 2


def test_no_cgroup_file_means_no_limit(tmp_path: Path) -> None:
    assert _native.load().module.cgroup_cpus(str(tmp_path / "absent"), str(tmp_path)) == 0


def test_the_default_number_of_threads_respects_affinity() -> None:
    assert 1 <= _native.load().module.num_threads() <= len(os.sched_getaffinity(0))
