"""Multiple-choice items from JSON lines, in three forms."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from pyruntime.engine.texts import read_records
from pyruntime.errors import UsageError

_DELIMITER: Final = " "
_FORMS: Final = (
    '{"query", "choices", "gold"}, {"context_options", "continuation", "gold"} or {"good", "bad"}, perhaps with "uid"'
)


@dataclass(frozen=True, slots=True)
class Item:
    """Pairs of (context, continuation) of which number `gold` is right; `group` is a name of its kind, or "".

    `lengths` are the characters that a choice's log-likelihood is divided by for `acc_norm`.
    """

    pairs: tuple[tuple[str, str], ...]
    gold: int
    lengths: tuple[int, ...]
    group: str = ""


def read_items(path: Path, limit: int | None = None) -> tuple[Item, ...]:
    """The items of a .jsonl file, at most the first `limit`. Raises UsageError TASK naming the line that is wrong.

    {"query", "choices", "gold"}: which choice continues the query; one blank lies between, unless either brings white
    space. {"context_options", "continuation", "gold"}: behind which context the continuation is likeliest. {"good",
    "bad"}: the likelier of two texts.
    """
    found: list[Item] = []
    for where, value in read_records(path, "TASK"):
        if limit is not None and len(found) == limit:
            break
        found.append(_item(value, where))
    if not found:
        raise UsageError("TASK", f"{path} holds no item; expected a line of JSON for each")
    return tuple(found)


def _item(value: Mapping[str, Any], where: str) -> Item:
    group = value.get("uid", "")
    if not isinstance(group, str) or not group.isprintable():
        raise UsageError("TASK", f"{where}: uid is {str(group)[:40]!r}; expected one line of text")
    if "query" in value and "choices" in value:
        query, choices = _text(value, "query", where), _texts(value, "choices", where)
        pairs = tuple((query, _joined(query, choice)) for choice in choices)
        return Item(pairs, _gold(value, len(pairs), where), tuple(map(len, choices)), group)
    if "context_options" in value and "continuation" in value:
        options, text = _texts(value, "context_options", where), _text(value, "continuation", where)
        pairs = tuple((option, _joined(option, text)) for option in options)
        return Item(pairs, _gold(value, len(pairs), where), (len(text),) * len(pairs), group)
    if "good" in value and "bad" in value:
        texts = _text(value, "good", where), _text(value, "bad", where)
        return Item(tuple(("", text) for text in texts), 0, tuple(map(len, texts)), group)
    raise UsageError("TASK", f"{where}: has the keys {sorted(value)}; expected {_FORMS}")


def _joined(context: str, continuation: str) -> str:
    apart = context[-1:].isspace() or continuation[:1].isspace() or not context
    return continuation if apart else _DELIMITER + continuation


def _text(value: Mapping[str, Any], name: str, where: str) -> str:
    text = value[name]
    # nothing has no likelihood
    if not isinstance(text, str) or (not text and name != "query"):
        raise UsageError("TASK", f"{where}: {name} is {str(text)[:40]!r}; expected a text")
    return text


def _texts(value: Mapping[str, Any], name: str, where: str) -> list[str]:
    texts = value[name]
    good = isinstance(texts, list) and len(texts) > 1 and all(isinstance(each, str) and each for each in texts)
    if not good:
        raise UsageError("TASK", f"{where}: {name} is {str(texts)[:40]!r}; expected a list of two texts or more")
    return list(texts)


def _gold(value: Mapping[str, Any], count: int, where: str) -> int:
    gold = value.get("gold")
    if isinstance(gold, bool) or not isinstance(gold, int) or not 0 <= gold < count:
        raise UsageError("TASK", f"{where}: gold is {str(gold)[:40]!r}; expected an integer from 0 to {count - 1}")
    return gold
