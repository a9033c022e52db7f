"""Tables of angles, computed in float64 once per rope and rounded once."""

from __future__ import annotations

import torch

from pyruntime.ops import rope
from pyruntime.spec import Rope


class RotaryCache:
    """cos and sin of positions 0 to `num_positions` - 1 for each rope that a plan uses, on its device."""

    def __init__(self, device: torch.device, num_positions: int) -> None:
        self.num_positions = num_positions
        self._device = device
        self._made: dict[Rope, tuple[torch.Tensor, torch.Tensor]] = {}

    def tables(self, spec: Rope) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin, float32 [positions, spec.dim / 2]; made when first asked for."""
        if spec not in self._made:
            angles = rope.rotary(spec, torch.arange(self.num_positions, device="cpu"))
            self._made[spec] = (angles.cos.float().to(self._device), angles.sin.float().to(self._device))
        return self._made[spec]
