"""A mixture of experts: router, the chosen experts of each row, and the MLP that all rows share."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from pyruntime.ops.attrs import Shape, linear_flops, linear_shapes
from pyruntime.ops.linear import project
from pyruntime.ops.mlp import MlpAttrs, forward
from pyruntime.ops.step import View
from pyruntime.spec import EXPERT_MAPS, MLP, Linear, MoE


@dataclass(frozen=True, slots=True)
class MoeAttrs:
    """A mixture of experts on an input that is normed already."""

    moe: MoE

    def weight_shapes(self) -> dict[str, Shape]:
        """Router, each expert's maps, the shared MLP's and its gate."""
        moe = self.moe
        shapes = linear_shapes("router", moe.router)
        for expert in range(moe.num_experts):
            for name in EXPERT_MAPS:
                shapes |= linear_shapes(f"experts.{expert}.{name}", getattr(moe, name))
        if moe.shared is not None:
            shapes |= {f"shared.{role}": shape for role, shape in MlpAttrs(moe.shared).weight_shapes().items()}
        return shapes | linear_shapes("shared_gate", moe.shared_gate)

    def in_widths(self) -> tuple[int, ...]:
        """The normed input."""
        return (self.moe.in_size,)

    def out_widths(self) -> tuple[int, ...]:
        """The weighted sum of what the experts give."""
        return (self.moe.out_size,)

    def flops_per_row(self) -> int:
        """The router, `top_k` experts, the shared MLP and its gate."""
        moe = self.moe
        shared = 0 if moe.shared is None else MlpAttrs(moe.shared).flops_per_row()
        return linear_flops(moe.router, moe.shared_gate) + moe.top_k * linear_flops(moe.gate, moe.up, moe.down) + shared

    def values_read(self, rows: int) -> float:
        """Weights that a step of `rows` rows reads, those of an expert once, whatever number of rows chooses it.

        Of E experts, rows that choose k of them each at random read E (1 - (1 - k/E)^rows) in the mean; rows that agree
        more, as those of one text do, read fewer.
        """
        moe = self.moe
        maps: list[Linear] = [getattr(moe, name) for name in EXPERT_MAPS]
        of_expert = sum(math.prod(each.weight_shape) for each in maps)
        whole = sum(math.prod(shape) for shape in self.weight_shapes().values())
        return whole - moe.num_experts * math.pow(1.0 - moe.top_k / moe.num_experts, rows) * of_expert


def reference(
    attrs: MoeAttrs, weights: Mapping[str, torch.Tensor], inputs: Sequence[torch.Tensor], view: View
) -> tuple[torch.Tensor, ...]:
    """[rows, hidden]. Of experts that are equally probable, those with lower numbers are chosen."""
    moe, x = attrs.moe, inputs[0]
    chosen, shares = _route(moe, project("router", weights, x))
    expert = MlpAttrs(MLP(gate=moe.gate, up=moe.up, down=moe.down, activation=moe.activation))
    y = torch.zeros(x.shape[0], moe.out_size, dtype=x.dtype, device=x.device)
    for index in chosen.unique().tolist():
        rows, places = (chosen == index).nonzero(as_tuple=True)
        own = forward(expert, _below(f"experts.{index}.", weights, expert), x[rows])
        y.index_add_(0, rows, own * shares[rows, places, None])
    if moe.shared is not None:
        shared = MlpAttrs(moe.shared)
        own = forward(shared, _below("shared.", weights, shared), x)
        y = y + (own if moe.shared_gate is None else torch.sigmoid(project("shared_gate", weights, x)) * own)
    return (y,)


def _route(moe: MoE, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The experts of each row and what each counts, both [rows, top_k]."""
    probabilities = torch.softmax(scores, dim=-1)
    # topk leaves open which of equal values it takes
    sorted_ones, order = probabilities.sort(dim=-1, descending=True, stable=True)
    shares, chosen = sorted_ones[:, : moe.top_k], order[:, : moe.top_k]
    if moe.normalize:
        shares = shares / shares.sum(-1, keepdim=True)
    return chosen, shares * moe.routed_scale


def _below(prefix: str, weights: Mapping[str, torch.Tensor], attrs: MlpAttrs) -> dict[str, torch.Tensor]:
    return {role: weights[prefix + role] for role in attrs.weight_shapes()}
