"""Kernels of this machine against the reference: what `pyruntime doctor` runs."""

from pyruntime.bench.selfcheck.backends import Backend, backends
from pyruntime.bench.selfcheck.check import (
    OpCheck,
    Refusal,
    Verdict,
    check_gpu_and_remember,
    check_target,
    failures,
    refusals,
)

__all__ = [
    "Backend",
    "OpCheck",
    "Refusal",
    "Verdict",
    "backends",
    "check_gpu_and_remember",
    "check_target",
    "failures",
    "refusals",
]
