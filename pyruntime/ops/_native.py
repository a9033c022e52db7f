"""Calls into the compiled CPU kernels with torch tensors: check, allocate, call."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from pyruntime import env
from pyruntime.errors import UsageError


@dataclass(frozen=True, slots=True)
class Native:
    """The compiled extension and how to run it: one CPU path and a number of threads."""

    module: ModuleType
    isa: str
    num_threads: int


def load() -> Native:
    """Import the compiled extension and choose the CPU path, from PYRUNTIME_CPU_ISA or the best this CPU has.

    Raises UsageError when the extension is not built, or when the path asked for cannot run here.
    """
    try:
        # by name, because a checkout that is not built yet must still import
        module = importlib.import_module("pyruntime._C")
    except ImportError as error:
        raise UsageError(
            "NATIVE", f"pyruntime._C cannot be imported ({error}); build it with `pip install -e .`"
        ) from error
    available = module.isa_available()
    isa = env.cpu_isa() or module.isa_detected()
    if isa not in available:
        raise UsageError(
            "ENV", f"PYRUNTIME_CPU_ISA is {isa!r}; this CPU has {', '.join(available)}; choose one of these or unset it"
        )
    return Native(module, isa, env.num_threads() or module.num_threads())


def mlp_float32(
    x: Tensor,  # [rows, hidden]
    norm_weight: Tensor,  # [hidden]
    eps: float,
    gate: Tensor,  # [ffn, hidden]
    up: Tensor,  # [ffn, hidden]
    down: Tensor,  # [hidden, ffn]
    residual: Tensor,  # [rows, hidden]
    *,
    native: Native | None = None,
) -> Tensor:  # [rows, hidden]
    """Return residual + down(silu(gate(n)) * up(n)) with n = RMSNorm(x) on the CPU, in float32.

    A row's result does not depend on the other rows. `native` is what load() gave; a caller with many calls passes it.
    Raises UsageError unless every tensor is contiguous float32 on the CPU with the shapes above.
    """
    rows, hidden, ffn = _sizes(x, gate)
    expected = (
        ("x", x, (rows, hidden)),
        ("norm_weight", norm_weight, (hidden,)),
        ("gate", gate, (ffn, hidden)),
        ("up", up, (ffn, hidden)),
        ("down", down, (hidden, ffn)),
        ("residual", residual, (rows, hidden)),
    )
    for name, tensor, shape in expected:
        _check(name, tensor, shape)
    if not (eps >= 0 and eps < float("inf")):
        raise UsageError("ARGUMENT", f"mlp: eps is {eps}; expected a finite number of at least 0")
    native = native or load()
    out = torch.empty_like(x)
    if rows == 0:
        return out
    scratch = torch.empty(rows * (hidden + ffn), dtype=torch.float32)
    native.module.mlp(
        isa=native.isa,
        x=x.data_ptr(),
        norm_weight=norm_weight.data_ptr(),
        eps=eps,
        gate=gate.data_ptr(),
        up=up.data_ptr(),
        down=down.data_ptr(),
        residual=residual.data_ptr(),
        scratch=scratch.data_ptr(),
        scratch_size=scratch.numel(),
        out=out.data_ptr(),
        rows=rows,
        hidden=hidden,
        ffn=ffn,
        num_threads=native.num_threads,
    )
    return out


def _sizes(x: Tensor, gate: Tensor) -> tuple[int, int, int]:
    if x.dim() != 2 or gate.dim() != 2:
        raise UsageError(
            "SHAPE", f"mlp: x is {list(x.shape)} and gate {list(gate.shape)}; expected [rows, hidden] and [ffn, hidden]"
        )
    rows, hidden = x.shape
    ffn = gate.shape[0]
    if hidden == 0 or ffn == 0:
        raise UsageError("SHAPE", f"mlp: hidden is {hidden} and ffn {ffn}; expected at least 1")
    return rows, hidden, ffn


def _check(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tensor.device.type != "cpu":
        raise UsageError("DEVICE", f"mlp: {name} is on {tensor.device}; expected cpu; move it with .cpu()")
    if tensor.dtype != torch.float32:
        raise UsageError("DTYPE", f"mlp: {name} is {tensor.dtype}; expected torch.float32; convert it with .float()")
    if tuple(tensor.shape) != shape:
        raise UsageError("SHAPE", f"mlp: {name} is {list(tensor.shape)}; expected {list(shape)}")
    if not tensor.is_contiguous():
        raise UsageError("LAYOUT", f"mlp: {name} has strides {tensor.stride()}; make it contiguous with .contiguous()")
