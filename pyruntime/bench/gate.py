"""No speed without a green gate: a plan's logits against the same model in float64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch

from pyruntime.checkpoint import Model
from pyruntime.engine.engine import available_memory
from pyruntime.errors import RunError
from pyruntime.graph import build
from pyruntime.ops.step import SequenceSlice, make_step
from pyruntime.plan import Plan, lower

# whole-model limits: the float32 one is that of a matmul, half precision rounds every product's input
LIMITS: Final = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 5e-4}
_NUM_TOKENS: Final = 32


@dataclass(frozen=True, slots=True)
class GateResult:
    """Normalised mean squared error against float64 and its limit; None where the machine cannot hold float64."""

    nmse: float | None
    limit: float

    def line(self) -> str:
        """One line for people."""
        if self.nmse is None:
            return "gate: not run, the float64 model does not fit in memory"
        return f"gate: NMSE {self.nmse:.1e} against float64 (limit {self.limit:.0e})"


def check_plan(plan: Plan, model: Model) -> GateResult:
    """Compare `plan` with the unfused float64 reference on a fixed prompt; RunError NUMERICS beyond the limit."""
    limit = LIMITS[plan.dtype]
    available = available_memory()
    if available is not None and plan.weight_bytes // plan.dtype.itemsize * 8 > available // 2:
        return GateResult(None, limit)
    oracle = lower(build(model.spec), model, target="reference", dtype="float64")
    found, expected = _logits(plan, model), _logits(oracle, model)
    nmse = nmse_of(found, expected)
    # written so that a NaN fails
    if not nmse <= limit:
        raise RunError("NUMERICS", f"the plan's logits have an NMSE of {nmse:.1e} against float64; at most {limit:.0e}")
    return GateResult(nmse, limit)


def nmse_of(found: torch.Tensor, expected: torch.Tensor) -> float:
    """mean((found - expected)^2) / mean(expected^2), in float64."""
    expected = expected.double()
    return float((found.double() - expected).square().mean() / expected.square().mean())


def _logits(plan: Plan, model: Model) -> torch.Tensor:
    count = min(_NUM_TOKENS, model.spec.max_position)
    # spread over the vocabulary, the same for every plan
    ids = [i * 7919 % model.spec.vocab_size for i in range(count)]
    step = make_step([SequenceSlice(ids, 0, range(count), range(count))], plan.new_cache(count, 1), plan.device)
    return plan.run(step)
