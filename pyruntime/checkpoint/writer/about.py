"""What the manifest of a written folder says of it, for people."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from pyruntime.checkpoint.fields import some
from pyruntime.checkpoint.files import is_there
from pyruntime.checkpoint.manifest import MANIFEST
from pyruntime.checkpoint.strict_json import read_object

_MAX_NAMES: Final = 10


def about(folder: Path) -> tuple[str, ...]:
    """How `folder` was written, from what, and who computes the model from it; nothing where no writer of ours did.

    Raises CheckpointError MANIFEST for a manifest that cannot be read, or RunError IO.
    """
    if not is_there(folder / MANIFEST):
        return ()
    made = read_object(folder / MANIFEST, "MANIFEST").get("made")
    if not isinstance(made, dict):
        return ()
    origin, readers = made.get("from"), made.get("exact_in")
    lines = []
    if _is_text(made.get("format")):
        name: Any = origin.get("name") if isinstance(origin, dict) else None
        lines.append(f"written as {some([made['format']])}" + (f" from {some([name])}" if _is_text(name) else ""))
    if isinstance(readers, list) and readers and all(_is_text(each) for each in readers[:_MAX_NAMES]):
        lines.append(f"exact in: {some(readers[:_MAX_NAMES])} (docs/formats.md)")
    return tuple(lines)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value != ""
