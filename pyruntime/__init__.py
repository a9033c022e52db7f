"""pyruntime: inference for pruned transformer language models."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pyruntime.async_llm import AsyncLLM
    from pyruntime.engine.params import SamplingParams
    from pyruntime.engine.request import CompletionOutput, RequestOutput
    from pyruntime.errors import CheckpointError, PyruntimeError, RunError, UsageError
    from pyruntime.llm import LLM
    from pyruntime.spec import DropPlan

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "AsyncLLM",
    "CheckpointError",
    "CompletionOutput",
    "DropPlan",
    "PyruntimeError",
    "RequestOutput",
    "RunError",
    "SamplingParams",
    "UsageError",
    "__version__",
]

_HOMES = {
    "LLM": "llm",
    "AsyncLLM": "async_llm",
    "SamplingParams": "engine.params",
    "CompletionOutput": "engine.request",
    "RequestOutput": "engine.request",
    "CheckpointError": "errors",
    "PyruntimeError": "errors",
    "RunError": "errors",
    "UsageError": "errors",
    "DropPlan": "spec",
}


def __getattr__(name: str) -> Any:
    # torch takes a second to import; `pyruntime --help` and `pyruntime.errors` need not pay it
    if name in _HOMES:
        return getattr(importlib.import_module(f"pyruntime.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'pyruntime' has no attribute {name!r}")
