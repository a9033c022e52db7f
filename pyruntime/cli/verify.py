"""`pyruntime verify`: whether a folder is what its manifest says, byte for byte; and the manifest itself."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer
from tqdm import tqdm

import pyruntime
from pyruntime.checkpoint import resolve_model
from pyruntime.checkpoint.manifest import MANIFEST, verify_manifest, write_manifest
from pyruntime.checkpoint.writer import about, recover
from pyruntime.cli import options as o

Write = Annotated[bool, typer.Option("--write", help="Write the manifest of a folder that has none.")]


def verify(model: o.Model, revision: o.Revision = None, write: Write = False) -> None:
    """Read every file that pyruntime_manifest.json lists and compare its SHA-256.

    What a write that was killed left beside the folder is removed, or given back its name.
    """
    for note in recover(Path(os.path.expanduser(model))):
        print(note)
    folder = resolve_model(model, revision)
    # shown only on a terminal, and only when it takes longer than a moment
    with tqdm(desc="Reading", unit="B", unit_scale=True, disable=None, delay=1.0, leave=False) as bar:

        def advance(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        if write:
            entries = write_manifest(folder, {"by": f"pyruntime {pyruntime.__version__}"}, advance)
        else:
            entries = verify_manifest(folder, advance)
    size = f"{len(entries)} files, {sum(entry.num_bytes for entry in entries.values())} bytes"
    print(f"Wrote {folder / MANIFEST}: {size}" if write else f"OK: {size}, as {MANIFEST} says")
    for line in () if write else about(folder):
        print(line)
