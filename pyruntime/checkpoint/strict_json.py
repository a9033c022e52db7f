"""JSON files read without trust: size before parsing, no duplicate keys, no NaN, no silent repair."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any, Final

from pyruntime.checkpoint.files import io_error, open_file
from pyruntime.errors import CheckpointError

MAX_CONFIG_BYTES: Final = 1 << 20
# an index or a tokenizer's table of this many entries is larger than any that is known
MAX_ITEMS: Final = 100_000
_MAX_DEPTH: Final = 64
# a string, the last one perhaps without its end, or a bracket; possessive, so that no text takes quadratic time
_TOKENS: Final = re.compile(rb'"(?:[^"\\]++|\\.)*+"?|[\[\]{}]', re.DOTALL)


def parse(text: bytes, where: str, code: str, max_depth: int = _MAX_DEPTH, max_items: int = MAX_ITEMS) -> Any:
    """The JSON value in `text`. Raises CheckpointError `code` naming `where` and what is wrong.

    At most `max_items` objects and lists are made of it, and 16 times as many other values.
    """

    def refuse(what: str) -> CheckpointError:
        return CheckpointError(code, f"{where}: {what}")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
            raise CheckpointError("DUPLICATE_NAME", f"{where}: the key {twice[:80]!r} stands twice in one object")
        return found

    def no_constant(name: str) -> Any:
        raise refuse(f"holds {name}, which is no JSON number")

    # before the parser makes hundreds of megabytes of them; those in texts count too
    items, values = text.count(b"[") + text.count(b"{"), text.count(b",")
    if items > max_items or values > 16 * max_items:
        raise refuse(f"holds {items} brackets and {values} commas; at most {max_items} and {16 * max_items} are read")
    # cheap upper bound of the depth, so that a hostile file cannot exhaust the parser's stack
    if nesting(text, max_depth) > max_depth:
        raise refuse(f"is nested deeper than {max_depth} levels")
    try:
        value = json.loads(
            text.decode("utf-8"), object_pairs_hook=unique, parse_constant=no_constant, parse_int=_integer
        )
        # only an escape can smuggle in half a surrogate pair, which is no text and cannot be printed
        if b"\\u" in text:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        return value
    except UnicodeError:
        raise refuse("is not UTF-8 text") from None
    except (ValueError, RecursionError) as error:
        raise refuse(f"is not valid JSON ({error})") from None


def read_object(path: Path, code: str, max_bytes: int = MAX_CONFIG_BYTES) -> dict[str, Any]:
    """The JSON object in the file `path`, at most `max_bytes` long. Raises CheckpointError `code`, or RunError IO."""
    value = parse(read_bytes(path, code, max_bytes), path.name, code)
    if not isinstance(value, dict):
        raise CheckpointError(code, f"{path.name}: holds a {type(value).__name__}; expected a JSON object")
    return value


def read_bytes(path: Path, code: str, max_bytes: int) -> bytes:
    """The bytes of a regular file of at most `max_bytes`. Raises CheckpointError `code`, or RunError IO."""
    try:
        with open(open_file(path, code), "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > max_bytes:
                raise CheckpointError(code, f"{path.name}: has {size} bytes; at most {max_bytes} are read")
            return file.read(size)
    except FileNotFoundError:
        raise CheckpointError(code, f"{path.name} is missing in {path.parent}") from None
    except OSError as error:
        raise io_error(f"cannot read {path}", error) from None


def _integer(text: str) -> int | float:
    """An int, except for -0: no integer for the writers of these formats, and equal to one in Python."""
    return -0.0 if text == "-0" else int(text)


def nesting(text: bytes, limit: int) -> int:
    """Deepest nesting of brackets outside strings, or a number above `limit`."""
    depth = deepest = 0
    for token in _TOKENS.finditer(text) if text.count(b"[") + text.count(b"{") > limit else ():
        match text[token.start() : token.start() + 1]:
            case b"[" | b"{":
                depth += 1
                deepest = max(deepest, depth)
                if deepest > limit:
                    break
            case b"]" | b"}":
                depth -= 1
    return deepest
