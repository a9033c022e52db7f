"""When a rewrite that is exact in real numbers is refused: what rounding to a dtype makes of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import torch

from pyruntime.checkpoint import Weight
from pyruntime.checkpoint.computed import exact
from pyruntime.passes.fold.norms import ONE_PLUS
from pyruntime.spec import Attention, Norm

# condition numbers above which an inverse is refused, and the error of what it gives (mean squares)
CONDITION_LIMITS: Final = {"bfloat16": 1e3, "float16": 1e4, "float32": 1e6, "float64": 1e12}
NMSE_LIMIT: Final = 1e-3
# largest change of a normed value that a cancelled norm may cause: well below what rounding to the dtype does
CHANGE_LIMITS: Final = {"bfloat16": 1e-3, "float16": 1e-4, "float32": 1e-6, "float64": 1e-12}
_SAMPLES: Final = 64


@dataclass(frozen=True, slots=True)
class Verdict:
    """Condition number and error of a rewrite in a dtype; `refused` says why it must not be, if so."""

    condition: float
    nmse: float
    refused: str | None

    def line(self) -> str:
        """One line for people."""
        return f"condition number {self.condition:.1e}, NMSE {self.nmse:.1e}"


def judge_inverse(
    key: torch.Tensor,
    made: torch.Tensor,
    value: torch.Tensor,
    dtype: str,
    x: torch.Tensor,
    bias: torch.Tensor | float = 0.0,
) -> Verdict:
    """Whether values may be made of keys, with everything stored in `dtype`.

    They are `made` (key x + bias) - made bias instead of `value` x: float64 [outputs, inputs], `x` [n, inputs]. The
    error is the mean square of the difference over that of the values.
    """
    # not at the top: merges import folds
    from pyruntime.passes.merge.algebra import Factored

    if not all(bool(torch.isfinite(each).all()) for each in (key, made, value)):
        return Verdict(torch.inf, torch.inf, "it has values that are NaN or infinite, or no inverse")
    condition = Factored.of(key).condition()
    x = rounded(x, dtype)
    expected = x @ value.T
    keys = rounded(x @ rounded(key, dtype).T + bias, dtype)
    shift = torch.as_tensor(bias, dtype=torch.float64).expand(len(key)) @ made.T
    found = rounded(keys @ rounded(made, dtype).T - rounded(shift, dtype), dtype)
    nmse = float((found - expected).square().mean() / expected.square().mean())
    # written so that a NaN is refused
    if not condition <= CONDITION_LIMITS[dtype]:
        return Verdict(condition, nmse, f"condition number {condition:.1e}, at most {CONDITION_LIMITS[dtype]:.0e}")
    if not nmse <= NMSE_LIMIT:
        return Verdict(condition, nmse, f"NMSE {nmse:.1e}, at most {NMSE_LIMIT:.0e}")
    return Verdict(condition, nmse, None)


def samples(weights: Mapping[str, Weight], prefix: str, attention: Attention) -> torch.Tensor:
    """What maps of `attention` may read [n, in_size]: normal vectors, always the same, with gain and bias of its norm.

    What a norm gives before its gain is of their size; without a norm theirs is as good as any.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(_SAMPLES, attention.in_size, dtype=torch.float64, generator=generator)
    pre = attention.pre
    if pre is None:
        return x
    x = x * gain_of(weights, f"{prefix}pre", pre)
    return x + exact(weights[f"{prefix}pre.bias"]) if pre.bias else x


def gain_of(weights: Mapping[str, Weight], name: str, norm: Norm) -> torch.Tensor:
    """What the norm called `name` multiplies by, in float64 [size]."""
    if not norm.weight:
        return torch.ones(norm.size, dtype=torch.float64)
    return exact(weights[f"{name}.weight"]) + float(norm.kind in ONE_PLUS)


def rounded(values: torch.Tensor, dtype: str) -> torch.Tensor:
    """float64 `values` as `dtype` holds them."""
    return values.to(getattr(torch, dtype)).double()
