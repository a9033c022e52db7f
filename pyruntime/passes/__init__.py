"""Passes: functions from Model to Model."""

from pyruntime.passes.drop import (
    drop,
    kv_values_per_token,
    load_drop_plan,
    make_drop_plan,
    parse_layers,
    save_drop_plan,
)

__all__ = ["drop", "kv_values_per_token", "load_drop_plan", "make_drop_plan", "parse_layers", "save_drop_plan"]
