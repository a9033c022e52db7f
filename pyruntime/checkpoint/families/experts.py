"""Mixtures of experts as configurations describe them: how many, how wide, in which layers, and which share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pyruntime.checkpoint.families.keys import Key
from pyruntime.checkpoint.fields import Fields
from pyruntime.spec import MLP, Activation, Linear, MoE, Norm
from pyruntime.spec.bounds import MAX_EXPERTS, MAX_WIDTH


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    """Mixtures of experts in place of MLPs, in the layers that `at` names (all, unless it says otherwise).

    `width` is the key of an expert's width, `normalize` says whether the chosen probabilities are divided by their sum,
    `scale` is what they are multiplied by then. `shared_width` gives the width of the MLP that every token passes, None
    where there is none; it is weighted by a sigmoid where it is `gated`.
    """

    count: Key
    top_k: Key
    width: Key
    normalize: bool | Key = True
    scale: Key | None = None
    shared_width: Callable[[Fields], int | None] = lambda fields: None
    gated: bool = False
    at: Callable[[Fields, int], bool] = lambda fields, index: True

    def moe(self, fields: Fields, hidden_size: int, activation: Activation, norm: Norm) -> MoE:
        """The mixture that `fields` describe behind its pre-norm. Raises UsageError CONFIG."""
        count = fields.integer(self.count.name, 1, MAX_EXPERTS, *self.count.defaults())
        width = fields.integer(self.width.name, 1, MAX_WIDTH, *self.width.defaults())
        normalize = self.normalize
        if isinstance(normalize, Key):
            normalize = bool(fields.boolean(normalize.name, normalize.default))
        shared = self.shared_width(fields)
        gated = self.gated and shared is not None
        return MoE(
            num_experts=count,
            top_k=fields.integer(self.top_k.name, 1, MAX_EXPERTS, *self.top_k.defaults()),
            router=Linear(in_features=hidden_size, out_features=count),
            gate=Linear(in_features=hidden_size, out_features=width),
            up=Linear(in_features=hidden_size, out_features=width),
            down=Linear(in_features=width, out_features=hidden_size),
            activation=activation,
            normalize=normalize,
            routed_scale=1.0 if self.scale is None else fields.real(self.scale.name, 0.0, 1e6, self.scale.default),
            shared=None if shared is None else _shared(hidden_size, shared, activation),
            shared_gate=Linear(in_features=hidden_size, out_features=1) if gated else None,
            pre=norm,
        )


def _shared(hidden_size: int, width: int, activation: Activation) -> MLP:
    widen = Linear(in_features=hidden_size, out_features=width)
    down = Linear(in_features=width, out_features=hidden_size)
    return MLP(gate=widen, up=widen, down=down, activation=activation)
