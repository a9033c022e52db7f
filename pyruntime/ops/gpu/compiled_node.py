"""Which nodes the CUDA C++ kernels can run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pyruntime.ops.attention import AttentionAttrs
from pyruntime.ops.gpu import compiled, compiled_attention
from pyruntime.ops.layout import PANEL
from pyruntime.ops.qkv_rope import QkvRopeAttrs


def refused(attrs: object, weights: Mapping[str, Tensor], dtype: torch.dtype, module: Any) -> str | None:
    """Why the kernels of `module` cannot run a node with these arranged `weights`, or None."""
    if module is None:
        return "the CUDA extension was not built"
    if isinstance(attrs, AttentionAttrs):
        # plans take no pages but multiples of this
        return compiled_attention.refused(attrs.attention, dtype, PANEL)
    if isinstance(attrs, QkvRopeAttrs) and (why := refused_heads(attrs)) is not None:
        return why
    widths = sorted({weight.shape[1] for weight in weights.values() if weight.dim() == 2})
    found = (compiled.refuses(module, width, dtype) for width in widths)
    return next((why for why in found if why is not None), None)


def refused_heads(attrs: QkvRopeAttrs) -> str | None:
    """Why the kernel of projections cannot run what is behind the product, or None."""
    attention = attrs.attention
    if attention.table or attention.columns is not None or None in attrs.linears().values():
        return "projections that were merged away"
    if any(attrs.norm_of(role) is not None for role in attrs.roles()):
        return "norms of heads"
    return None
