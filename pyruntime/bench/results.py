"""Result files: one JSON per run, with the machine, the commit and the command that its figures belong to."""

from __future__ import annotations

import datetime
import itertools
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pyruntime.bench.machine import commit, machine
from pyruntime.checkpoint.atomic import make_folder, write_text


def save_results(rows: Sequence[Mapping[str, Any]], folder: Path, name: str) -> Path:
    """Write `rows` as DATE-COMMIT-NAME.json in `folder`, beside what is there, never over it; the path."""
    make_folder(folder)
    now = datetime.datetime.now(datetime.UTC)
    found = commit()
    # a folder outside the checkout is called by its last name: where it lies is nobody's business
    command = [sys.argv[0], *(Path(each).name if each.startswith("/") else each for each in sys.argv[1:])]
    about = {"commit": found, "command": command, "time": now.isoformat(timespec="seconds"), "machine": machine()}
    # whether files differed from the commit stands inside
    stem = f"{now:%Y-%m-%d}-{found.removesuffix('-dirty') or 'unknown'}-{name}"
    names = itertools.chain([stem], (f"{stem}-{i}" for i in itertools.count(2)))
    path = next(path for each in names if not (path := folder / f"{each}.json").exists())
    write_text(path, json.dumps({**about, "rows": list(rows)}, indent=1) + "\n")
    return path
