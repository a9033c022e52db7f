"""Rotary embeddings as configurations describe them, in both styles: rope_theta + rope_scaling, and rope_parameters."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final

from pyruntime.checkpoint.fields import Fields, some
from pyruntime.errors import UsageError
from pyruntime.spec import Rope, RopeKind
from pyruntime.spec.bounds import MAX_HEAD_DIM, MAX_POSITION, check_real

_HIGH: Final = 1e12
_YARN_BETA_FAST: Final = 32.0
_YARN_BETA_SLOW: Final = 1.0


@dataclass(frozen=True, slots=True)
class RopeKeys:
    """Where a family keeps theta and the share of a head that turns; without `fraction`, heads turn whole.

    `local_theta` is the key of the theta of sliding layers, in families whose rope differs by layer type; rope scaling
    then belongs to the other layers alone. `trained_context` holds where original_max_position_embeddings is absent
    (None: the whole context).
    """

    theta: str = "rope_theta"
    default_theta: float = 10000.0
    fraction: str | None = None
    default_fraction: float = 1.0
    local_theta: str | None = None
    default_local_theta: float = 10000.0
    trained_context: int | None = None


def rope_from(fields: Fields, keys: RopeKeys, head_dim: int, max_position: int, *, sliding: bool = False) -> Rope:
    """The Rope of a configuration. Raises UsageError CONFIG for kinds and values that are not supported."""
    own, theta, nested = _parameters(fields, keys, sliding)
    kind = _kind(own, keys)
    values: dict[str, Any] = {}
    if kind not in (RopeKind.DEFAULT, RopeKind.LONGROPE):
        values["factor"] = own.real("factor", 0.0, 1e6)
    if kind is RopeKind.DYNAMIC:
        values["original_max_position"] = max_position
    if kind in (RopeKind.LLAMA3, RopeKind.YARN, RopeKind.LONGROPE):
        values["original_max_position"] = _trained(fields, own, keys, nested) or max_position
    if kind is RopeKind.LLAMA3:
        values["low_freq_factor"] = own.real("low_freq_factor", 0.0, 1e6)
        values["high_freq_factor"] = own.real("high_freq_factor", 0.0, 1e6)
    if kind is RopeKind.YARN:
        values.update(_yarn(own, values["factor"]))
    dim = int(head_dim * _fraction(fields, own, keys))
    if kind is RopeKind.LONGROPE:
        values.update(_longrope(own, dim, max_position, values["original_max_position"]))
    own.ignore(frozenset({"rope_theta", "rope_type", "type"}))
    if own.unused():
        raise UsageError(
            "CONFIG",
            f"config.json: rope kind {kind} knows no {some(own.unused())}; remove it, or name another kind in "
            "rope_type",
        )
    return Rope(kind=kind, dim=dim, theta=theta, **values)


def _kind(own: Fields, keys: RopeKeys) -> RopeKind:
    names = {kind.value: kind for kind in RopeKind} | {"su": RopeKind.LONGROPE}
    new, old = (own.choice(name, names, None) for name in ("rope_type", "type"))
    if new is not None and old not in (None, new):
        raise UsageError("CONFIG", f"config.json: rope_type is {new} and type is {old}; remove one")
    if keys.local_theta is not None and new is None and old is not None:
        # transformers overlooks it here and scales nothing
        raise UsageError("CONFIG", f"config.json: the rope's type is {old}; write rope_type instead of type")
    return new or old or RopeKind.DEFAULT


def _trained(fields: Fields, own: Fields, keys: RopeKeys, nested: bool) -> int | None:
    """The trained context. transformers lets the key beside the rope's parameters win where both are there."""
    name = "original_max_position_embeddings"
    inner: int | None = own.integer(name, 1, MAX_POSITION, None)
    outer: int | None = None if nested else fields.integer(name, 1, MAX_POSITION, keys.trained_context)
    if inner is not None and outer is not None and inner != outer:
        raise UsageError(
            "CONFIG", f"config.json: {name} is {outer} and, in the parameters of the rope, {inner}; remove one"
        )
    return inner if outer is None else outer


