"""What an op tells the C++ executor about one node: the fields of its step, which bindings_steps.cpp checks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace

import torch

from pyruntime.ops.layout import PANEL
from pyruntime.spec import Attention, Cached, Norm, NormKind, Rope

# address and number of elements
Memory = tuple[int, int]


@dataclass(frozen=True, slots=True)
class NativeStep:
    """One step of the executor: an op it knows and the fields of that op's struct in steps.h."""

    op: str
    fields: SimpleNamespace


@dataclass(frozen=True, slots=True)
class NativeNode:
    """A node of the plan as an op's `on_cpu` sees it: arranged weights, places of buffers, the plan's dtype.

    `rotary` gives the number of the table of angles of a rope, for the node's rows; `keep` gives the place of a tensor
    that is no weight, and holds it as long as the program.
    """

    weights: Mapping[str, torch.Tensor]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    wanted: bool
    dtype: torch.dtype
    rotary: Callable[[Rope], int]
    keep: Callable[[torch.Tensor], Memory]

    @property
    def dtype_name(self) -> str:
        """As C++ spells it."""
        return str(self.dtype).removeprefix("torch.")

    def step(self, op: str, **fields: object) -> NativeStep:
        """A step on the node's rows."""
        return NativeStep(op, SimpleNamespace(wanted=self.wanted, **fields))

    def residual(self, added: bool) -> int | None:
        """Place of the second input, where it is added to the result."""
        return self.inputs[1] if added else None

    def memory(self, name: str) -> Memory | None:
        """Where the weight `name` lies, or None where there is none."""
        tensor = self.weights.get(name)
        return None if tensor is None else (tensor.data_ptr(), tensor.numel())

    def norm(self, role: str, norm: Norm | None) -> SimpleNamespace | None:
        """Fields of a norm whose weights were arranged under `role`."""
        if norm is None:
            return None
        centered = norm.kind in (NormKind.LAYER, NormKind.LAYER_ONE_PLUS)
        gain, bias = self.memory(f"{role}.gain"), self.memory(f"{role}.bias")
        return SimpleNamespace(size=norm.size, eps=norm.eps, centered=centered, gain=gain, bias=bias)

    def matrix(self, name: str, inputs: int, outputs: int) -> SimpleNamespace:
        """Fields of a matrix that was arranged in panels under `name`."""
        words, bias, starts = (self.memory(each) for each in (name, f"{name}.bias", f"{name}.starts"))
        sizes = {"inputs": inputs, "outputs": outputs, "dtype": self.dtype_name}
        return SimpleNamespace(**sizes, words=words, bias=bias, starts=starts)


def padded(outputs: int) -> int:
    """Outputs of whole panels."""
    return -(-outputs // PANEL) * PANEL


def refused_dtype(attrs: object, dtype: torch.dtype) -> str | None:
    """Why the C++ kernels cannot run a dtype, or None."""
    if dtype in (torch.float32, torch.bfloat16):
        return None
    return f"its kernels take float32 and bfloat16, not {str(dtype).removeprefix('torch.')}"


def refused_cache(attention: Attention) -> str | None:
    """Why the C++ kernels cannot read and write the cache of an attention, or None."""
    if attention.cached is Cached.KEYS_VALUES:
        return None
    return f"its kernels cache keys and values, not {attention.cached} alone (slim attention)"
