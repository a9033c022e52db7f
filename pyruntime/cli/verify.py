"""`pyruntime verify`: whether a folder is what its manifest says, byte for byte."""

from __future__ import annotations

from tqdm import tqdm

from pyruntime.checkpoint import resolve_model
from pyruntime.checkpoint.manifest import MANIFEST, verify_manifest
from pyruntime.cli import options as o


def verify(model: o.Model, revision: o.Revision = None) -> None:
    """Read every file that pyruntime_manifest.json lists and compare its SHA-256."""
    folder = resolve_model(model, revision)
    # shown only on a terminal, and only when it takes longer than a moment
    with tqdm(desc="Verifying", unit="B", unit_scale=True, disable=None, delay=1.0, leave=False) as bar:

        def advance(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        entries = verify_manifest(folder, advance)
    num_bytes = sum(entry.num_bytes for entry in entries.values())
    print(f"OK: {len(entries)} files, {num_bytes} bytes, as {MANIFEST} says")
