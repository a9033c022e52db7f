"""Checkpoints: read lazily and without trust."""

from pyruntime.checkpoint.folder import ReadOptions
from pyruntime.checkpoint.hub import resolve_model
from pyruntime.checkpoint.model import Model, PassReport
from pyruntime.checkpoint.reader import read_model
from pyruntime.checkpoint.weight import InMemory, TensorRef, Weight

__all__ = ["InMemory", "Model", "PassReport", "ReadOptions", "TensorRef", "Weight", "read_model", "resolve_model"]
