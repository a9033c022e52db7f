"""What every op says about itself: the weights it reads, the widths it maps, the arithmetic it costs."""

from __future__ import annotations

import math
from typing import Protocol

from pyruntime.spec import Linear, Norm

Shape = tuple[int, ...]


class Attrs(Protocol):
    """Parameters of one node: frozen data, equal parameters are equal."""

    def weight_shapes(self) -> dict[str, Shape]:
        """Weights the op reads, by role, such as "gate.weight"."""
        ...

    def in_widths(self) -> tuple[int, ...]:
        """Values per row of each input buffer."""
        ...

    def out_widths(self) -> tuple[int, ...]:
        """Values per row of each output buffer."""
        ...

    def flops_per_row(self) -> int:
        """Floating-point operations of the matrix products for one row, a multiply-add counted as two."""
        ...


def linear_shapes(role: str, linear: Linear | None) -> dict[str, Shape]:
    """Weights of a linear map under the name `role`; none where it is absent."""
    if linear is None:
        return {}
    bias = {f"{role}.bias": (linear.out_features,)} if linear.bias else {}
    return {f"{role}.weight": linear.weight_shape, **bias}


def norm_shapes(role: str, norm: Norm | None) -> dict[str, Shape]:
    """Weights of a norm under the name `role`; none where it is absent or weightless."""
    if norm is None:
        return {}
    weight = {f"{role}.weight": (norm.size,)} if norm.weight else {}
    return {**weight, **({f"{role}.bias": (norm.size,)} if norm.bias else {})}


def linear_flops(*linears: Linear | None) -> int:
    """Multiply-adds of the linear maps for one row, times two."""
    return sum(2 * math.prod(linear.weight_shape) for linear in linears if linear is not None)
