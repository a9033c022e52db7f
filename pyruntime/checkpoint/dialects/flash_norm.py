"""FlashNorm (Graef et al., arXiv 2407.09577): norms whose gains were folded away, and the flags that say so.

No flag is settled and the tool itself writes none, so the tensors count; flags may not contradict them or each other.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from pyruntime.checkpoint.families import Family
from pyruntime.checkpoint.fields import Fields
from pyruntime.checkpoint.folder import StoredTensor
from pyruntime.errors import UsageError
from pyruntime.spec import ModelSpec, Norm, NormKind

_SWITCHES: Final = ("flashnorm", "flash_norm", "flashnorm_folded")
_MODE: Final = "flashnorm_mode"
_HAS_WEIGHT: Final = "rms_norm_has_weight"
FLASH_NORM_KEYS: Final = frozenset({*_SWITCHES, _MODE, _HAS_WEIGHT})
_MODES: Final = {"strict": False, "compat": True}
_LAYER_ROLES: Final = ("attention", "mlp")
_FINAL: Final = "final_norm"


def weightless_roles(
    spec: ModelSpec, family: Family, stored: Mapping[str, StoredTensor], fields: Fields
) -> frozenset[str]:
    """Of "attention", "mlp" (their pre-norms) and "final_norm": those whose weights the files do not hold.

    Without a flag, no pre-norm of any layer may have a weight, and then the final norm may lack its own; with one, the
    roles stand for themselves. A role of which some norms have weights is never weightless. Raises UsageError CONFIG
    for flags that contradict each other or the files.
    """
    have_weights, said = _claims(fields)
    absent = {role for role, names in _names(spec, family).items() if not stored.keys() & names}
    if not said and not absent.issuperset(_names(spec, family).keys() - {_FINAL}):
        absent = set()
    if have_weights is not None and have_weights == bool(absent):
        found = "norms without weights" if absent else "a weight of every norm"
        raise UsageError(
            "CONFIG",
            f"config.json says that norms have {'' if have_weights else 'no '}weights (FlashNorm), and the files hold "
            f"{found}; correct config.json, or get the checkpoint that it was written for",
        )
    return frozenset(absent)


def _claims(fields: Fields) -> tuple[bool | None, bool]:
    """Whether the flags say that norms have weights (None: either), and whether any says that they were folded."""
    switches = [value for name in _SWITCHES if (value := fields.boolean(name, None)) is not None]
    claims = {
        name: value
        for name, value in {
            _MODE: fields.choice(_MODE, _MODES, None),
            _HAS_WEIGHT: fields.boolean(_HAS_WEIGHT, None),
        }.items()
        if value is not None
    }
    folded = any(switches)
    if False in switches:
        # where nothing was folded, the weights are there
        claims["flashnorm"] = True
    if len(set(claims.values())) > 1 or (folded and False in switches):
        named = ", ".join(sorted(key for key in FLASH_NORM_KEYS if fields.raw(key) is not None))
        raise UsageError("CONFIG", f"config.json: {named} contradict each other; remove the wrong one")
    have_weights = next(iter(claims.values()), None)
    return have_weights, folded or have_weights is False or fields.raw(_MODE) is not None


def _names(spec: ModelSpec, family: Family) -> dict[str, set[str]]:
    """The tensors of the norms that folding concerns, by role; roles without norms are left out."""
    found: dict[str, set[str]] = {}
    for layer in spec.layers:
        for kind, sublayer in layer.sublayers():
            if _folds(sublayer.pre):
                found.setdefault(kind, set()).add(family.tensor_name(f"layers.{layer.index}.{kind}.pre.weight"))
    if found and _folds(spec.final_norm):
        found[_FINAL] = {family.tensor_name(f"{_FINAL}.weight")}
    return found


def _folds(norm: Norm | None) -> bool:
    return norm is not None and norm.weight and norm.kind is NormKind.RMS and not norm.bias
