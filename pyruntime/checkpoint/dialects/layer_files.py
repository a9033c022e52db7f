"""Lists of sublayers that pruning scripts write without a model: BlockPruner's search, and LLM-Drop's phase one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from pyruntime.checkpoint.dialects.declared import shown
from pyruntime.checkpoint.fields import some
from pyruntime.errors import UsageError
from pyruntime.spec import DropPlan

_BLOCK_PRUNER: Final = {"mha": "attention", "mlp": "mlp"}
# what LLM-Drop's target_layer and prune_method make of a list of kept ids
TARGETS: Final = ("attn", "mlp", "all", "block")


def block_pruner(table: Mapping[str, Any], choice: str | None) -> DropPlan:
    """The sublayers that {"n": [["mha" | "mlp", layer], ...], ...} removes in the step `choice` of its search.

    One step needs no choice. Raises UsageError DROP_PLAN.
    """
    steps = sorted(table, key=int)
    if choice is None and len(steps) > 1:
        raise UsageError("DROP_PLAN", f"BlockPruner's file has {len(steps)} steps; choose one with #n: {some(steps)}")
    step = steps[0] if choice is None else choice
    if step not in table:
        raise UsageError("DROP_PLAN", f"BlockPruner's file has no step {step[:80]!r}; the steps are {some(steps)}")
    found: dict[str, list[int]] = {kind: [] for kind in _BLOCK_PRUNER.values()}
    for entry in table[step]:
        kind = entry[0] if isinstance(entry, list) and len(entry) == 2 else None
        if not isinstance(kind, str) or kind not in _BLOCK_PRUNER:
            raise UsageError("DROP_PLAN", f'step {step} holds {shown(entry)}; expected ["mha" or "mlp", layer]')
        found[_BLOCK_PRUNER[kind]].append(entry[1])
    return DropPlan(tuple(found["attention"]), tuple(found["mlp"]), f"BlockPruner, {step} removed")


def layer_mapping(table: Mapping[str, Any], num_layers: int) -> DropPlan:
    """The layers that a layer_mapping.json {old id: new id} goes without. Raises UsageError DROP_PLAN."""
    return _without([int(old) for old in table], num_layers, "block", "layer_mapping.json")


def reserved_layers(
    kept: Sequence[Any], mapping: Mapping[str, Any] | None, num_layers: int, choice: str | None
) -> DropPlan:
    """What a reserved_layers.json of `kept` ids goes without; `mapping` is the layer_mapping.json beside it, if any.

    Ids from `num_layers` on are MLPs, so that a list that has some names both kinds. One that has none may mean
    attentions, MLPs or, where a mapping of the same ids lies beside it, whole layers. Raises UsageError DROP_PLAN.
    """
    ids = list(kept)
    for each in ids:
        if isinstance(each, bool) or not isinstance(each, int) or not 0 <= each < 2 * num_layers:
            raise UsageError(
                "DROP_PLAN",
                f"the list of kept layers holds {shown(each)}; expected ids from 0 to {2 * num_layers - 1}",
            )
    if len(set(ids)) != len(ids):
        raise UsageError("DROP_PLAN", "the list of kept layers names one twice; expected each once")
    if choice is not None and choice not in TARGETS:
        raise UsageError("DROP_PLAN", f"#{choice[:80]} is no target; expected one of {', '.join(TARGETS)}")
    target = choice or _target(ids, mapping, num_layers)
    return _without(ids, num_layers, target, f"reserved_layers.json, {target}")


def _target(ids: Sequence[int], mapping: Mapping[str, Any] | None, num_layers: int) -> str:
    if any(each >= num_layers for each in ids):
        return "all"
    if mapping is not None and {str(each) for each in ids} == mapping.keys():
        return "block"
    raise UsageError(
        "DROP_PLAN",
        "a list of kept layers without a layer_mapping.json of the same layers does not say whether attentions, MLPs "
        f"or layers are kept; say it behind the path: {', '.join(f'#{target}' for target in TARGETS)}",
    )


def _without(kept: Sequence[int], num_layers: int, target: str, origin: str) -> DropPlan:
    count = 2 * num_layers if target == "all" else num_layers
    beyond = [each for each in kept if each >= count]
    if beyond:
        raise UsageError("DROP_PLAN", f"kept layer {beyond[0]} does not exist; the ids are 0 to {count - 1}")
    gone = sorted(set(range(count)) - set(kept))
    attention = [each for each in gone if each < num_layers and target != "mlp"]
    mlp = [each % num_layers for each in gone if target in ("mlp", "block") or each >= num_layers]
    return DropPlan(tuple(attention), tuple(mlp), origin)
