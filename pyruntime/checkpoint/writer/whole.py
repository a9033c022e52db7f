"""What all writers share: the contents of a folder, the order in which they are written, and the last look at it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyruntime
from pyruntime.checkpoint.folder import ReadOptions
from pyruntime.checkpoint.reader import read_model
from pyruntime.checkpoint.writer.copied import copy_files, side_files, size_of
from pyruntime.checkpoint.writer.folder import NewFolder
from pyruntime.checkpoint.writer.weights import NewTensor, write_weights
from pyruntime.errors import CheckpointError
from pyruntime.spec import ModelSpec

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """A folder that was written: what it weighs, and notes for the user."""

    path: Path
    num_tensors: int
    weight_bytes: int
    notes: tuple[str, ...] = ()


def write_whole(
    folder: NewFolder,
    tensors: Sequence[NewTensor],
    config: bytes,
    source: Path | None,
    made: Mapping[str, Any],
    check: Callable[[Path], None],
    *,
    shard_bytes: int,
    progress: Progress | None,
) -> None:
    """Fill and commit `folder`: weights, if there are any, `config`, and what goes along from `source`.

    `progress` counts the bytes of the weights twice, since they are read again for their hashes. Raises OSError, and
    what `check` or reading a tensor raises.
    """
    total = sum(tensor.num_bytes for tensor in tensors)
    names = () if source is None else side_files(source)
    folder.begin(total + len(config) + (0 if source is None else size_of(source, names)))
    if tensors:
        write_weights(folder, tensors, shard_bytes, _first_half(progress, total))
    with folder.file("config.json") as file:
        file.write(config)
    if source is not None:
        copy_files(source, names, folder)
    about = {"by": f"pyruntime {pyruntime.__version__}", **made}
    folder.commit(about, check, _second_half(progress, total))


def check_spec(folder: Path, expected: ModelSpec, options: ReadOptions = ReadOptions()) -> None:
    """Read `folder` and compare. Raises CheckpointError WRITER where it is not the model that was to be written."""
    found = read_model(folder, options).spec
    if found != expected:
        layers = (index for index, (a, b) in enumerate(zip(found.layers, expected.layers, strict=False)) if a != b)
        where = next((f"layer {index}" for index in layers), "what is outside the layers")
        raise CheckpointError("WRITER", f"what was written would read as another model: {where} differs")


def native_text(config: Mapping[str, Any]) -> bytes:
    """config.json with a specification as text: a line for each key, and for each layer."""
    spec = config["spec"]
    lines = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in config.items() if key != "spec"]
    parts = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in spec.items() if key != "layers"]
    layers = ",\n".join(f"   {json.dumps(layer)}" for layer in spec["layers"])
    parts.append(f'  "layers": [\n{layers}\n  ]')
    lines.append(' "spec": {\n' + ",\n".join(parts) + "\n }")
    return ("{\n" + ",\n".join(lines) + "\n}\n").encode()


def _first_half(progress: Progress | None, total: int) -> Callable[[int], None]:
    done = 0

    def count(num_bytes: int) -> None:
        nonlocal done
        done += num_bytes
        if progress is not None:
            progress(done, 2 * total)

    return count


def _second_half(progress: Progress | None, total: int) -> Progress | None:
    if progress is None:
        return None
    # hashing counts all files; their weights are most of them
    return lambda done, of: progress(total + done * total // max(of, 1), 2 * total)
