"""How checkpoints say what they go without: a file per dialect, each giving a DropPlan over original layers."""

from pyruntime.checkpoint.dialects.llm_drop import llm_drop_plan
from pyruntime.checkpoint.dialects.per_layer import per_layer_overrides

__all__ = ["llm_drop_plan", "per_layer_overrides"]