def _fraction(fields: Fields, own: Fields, keys: RopeKeys) -> float:
    outer = fields.real(keys.fraction or "partial_rotary_factor", 0.0, 1.0, keys.default_fraction)
    fraction = float(own.real("partial_rotary_factor", 0.0, 1.0, outer))
    if keys.fraction is None and fraction != 1.0:
        # transformers ignores the key with default rope, and cannot run it with any other
        raise UsageError(
            "CONFIG", "config.json: partial_rotary_factor is not 1; this family turns whole heads: remove the key"
        )
    return fraction


def _parameters(fields: Fields, keys: RopeKeys, sliding: bool) -> tuple[Fields, float, bool]:
    """The rope's own parameters, its theta, and whether the parameters are given by layer type."""
    old, new = fields.inner("rope_scaling"), fields.inner("rope_parameters")
    local = sliding and keys.local_theta is not None
    nested = False
    if new is not None and (keys.local_theta is not None or new.has_objects()):
        nested, new = True, _of_layer_type(new, keys, local)
    elif local:
        old = None
    if old and new is not None and not old.equals(new):
        raise UsageError("CONFIG", "config.json: rope_scaling and rope_parameters differ; remove one")
    own = new or old or Fields({})
    name, default = (keys.local_theta, keys.default_local_theta) if local else (keys.theta, keys.default_theta)
    assert name is not None
    outer = fields.real(name, 1.0, _HIGH, None)
    inner = own.real("rope_theta", 1.0, _HIGH, None)
    if outer is not None and inner is not None and outer != inner:
        raise UsageError("CONFIG", f"config.json: {name} is {outer:g} and, in rope_parameters, {inner:g}; remove one")
    return own, next((theta for theta in (inner, outer) if theta is not None), default), nested


def _of_layer_type(parameters: Fields, keys: RopeKeys, local: bool) -> Fields:
    if keys.local_theta is None:
        raise UsageError("CONFIG", "config.json: rope_parameters differ by layer type; not supported for this family")
    found = {name: parameters.inner(name) or Fields({}) for name in ("sliding_attention", "full_attention")}
    for each in found.values():
        # what no layer asks for must be right too
        each.real("rope_theta", 1.0, _HIGH, None)
    if parameters.unused():
        raise UsageError(
            "CONFIG",
            f"config.json: rope_parameters has {some(parameters.unused())}; expected sliding_attention and "
            "full_attention, with objects",
        )
    return found["sliding_attention" if local else "full_attention"]


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


def _yarn(own: Fields, factor: float) -> dict[str, Any]:
    """Defaults of YaRN (Peng et al. 2023): attention factor 0.1 ln(factor) + 1, or the ratio that mscale gives."""

    def magnitude(mscale: float) -> float:
        return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0

    mscale, mscale_all = own.real("mscale", 0.0, 1e6, None), own.real("mscale_all_dim", 0.0, 1e6, None)
    inferred = magnitude(mscale) / magnitude(mscale_all) if mscale and mscale_all else magnitude(1.0)
    return {
        "beta_fast": _or(own.real("beta_fast", 0.0, 1e6, None), _YARN_BETA_FAST),
        "beta_slow": _or(own.real("beta_slow", 0.0, 1e6, None), _YARN_BETA_SLOW),
        "attention_factor": _or(own.real("attention_factor", 0.0, 1e6, None), inferred),
        "truncate": own.boolean("truncate", True),
    }


def _longrope(own: Fields, dim: int, max_position: int, trained: int) -> dict[str, Any]:
    """LongRoPE (Ding et al. 2024): a divisor for each frequency, and sqrt(1 + ln(factor) / ln(trained context)).

    The long divisors serve sequences beyond the trained context, which are refused; they are checked all the same.
    """
    factor = _or(own.real("factor", 0.0, 1e6, None), max_position / trained)
    inferred = math.sqrt(1 + math.log(factor) / math.log(trained)) if factor > 1 and trained > 1 else 1.0
    short, _ = (_divisors(own, name, dim) for name in ("short_factor", "long_factor"))
    return {"divisors": short, "attention_factor": _or(own.real("attention_factor", 0.0, 1e6, None), inferred)}


def _divisors(own: Fields, name: str, dim: int) -> tuple[float, ...]:
    values = own.raw(name)
    if not isinstance(values, list) or len(values) != dim // 2 or len(values) > MAX_HEAD_DIM:
        raise UsageError("CONFIG", f"config.json: {name} of longrope is no list of {dim // 2} numbers")
    return tuple(check_real(f"{name} of longrope", value, 0.0, 1e6) for value in values)
