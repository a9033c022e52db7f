"""The weight files of a checkpoint folder: one file or an index of shards, opened without following strange paths."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from pyruntime.checkpoint.header import MAX_HEADER_BYTES, TensorInfo, read_header
from pyruntime.checkpoint.strict_json import read_object
from pyruntime.checkpoint.weight import Shard
from pyruntime.errors import CheckpointError, RunError

_SINGLE: Final = "model.safetensors"
_INDEX: Final = "model.safetensors.index.json"
_UNSAFE_SUFFIXES: Final = (".bin", ".pt", ".pth", ".pkl", ".ckpt", ".gguf")


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a checkpoint and the file it lies in."""

    shard: Shard
    info: TensorInfo


def open_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of the checkpoint in `folder` by name; headers are checked, no tensor byte is read.

    Raises CheckpointError UNSUPPORTED_FORMAT, SHARD_PATH, SHARD_MISSING, SHARD_CONTENT or one of `read_header`.
    """
    single, index = folder / _SINGLE, folder / _INDEX
    if single.exists() and index.exists():
        raise CheckpointError("SHARD_CONTENT", f"{folder}: holds {_SINGLE} and {_INDEX}; remove the one that is stale")
    if single.exists():
        shard, tensors = _open_shard(folder, _SINGLE)
        return {name: StoredTensor(shard, info) for name, info in tensors.items()}
    if index.exists():
        return _open_indexed(folder, _weight_map(index))
    found = sorted(path.name for path in folder.iterdir() if path.suffix in _UNSAFE_SUFFIXES)
    if found:
        raise CheckpointError(
            "UNSUPPORTED_FORMAT", f"{folder}: holds only {found[0]}; expected safetensors, convert the checkpoint first"
        )
    raise CheckpointError("SHARD_MISSING", f"{folder}: holds no {_SINGLE} and no {_INDEX}")


def _weight_map(index: Path) -> dict[str, str]:
    mapping: Any = read_object(index, "SHARD_CONTENT", MAX_HEADER_BYTES).get("weight_map")
    if not isinstance(mapping, dict) or not mapping:
        raise CheckpointError("SHARD_CONTENT", f"{index.name}: weight_map is missing or empty")
    for name, file in mapping.items():
        plain = isinstance(file, str) and file.endswith(".safetensors") and file.isprintable()
        if not plain or file != os.path.basename(file) or "\\" in file or file.startswith("."):
            raise CheckpointError(
                "SHARD_PATH",
                f"{index.name}: tensor {name[:80]!r} lies in {str(file)[:80]!r}; expected the bare name of a "
                ".safetensors file in the same folder",
            )
    return mapping


def _open_indexed(folder: Path, weight_map: dict[str, str]) -> dict[str, StoredTensor]:
    tensors: dict[str, StoredTensor] = {}
    for file in sorted(set(weight_map.values())):
        shard, found = _open_shard(folder, file)
        for name, info in found.items():
            if weight_map.get(name) != file:
                raise CheckpointError(
                    "SHARD_CONTENT",
                    f"{file}: holds {name!r}, which the index places in {weight_map.get(name, 'no file')}",
                )
            tensors[name] = StoredTensor(shard, info)
    lost = sorted(set(weight_map) - set(tensors))
    if lost:
        raise CheckpointError(
            "SHARD_CONTENT",
            f"{_INDEX}: {len(lost)} tensors are not in their file, first {lost[0]!r} in {weight_map[lost[0]]}",
        )
    return tensors


def _open_shard(folder: Path, name: str) -> tuple[Shard, dict[str, TensorInfo]]:
    path = folder / name
    _check_link(folder, path)
    try:
        # never block on a FIFO; what is no regular file is refused below
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise CheckpointError("SHARD_MISSING", f"{path.name} is listed but missing in {folder}") from None
    except OSError as error:
        raise RunError("IO", f"cannot open {path}: {error.strerror}") from None
    shard = Shard(path, fd)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        raise CheckpointError("SHARD_PATH", f"{path}: is no regular file")
    return shard, read_header(fd, name)


def _check_link(folder: Path, path: Path) -> None:
    """A link may only lead into its own repository of the hub's cache, whose snapshots link to ../../blobs."""
    if not path.is_symlink():
        return
    root = folder.resolve()
    if root.parent.name == "snapshots":
        root = root.parent.parent
    # not Path.resolve: it raises RuntimeError for a link to itself, which open refuses in its own way
    if not Path(os.path.realpath(path)).is_relative_to(root):
        raise CheckpointError("SHARD_PATH", f"{path}: is a link that leads out of {root}; copy the file instead")
