"""No speed without a green gate: a plan's logits against the same model in float64, or float32 for half precision."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch

from pyruntime.checkpoint import Model
from pyruntime.engine.memory import available_memory
from pyruntime.errors import RunError
from pyruntime.graph import build
from pyruntime.ops.step import SequenceSlice, make_step
from pyruntime.plan import DTYPES, Plan, lower

# whole-model limits: the float32 one is that of a matmul, half precision rounds every product's input
LIMITS: Final = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 5e-4}
_NUM_TOKENS: Final = 32


@dataclass(frozen=True, slots=True)
class GateResult:
    """Normalised mean squared error, its limit, and the dtype of the reference it was taken against."""

    nmse: float
    limit: float
    oracle: str

    def line(self) -> str:
        """One line for people."""
        return f"gate: NMSE {self.nmse:.1e} against {self.oracle} (limit {self.limit:.0e})"


def check_plan(plan: Plan, model: Model) -> GateResult:
    """Compare `plan` with the unfused reference on a fixed prompt.

    The reference computes in float64; where that does not fit, in float32 for a plan of half precision. Raises RunError
    NUMERICS beyond the limit, RunError MEMORY where no reference fits.
    """
    limit = LIMITS[plan.dtype]
    dtype = _oracle_dtype(plan)
    oracle = lower(build(model.spec), model, target="reference", dtype=dtype)
    found, expected = _logits(plan, model), _logits(oracle, model)
    nmse = nmse_of(found, expected)
    # written so that a NaN fails
    if not nmse <= limit:
        raise RunError("NUMERICS", f"the plan's logits have an NMSE of {nmse:.1e} against {dtype}; at most {limit:.0e}")
    return GateResult(nmse, limit, dtype)


def nmse_of(found: torch.Tensor, expected: torch.Tensor) -> float:
    """mean((found - expected)^2) / mean(expected^2), in float64; the two may be on different devices."""
    found, expected = found.cpu().double(), expected.cpu().double()
    return float((found - expected).square().mean() / expected.square().mean())


def _oracle_dtype(plan: Plan) -> str:
    """The most exact dtype whose weights fit in half of the memory; the other half is for what is computed."""
    names = ("float64", "float32") if plan.dtype.itemsize < torch.float32.itemsize else ("float64",)
    available = available_memory()
    if available is None:
        return names[0]
    for name in names:
        needed = plan.weight_bytes // plan.dtype.itemsize * DTYPES[name].itemsize * 2
        if needed <= available:
            return name
    raise RunError(
        "MEMORY",
        f"checking the results needs {needed / 2**30:.2f} GiB, twice the weights in {name}; "
        f"{available / 2**30:.2f} GiB are available, and no time is printed without the check",
    )


def _logits(plan: Plan, model: Model) -> torch.Tensor:
    count = min(_NUM_TOKENS, model.spec.max_position)
    # spread over the vocabulary, the same for every plan
    ids = [i * 7919 % model.spec.vocab_size for i in range(count)]
    step = make_step([SequenceSlice(ids, 0, range(count), range(count))], plan.new_cache(count, 1), plan.device)
    return plan.run(step)
