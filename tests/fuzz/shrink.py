"""From a case to a smaller one that takes the same branch, so that what is kept can be read."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Final

from tests.fuzz.cases import Case, Content, WeightFile
from tests.fuzz.edits import slots

_MAX_SECONDS: Final = 10.0


def shrink(case: Case, same: Callable[[Case], bool]) -> Case:
    """The smallest case found within seconds by leaving out what leaves `same` as it is: files, keys, elements."""
    case = replace(case, place="shrink")
    end = time.monotonic() + _MAX_SECONDS
    tried = iter(_smaller(case))
    while time.monotonic() < end and (each := next(tried, None)) is not None:
        if same(each):
            case, tried = each, iter(_smaller(each))
    return case


def _smaller(case: Case) -> Iterator[Case]:
    for name in case.files:
        if len(case.files) > 1:
            yield replace(case, files={other: content for other, content in case.files.items() if other != name})
    for name, content in case.files.items():
        for less in _less(content):
            yield replace(case, files={**case.files, name: less})


def _less(content: Content) -> Iterator[Content]:
    if isinstance(content, WeightFile):
        for header in _less_text(content.header):
            # data that nobody describes any more would be another fault
            yield replace(content, header=header, data_bytes=_end(header, content.data_bytes))
            yield replace(content, header=header)
    else:
        yield from _less_text(content)


def _end(header: bytes, otherwise: int) -> int:
    try:
        entries = [entry for name, entry in json.loads(header).items() if name != "__metadata__"]
        return max((int(entry["data_offsets"][1]) for entry in entries), default=0)
    except (ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError):
        return otherwise


def _less_text(text: bytes) -> Iterator[bytes]:
    try:
        tree = json.loads(text, object_pairs_hook=_once)
    except (ValueError, RecursionError):
        yield from _less_bytes(text)
        return
    if not isinstance(tree, dict | list):
        return
    for node, key in slots(tree):
        kept = copy.copy(node)
        del node[key]
        yield json.dumps(tree).encode()
        # put back in the old order
        node.clear()
        (node.update if isinstance(node, dict) else node.extend)(kept)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands twice, which the rewritten text would lose")
    return found


def _less_bytes(text: bytes) -> Iterator[bytes]:
    size = len(text) // 2
    while size:
        for start in range(0, len(text), size):
            yield text[:start] + text[start + size :]
        size //= 2
