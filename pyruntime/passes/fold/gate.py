"""When a rewrite that is exact in real numbers is refused: what rounding to a dtype makes of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch

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


def judge_inverse(key: torch.Tensor, made: torch.Tensor, value: torch.Tensor, dtype: str) -> Verdict:
    """Whether values may be made of keys: `made` (key x) instead of `value` x, with everything stored in `dtype`.

    All are float64 [outputs, inputs]. The error is the mean square of the difference over that of the values, for
    random normal inputs.
    """
    if not all(bool(torch.isfinite(each).all()) for each in (key, made, value)):
        return Verdict(torch.inf, torch.inf, "it has values that are NaN or infinite, or no inverse")
    condition = float(torch.linalg.cond(key))
    x = rounded(samples(key.shape[1]), dtype)
    expected = x @ value.T
    found = rounded(rounded(x @ rounded(key, dtype).T, dtype) @ rounded(made, dtype).T, dtype)
    nmse = float((found - expected).square().mean() / expected.square().mean())
    # written so that a NaN is refused
    if not condition <= CONDITION_LIMITS[dtype]:
        return Verdict(condition, nmse, f"condition number {condition:.1e}, at most {CONDITION_LIMITS[dtype]:.0e}")
    if not nmse <= NMSE_LIMIT:
        return Verdict(condition, nmse, f"NMSE {nmse:.1e}, at most {NMSE_LIMIT:.0e}")
    return Verdict(condition, nmse, None)


def samples(size: int) -> torch.Tensor:
    """Normal vectors [n, size], always the same: what stands behind a norm is about of their size."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(_SAMPLES, size, dtype=torch.float64, generator=generator)


def rounded(values: torch.Tensor, dtype: str) -> torch.Tensor:
    """float64 `values` as `dtype` holds them."""
    return values.to(getattr(torch, dtype)).double()
