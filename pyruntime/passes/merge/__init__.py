"""Merges of skipless models: projections that vanish into their neighbours, exactly, behind a numeric gate."""

from pyruntime.passes.merge.budget import budget_bytes
from pyruntime.passes.merge.merge import merge, read_per_token
from pyruntime.passes.merge.options import (
    MAX_COND,
    MAX_NMSE,
    Form,
    GateMode,
    LayerMerge,
    Measured,
    MergeKind,
    MergeOptions,
    MergeReport,
)

__all__ = [
    "MAX_COND",
    "MAX_NMSE",
    "Form",
    "GateMode",
    "LayerMerge",
    "Measured",
    "MergeKind",
    "MergeOptions",
    "MergeReport",
    "budget_bytes",
    "merge",
    "read_per_token",
]
