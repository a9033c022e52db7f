"""`block_configs`: an entry per layer, as DeciLM / Nemotron-NAS and both generations of ModelOpt's Puzzletron write it.

The three differ in the names of their keys, and the newest in a list of typed subblocks; no name means two things.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

from pyruntime.checkpoint.dialects.declared import Declared, in_words, plan_of, shown
from pyruntime.checkpoint.fields import Fields
from pyruntime.errors import UsageError
from pyruntime.spec.bounds import MAX_HEADS, MAX_WIDTH

_KINDS: Final = {"attention": "attention", "ffn": "mlp"}
_NAMES: Final = {kind: name for name, kind in _KINDS.items()}
_FLAGS: Final = ("no_op", "replace_with_linear")
# names, plans for precision and for sparse kernels: without influence on what is computed in full precision
_HARMLESS: Final = frozenset({"kind", "name", "sparsify", "weights_precision"})


def _kv_heads(value: Any, fields: Fields) -> int:
    """Key-value heads from the number of query heads that share one."""
    num_heads = fields.integer("num_attention_heads", 1, MAX_HEADS)
    group = Fields({"n_heads_in_group": value}).integer("n_heads_in_group", 1, MAX_HEADS)
    if num_heads % group:
        raise UsageError("CONFIG", f"n_heads_in_group is {group}; num_attention_heads {num_heads} is no multiple of it")
    return int(num_heads // group)


def _width(value: Any, fields: Fields) -> int:
    """int(2/3 * ffn_mult * hidden_size), rounded up to a multiple of 256."""
    multiplier = Fields({"ffn_mult": value}).real("ffn_mult", 0.0, 1e6)
    size = int(2 * multiplier * fields.integer("hidden_size", 1, MAX_WIDTH) / 3)
    return -(-size // 256) * 256


def _same(value: Any, fields: Fields) -> Any:
    return value


# by the key of a subblock: the key of the configuration that it overrides in its layer, and with which value
_Meaning = tuple[str, Callable[[Any, Fields], Any]]
_SIZES: Final[dict[str, dict[str, _Meaning]]] = {
    "attention": {
        "n_heads_in_group": ("num_key_value_heads", _kv_heads),
        "num_key_value_heads": ("num_key_value_heads", _same),
        "num_kv_heads": ("num_key_value_heads", _same),
        "num_query_heads": ("num_attention_heads", _same),
        "qk_head_dim": ("head_dim", _same),
        "v_head_dim": ("head_dim", _same),
        "window_length": ("sliding_window", _same),
        "sliding_window_size": ("sliding_window", lambda value, fields: None if value == "full" else value),
    },
    "mlp": {
        "ffn_mult": ("intermediate_size", _width),
        "intermediate_size": ("intermediate_size", _same),
        "hidden_act": ("hidden_act", _same),
    },
}
# a key that gives way to another: an exact width counts, whatever its multiplier says
_GIVES_WAY: Final = {"ffn_mult": "intermediate_size"}
# what config.json must say for all layers where a block does not
_NEEDED: Final = {"attention": "num_key_value_heads", "mlp": "intermediate_size"}


def block_configs(fields: Fields, num_layers: int) -> Declared:
    """The no-ops, linear maps and sizes that the blocks list. Absence and null mean there are none.

    Raises UsageError CONFIG for another number of blocks than layers, for keys that are not known and not off, and
    where two of them contradict each other.
    """
    blocks = fields.raw("block_configs")
    if blocks is None:
        return Declared()
    if not isinstance(blocks, list) or len(blocks) != num_layers:
        found = f"has {len(blocks)} entries" if isinstance(blocks, list) else f"is {shown(blocks)}"
        raise UsageError(
            "CONFIG", f"config.json: block_configs {found}; expected a list of {num_layers}, one per layer"
        )
    flagged: dict[str, set[tuple[int, str]]] = {flag: set() for flag in _FLAGS}
    overrides: dict[int, dict[str, Any]] = {}
    for index, block in enumerate(blocks):
        for kind, subblock in _subblocks(block, f"config.json: block_configs[{index}]").items():
            where = f"config.json: block_configs[{index}] {_NAMES[kind]}"
            flag = _flag(subblock, where)
            sizes = _sizes(subblock, kind, where, fields)
            if flag is None:
                if _NEEDED[kind] not in sizes and fields.raw(_NEEDED[kind]) is None:
                    names = [name for name, (key, _) in _SIZES[kind].items() if key == _NEEDED[kind]]
                    raise UsageError("CONFIG", f"{where} has no size; expected one of {', '.join(names)}")
                overrides.setdefault(index, {}).update(sizes)
                continue
            flagged[flag].add((index, kind))
            heads_or_width = sorted(set(sizes) - {"hidden_act"})
            if flag == "no_op" and heads_or_width:
                raise UsageError("CONFIG", f"{where} is a no-op and has {', '.join(heads_or_width)}; remove one")
    linear = frozenset(flagged["replace_with_linear"])
    no_ops = plan_of(flagged["no_op"], "block_configs")
    said = in_words("block_configs", no_ops, num_layers, overrides, linear, gone_as="no-op ")
    return Declared(no_ops=no_ops, linear=linear, overrides=overrides, said=said)


def _subblocks(block: Any, where: str) -> dict[str, Mapping[str, Any]]:
    """The attention and the MLP of a block, each exactly once."""
    if not isinstance(block, dict):
        raise UsageError("CONFIG", f"{where} is {shown(block)}; expected an object with attention and ffn")
    _refuse_unknown(block, {*_KINDS, "subblock_configs"}, where)
    found: dict[str, Mapping[str, Any]] = {}
    for name, subblock in _named(block, where):
        if not isinstance(subblock, dict):
            raise UsageError("CONFIG", f"{where} {name} is {shown(subblock)}; expected an object")
        kind = _KINDS.get(name) if isinstance(name, str) else None
        if kind is None or kind in found:
            raise UsageError(
                "CONFIG", f"{where} has a subblock of kind {shown(name)}; expected attention and ffn, each once"
            )
        found[kind] = subblock
    if len(found) != len(_KINDS):
        raise UsageError("CONFIG", f"{where} says nothing about {_missing(found)}; expected attention and ffn")
    return found


def _missing(found: Mapping[str, Any]) -> str:
    return " and ".join(name for name, kind in _KINDS.items() if kind not in found)


def _named(block: Mapping[str, Any], where: str) -> Iterator[tuple[Any, Any]]:
    """(kind, subblock) of both generations: as keys, and as a typed list."""
    yield from ((name, block[name]) for name in _KINDS if block.get(name) is not None)
    typed = block.get("subblock_configs")
    if typed is None:
        return
    if not isinstance(typed, list) or not all(isinstance(each, dict) for each in typed):
        raise UsageError("CONFIG", f"{where} subblock_configs is no list of objects; expected one per subblock")
    yield from ((each.get("kind"), each) for each in typed)


def _flag(subblock: Mapping[str, Any], where: str) -> str | None:
    """The one flag that is set."""
    flags = Fields(subblock)
    try:
        on = [flag for flag in _FLAGS if flags.boolean(flag, False)]
    except UsageError:
        raise UsageError("CONFIG", f"{where}: {' and '.join(_FLAGS)} must be true or false") from None
    if len(on) > 1:
        raise UsageError("CONFIG", f"{where} is a no-op and a linear map at once; expected one of them")
    return on[0] if on else None


def _sizes(subblock: Mapping[str, Any], kind: str, where: str, fields: Fields) -> dict[str, Any]:
    """What the subblock overrides; null means what the model has."""
    meanings = _SIZES[kind]
    harmless = _HARMLESS if subblock.get("num_sink_tokens") else _HARMLESS | {"num_sink_tokens"}
    _refuse_unknown(subblock, {*meanings, *_FLAGS, *harmless}, where)
    found: dict[str, Any] = {}
    for name, (key, meaning) in meanings.items():
        value = subblock.get(name)
        if value is None:
            continue
        try:
            new = meaning(value, fields)
        except UsageError as error:
            raise UsageError("CONFIG", f"{where}: {str(error).removeprefix('config.json: ')}") from None
        if name in _GIVES_WAY and subblock.get(_GIVES_WAY[name]) is not None:
            continue
        if key in found and found[key] != new:
            raise UsageError("CONFIG", f"{where} gives two values of {key}: {shown(found[key])} and {shown(new)}")
        found[key] = new
    return found


def _refuse_unknown(entry: Mapping[str, Any], known: set[str], where: str) -> None:
    """What is null or false is switched off, whatever it is."""
    wrong = sorted(key for key, value in entry.items() if key not in known and value is not None and value is not False)
    if wrong:
        shown = [key[:80] if key.isprintable() else ascii(key[:80]) for key in wrong[:10]]
        raise UsageError("CONFIG", f"{where} has {', '.join(shown)}; not supported")
