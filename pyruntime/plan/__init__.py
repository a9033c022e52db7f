"""Plans: graphs bound to a target, with weights in place."""

from pyruntime.plan.compare import Difference, first_difference
from pyruntime.plan.lower import DTYPES, TARGETS, lower, resolve_device
from pyruntime.plan.plan import Plan
from pyruntime.plan.step import PlanStep, Watch

__all__ = [
    "DTYPES",
    "TARGETS",
    "Difference",
    "Plan",
    "PlanStep",
    "Watch",
    "first_difference",
    "lower",
    "resolve_device",
]
