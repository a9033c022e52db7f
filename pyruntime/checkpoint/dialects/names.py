"""Names of checkpoints beside what they hold: published names lie, only the lists count."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from pyruntime.checkpoint.fields import some
from pyruntime.spec import DropPlan

_SAID: Final = re.compile(r"drop(\d{1,4})(attn|mlp|block)", re.ASCII | re.IGNORECASE)
_KINDS: Final = {"attn": "attentions", "mlp": "MLPs", "block": "blocks"}


def names_of(folder: Path, config: Mapping[str, Any]) -> tuple[str, ...]:
    """What the checkpoint in `folder` is called: by the folder, by the Hub, by the configuration itself."""
    path = Path(os.path.abspath(folder))
    # the Hub's cache calls its folders models--owner--name/snapshots/commit
    names = [path.name, path.parents[1].name.rpartition("--")[2] if path.parent.name == "snapshots" else ""]
    said = config.get("_name_or_path")
    if isinstance(said, str):
        names.append(said.rstrip("/").rpartition("/")[2])
    return tuple(dict.fromkeys(names))


def looks_wrong(names: tuple[str, ...], gone: DropPlan) -> tuple[str, ...]:
    """A note for each of `names` that promises another number or kind of drops than `gone` holds."""
    counts = (len(gone.attention), len(gone.mlp))
    notes = []
    for name in names:
        for number, kind in ((int(match[1]), match[2].lower()) for match in _SAID.finditer(name)):
            right = {"attn": (number, 0), "mlp": (0, number), "block": (number, number)}[kind]
            if counts != right or (kind == "block" and gone.attention != gone.mlp):
                notes.append(
                    f"looks wrong: the name {some([name])} says {number} {_KINDS[kind]}; config.json lists "
                    f"{counts[0]} of attention and {counts[1]} of MLP, and the lists count"
                )
    return tuple(dict.fromkeys(notes))
