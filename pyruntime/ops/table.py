"""The one list of ops and implementations that plans choose from, and that tests and benchmarks iterate over."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch

from pyruntime.ops import add, attention, embed, gather, head, linear, mlp, mlp_chain, norm, qkv_rope
from pyruntime.ops.step import View

# (attrs, weights by role, input buffers, rows) -> output buffers
Run = Callable[[Any, Mapping[str, torch.Tensor], Sequence[torch.Tensor], View], tuple[torch.Tensor, ...]]


def _runs_everything(attrs: Any, dtype: torch.dtype) -> str | None:
    return None


@dataclass(frozen=True, slots=True)
class Implementation:
    """One way to run an op. `refuses` gives the reason why some attributes or dtype cannot be run, or None."""

    target: str
    run: Run
    refuses: Callable[[Any, torch.dtype], str | None] = _runs_everything


_REFERENCES: Final = {
    "embed": embed,
    "norm": norm,
    "qkv_rope": qkv_rope,
    "attention": attention,
    "linear": linear,
    "mlp": mlp,
    "mlp_chain": mlp_chain,
    "add": add,
    "gather": gather,
    "head": head,
}
# no plan has the target cpu yet; tests compare what stands here with the reference
_OTHERS: Final = {"mlp": (Implementation("cpu", mlp.on_cpu, mlp.refused_by_cpu),)}

OPS: Final[dict[str, tuple[Implementation, ...]]] = {
    name: (Implementation("reference", module.reference), *_OTHERS.get(name, ()))
    for name, module in _REFERENCES.items()
}
