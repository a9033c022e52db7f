"""Rotary embeddings as configurations describe them, in both styles: rope_theta + rope_scaling, and rope_parameters."""

from __future__ import annotations

import math
from typing import Any, Final

from pyruntime.checkpoint.fields import Fields
from pyruntime.errors import UsageError
from pyruntime.spec import Rope, RopeKind
from pyruntime.spec.bounds import MAX_POSITION

_KINDS: Final = {kind.value: kind for kind in RopeKind}
_HIGH: Final = 1e12
_YARN_BETA_FAST: Final = 32.0
_YARN_BETA_SLOW: Final = 1.0


def rope_from(fields: Fields, head_dim: int, max_position: int, default_theta: float = 10000.0) -> Rope:
    """The Rope of a configuration. Raises UsageError CONFIG for kinds and values that are not supported."""
    parameters, theta = _parameters(fields, default_theta)
    own = Fields(parameters)
    kinds = {own.choice(name, _KINDS, None) for name in ("rope_type", "type")} - {None}
    if len(kinds) > 1:
        raise UsageError("CONFIG", f"config.json: rope_type and type are {' and '.join(sorted(kinds))}; remove one")
    kind = kinds.pop() if kinds else RopeKind.DEFAULT
    fraction = own.real("partial_rotary_factor", 0.0, 1.0, fields.real("partial_rotary_factor", 0.0, 1.0, 1.0))
    values: dict[str, Any] = {}
    if kind is not RopeKind.DEFAULT:
        values["factor"] = own.real("factor", 0.0, 1e6)
    if kind is RopeKind.DYNAMIC:
        values["original_max_position"] = max_position
    if kind in (RopeKind.LLAMA3, RopeKind.YARN):
        # transformers looks for the trained context beside the rope parameters too, then takes the whole one
        trained = fields.integer("original_max_position_embeddings", 1, MAX_POSITION, max_position)
        values["original_max_position"] = own.integer("original_max_position_embeddings", 1, MAX_POSITION, trained)
    if kind is RopeKind.LLAMA3:
        values["low_freq_factor"] = own.real("low_freq_factor", 0.0, 1e6)
        values["high_freq_factor"] = own.real("high_freq_factor", 0.0, 1e6)
    if kind is RopeKind.YARN:
        values.update(_yarn(own, values["factor"]))
    own.ignore(frozenset({"rope_theta", "rope_type", "type"}))
    if own.unused():
        raise UsageError("CONFIG", f"rope kind {kind} has the unknown parameters {list(own.unused())}; not supported")
    return Rope(kind=kind, dim=int(head_dim * fraction), theta=theta, **values)


def _parameters(fields: Fields, default_theta: float) -> tuple[dict[str, Any], float]:
    old, new = fields.raw("rope_scaling"), fields.raw("rope_parameters")
    for name, value in (("rope_scaling", old), ("rope_parameters", new)):
        if value is not None and not isinstance(value, dict):
            raise UsageError("CONFIG", f"config.json: {name} is {value!r}; expected an object")
    if old and new is not None and old != new:
        raise UsageError("CONFIG", "config.json: rope_scaling and rope_parameters differ; remove one")
    if new is not None and any(isinstance(value, dict) for value in new.values()):
        raise UsageError("CONFIG", "config.json: rope_parameters differ by layer type; not supported for this family")
    parameters: dict[str, Any] = new if new is not None else (old or {})
    outer = fields.real("rope_theta", 0.0, _HIGH, None)
    inner = Fields(parameters).real("rope_theta", 0.0, _HIGH, None)
    if outer is not None and inner is not None and outer != inner:
        raise UsageError(
            "CONFIG", f"config.json: rope_theta is {outer:g} and, in rope_parameters, {inner:g}; remove one"
        )
    return parameters, next((theta for theta in (inner, outer) if theta is not None), default_theta)


def _yarn(own: Fields, factor: float) -> dict[str, Any]:
    """Defaults of YaRN (Peng et al. 2023): attention factor 0.1 ln(factor) + 1, or the ratio that mscale gives."""

    def magnitude(mscale: float) -> float:
        return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0

    mscale, mscale_all = own.real("mscale", 0.0, 1e6, None), own.real("mscale_all_dim", 0.0, 1e6, None)
    inferred = magnitude(mscale) / magnitude(mscale_all) if mscale and mscale_all else magnitude(1.0)
    return {
        "beta_fast": own.real("beta_fast", 0.0, 1e6, _YARN_BETA_FAST),
        "beta_slow": own.real("beta_slow", 0.0, 1e6, _YARN_BETA_SLOW),
        "attention_factor": own.real("attention_factor", 0.0, 1e6, inferred),
        "truncate": own.boolean("truncate", True),
    }
