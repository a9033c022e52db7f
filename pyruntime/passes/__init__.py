"""Passes: functions from Model to Model."""

from pyruntime.passes.drop import (
    drop,
    kv_values_per_token,
    load_drop_plan,
    make_drop_plan,
    parse_layers,
    save_drop_plan,
)
from pyruntime.passes.merge import GateMode, MergeKind, MergeOptions, MergeReport, merge

__all__ = [
    "GateMode",
    "MergeKind",
    "MergeOptions",
    "MergeReport",
    "drop",
    "kv_values_per_token",
    "load_drop_plan",
    "make_drop_plan",
    "merge",
    "parse_layers",
    "save_drop_plan",
]
