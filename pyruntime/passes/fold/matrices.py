"""What folds do with the stored weights of linear maps, triangular ones included."""

from __future__ import annotations

import torch

from pyruntime.spec import Linear


def matrix(linear: Linear, stored: torch.Tensor) -> torch.Tensor:
    """The stored weight of `linear` as [out_features, in_features]."""
    if not linear.triangular:
        return stored
    n = linear.in_features
    rows, columns = torch.tril_indices(n, n)
    dense = stored.new_zeros(n, n)
    dense[rows, columns] = stored
    return dense


def scale_inputs(linear: Linear, stored: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
    """W diag(gain), stored as W is."""
    if not linear.triangular:
        return stored * gain
    n = linear.in_features
    return stored * gain[torch.tril_indices(n, n)[1]]


def through(linear: Linear, stored: torch.Tensor, values: torch.Tensor, *bias: torch.Tensor) -> torch.Tensor:
    """W values (+ bias)."""
    return sum(bias, matrix(linear, stored) @ values)
