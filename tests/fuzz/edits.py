"""Random edits of JSON data that keep most of it valid: one value replaced, a key doubled, an offset off by one."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Sequence
from random import Random
from typing import Any, Final

Slot = tuple[Any, Any]
# what no Python value can express, written into the text as it stands
_RAW: Final = re.compile(r'"@raw:([^"@]*)@"')

_NUMBERS: Final[tuple[Any, ...]] = (
    0, 1, 2, 3, 4, 5, 7, 8, 16, 63, 64, 255, 256, 1023, 1024, 1025, 4096, -1, -2, -8, 1 << 20, (1 << 20) + 1, 1 << 24,
    (1 << 24) + 1, (1 << 31) - 1, 1 << 31, 1 << 32, 1 << 53, (1 << 63) - 1, 1 << 63, 1 << 64, 10**30, 10**400,
    -(10**400), 0.0, -0.0, 0.5, 1.0, 2.0, 1e-5, 1e-320, 1e12, 1e300, 1.7976931348623157e308, -1e-5, 0.1,
)  # fmt: skip
_RAWS: Final = (
    "NaN", "Infinity", "-Infinity", "1e400", "-1e400", "-0", "1E5", "1e-999", "0x10", "01", "+1", "1.", ".5", "tru",
    "", "[,]", "{}{}", "1" * 4300, "-" + "9" * 4300, "1" * 4301, "1" * 20000, "[" * 40 + "]" * 40, "[" * 63 + "]" * 63,
    "[" * 64 + "]" * 64, "[" * 1000 + "]" * 1000, "[" * 200_000 + "]" * 200_000, "[" * 2000, "1e" + "9" * 400,
)  # fmt: skip
_TEXTS: Final = (
    "", " ", "0", "1", "-1", "true", "null", "NaN", "a", "..", "../x", "/etc/passwd", "a/b", "a\\b",
    "file:///etc/passwd", "\0", "\n", "\r", "\x1b[2J", "\x7f", "\x85", "\u2028", "\u202e", "\ufeff", "\u200b",
    "\ud800", "\udcff\ud83d", "\U0001f600", "é" * 256, "x" * 300, "x" * 513, "x" * 5000, "%s%n", "{0}", "{name!r}",
    "'", '\\"', "F32", "bool", "__class__", "٣", "²", "\ufdd0", "\U000e0001",
)  # fmt: skip
_CONTAINERS: Final[tuple[Any, ...]] = (
    [], {}, [[]], [{}], {"": 0}, [None], [True], [False], [0], [1], [0, 0], [0, 1], [1, 0], [True, 1], ["attention"],
    [-1], [1.0], ["0"], {"a": {"b": {"c": [1]}}}, list(range(20)), [0] * 2000, {str(i): i for i in range(300)},
    ["x" * 5000],
)  # fmt: skip


class Twin(str):
    """A key that equals no other, so that one object can hold the same text twice."""

    __slots__ = ()
    __hash__ = object.__hash__

    def __eq__(self, other: object) -> bool:
        return self is other


def to_text(tree: Any, ascii_only: bool = True) -> bytes:
    """JSON text of `tree`; unless `ascii_only`, surrogates become bytes that are no UTF-8."""
    text = json.dumps(tree, ensure_ascii=ascii_only)
    if "@raw:" in text:
        text = _RAW.sub(r"\1", text)
    return text.encode("utf-8", "surrogatepass")


def hostile(rng: Random) -> Any:
    """A value that a careless reader trips over."""
    match rng.randrange(12):
        case 0 | 1 | 2 | 3:
            return rng.choice(_NUMBERS)
        case 4:
            return None
        case 5 | 6:
            return rng.random() < 0.5
        case 7:
            return f"@raw:{rng.choice(_RAWS)}@"
        case 8 | 9:
            return rng.choice(_TEXTS)
        case _:
            return copy.deepcopy(rng.choice(_CONTAINERS))


def hostile_text(rng: Random) -> str:
    """A text that a careless reader trips over."""
    return rng.choice(_TEXTS)


def slots(tree: Any) -> list[Slot]:
    """Every (container, key) of `tree`, at all depths."""
    found: list[Slot] = []
    stack = [tree]
    while stack:
        node = stack.pop()
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            found.append((node, key))
            if isinstance(value, dict | list):
                stack.append(value)
    return found


def nudged(rng: Random, value: Any) -> Any:
    """A neighbour of `value`, or the same in another type."""
    if isinstance(value, bool):
        return rng.choice((not value, int(value), str(value).lower()))
    if isinstance(value, int):
        near = (value + 1, value - 1, 2 * value, -value, value + 2, value // 2)
        return rng.choice((*near, float(value) if abs(value) < 1 << 1000 else value, str(value), value == 1))
    if isinstance(value, float):
        return rng.choice((-value, 2 * value, value / 2, value + 1, str(value), f"@raw:{value}e400@"))
    if isinstance(value, str):
        end = rng.choice((value[:-1], value + "x", value + "\0", value + rng.choice(_TEXTS)))
        return rng.choice((end, value.upper(), rng.choice(_TEXTS) + value, [value], 0))
    if isinstance(value, list):
        return rng.choice((value + value[:1], value[:-1], value[::-1], [*value, hostile(rng)], value * 2))
    return [value]


def edit_anything(rng: Random, tree: dict[str, Any], words: Sequence[str]) -> None:
    """One edit of one place of `tree`; `words` are keys that mean something to its reader."""
    places = slots(tree)
    if not places:
        tree[rng.choice(words)] = hostile(rng)
        return
    node, key = rng.choice(places)
    rng.choice(_EDITS)(rng, node, key, places, words)


def _replace(rng: Random, node: Any, key: Any, _places: list[Slot], _words: Sequence[str]) -> None:
    node[key] = hostile(rng)


def _nudge(rng: Random, node: Any, key: Any, _places: list[Slot], _words: Sequence[str]) -> None:
    node[key] = nudged(rng, node[key])


def _delete(_rng: Random, node: Any, key: Any, _places: list[Slot], _words: Sequence[str]) -> None:
    del node[key]


def _rename(rng: Random, node: Any, key: Any, _places: list[Slot], words: Sequence[str]) -> None:
    if isinstance(node, dict):
        value = node.pop(key)
        new = rng.choice(
            (rng.choice(words), hostile_text(rng), key + "x", key.upper(), key + "\0", key + "é", "0" + key)
        )
        node[new] = value


def _double(rng: Random, node: Any, key: Any, _places: list[Slot], _words: Sequence[str]) -> None:
    value = copy.deepcopy(node[key]) if rng.random() < 0.5 else hostile(rng)
    if isinstance(node, dict):
        node[Twin(key)] = value
    else:
        node.insert(rng.randrange(len(node) + 1), value)


def _swap(rng: Random, node: Any, key: Any, places: list[Slot], _words: Sequence[str]) -> None:
    other, place = rng.choice(places)
    first, second = copy.deepcopy(node[key]), copy.deepcopy(other[place])
    node[key] = second
    other[place] = first


def _add(rng: Random, node: Any, _key: Any, _places: list[Slot], words: Sequence[str]) -> None:
    if isinstance(node, dict):
        node[rng.choice(words)] = hostile(rng)
    else:
        node.append(hostile(rng))


def _wrap(rng: Random, node: Any, key: Any, _places: list[Slot], _words: Sequence[str]) -> None:
    node[key] = rng.choice(([node[key]], {"x": node[key]}, {"0": node[key]}))


Edit = Callable[[Random, Any, Any, list[Slot], Sequence[str]], None]
_EDITS: Final[tuple[Edit, ...]] = (
    _replace,
    _replace,
    _replace,
    _nudge,
    _nudge,
    _nudge,
    _delete,
    _rename,
    _double,
    _swap,
    _add,
    _wrap,
)


_TOKENS: Final = (
    *(bytes([byte]) for byte in b' \t\n\0{}[]",:\\-+.eE09_aF/\x1b\x7f\x80\xc3\xff'), b"\\u0000", b"\\ud800",
    b"\\udc00", b"\\u0061", b"\xed\xa0\x80", b"\xc0\x80", b"\xf4\x90\x80\x80", b"NaN", b"null", b"{}", b"//", b",,",
)  # fmt: skip


def edit_bytes(rng: Random, text: bytes) -> bytes:
    """One edit of the bytes of `text`."""
    at = rng.randrange(len(text) + 1)
    end = min(len(text), at + rng.choice((1, 1, 2, 8, 40)))
    match rng.randrange(10):
        case 0:
            return text[:at]
        case 1:
            return text[:at] + text[end:]
        case 2:
            return text[:at] + text[at:end] * 2 + text[end:]
        case 3 | 4:
            return text[:at] + bytes([rng.randrange(256)]) + text[at + 1 :]
        case 5:
            return rng.choice((b"\xef\xbb\xbf", b" ", b"\n", b"\0")) + text
        case 6:
            return text + rng.choice((b"\0", b" ", b"\n", b"{}", b"]", b"x", b" " * 5000))
        case 7:
            whole = text.decode("utf-8", "replace")
            return rng.choice(
                (whole.encode("utf-16"), whole.encode("utf-32"), b"", b"null", b"[]", b"3", b'""', text * 2)
            )
        case _:
            return text[:at] + rng.choice(_TOKENS) + text[at:]
