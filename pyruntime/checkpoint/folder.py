"""The weight files of a checkpoint folder: one file or an index of shards, and nothing beside them unnoticed."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from pyruntime import env
from pyruntime.checkpoint.fields import some
from pyruntime.checkpoint.files import io_error, is_bare_name, is_there, listed, missing, open_weights
from pyruntime.checkpoint.header import TensorInfo, read_header
from pyruntime.checkpoint.strict_json import read_object
from pyruntime.checkpoint.weight import Shard
from pyruntime.errors import CheckpointError, RunError, UsageError

_SINGLE: Final = "model.safetensors"
_INDEX: Final = "model.safetensors.index.json"
_ADAPTER: Final = ("adapter_config.json", "adapter_model.safetensors")
_UNSAFE_SUFFIXES: Final = (".bin", ".pt", ".pth", ".pkl", ".ckpt", ".gguf")
PREFERENCES: Final = ("single", "index")


@dataclass(frozen=True, slots=True)
class ReadOptions:
    """What a user says about a folder that leaves a choice.

    `prefer` is the one of `PREFERENCES` to read where a folder holds both; `ignore_config_keys` are keys of config.json
    that pyruntime does not know and the user knows to be without influence. Raises UsageError CONFIG.
    """

    prefer: str | None = None
    ignore_config_keys: Sequence[str] = ()

    def __post_init__(self) -> None:
        if self.prefer is not None and self.prefer not in PREFERENCES:
            raise UsageError("CONFIG", f"prefer is {self.prefer!r}; expected one of {', '.join(PREFERENCES)}")
        keys = self.ignore_config_keys
        if isinstance(keys, str) or not isinstance(keys, Sequence) or not all(isinstance(key, str) for key in keys):
            raise UsageError("CONFIG", f"ignore_config_keys is {keys!r}; expected a list of names")


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a checkpoint and the file it lies in."""

    shard: Shard
    info: TensorInfo


def open_tensors(folder: Path, options: ReadOptions = ReadOptions()) -> dict[str, StoredTensor]:
    """Every tensor of the checkpoint in `folder` by name; headers are checked, no tensor byte is read.

    Raises CheckpointError UNSUPPORTED_FORMAT, SHARD_PATH, SHARD_MISSING, SHARD_UNLISTED, SHARD_SIZE, SHARD_CONTENT or
    one of `read_header`, and RunError IO.
    """
    single, index = is_there(folder / _SINGLE), is_there(folder / _INDEX)
    if single and index and options.prefer is None:
        raise CheckpointError(
            "SHARD_CONTENT",
            f"{folder}: holds {_SINGLE} and {_INDEX}; remove the stale one, or say which to read (prefer=, --prefer: "
            f"{' or '.join(PREFERENCES)})",
        )
    if single and not (index and options.prefer == "index"):
        return _open_single(folder, alone=not index)
    if index:
        return _open_indexed(folder)
    raise _no_weights(folder)


def shard_names(folder: Path) -> frozenset[str]:
    """Names of the shards in the index of `folder`; none without an index, or with one that `open_tensors` refuses.

    Raises RunError IO.
    """
    try:
        return frozenset(_weight_map(_read_index(folder)).values())
    except CheckpointError:
        return frozenset()


def unread_files(folder: Path, stored: Iterable[StoredTensor]) -> tuple[str, ...]:
    """A note on the safetensors files of `folder` that none of the `stored` tensors lies in."""
    read = {tensor.shard.path.name for tensor in stored}
    unread = [name for name in listed(folder) if name.endswith(".safetensors") and name not in read]
    if not unread:
        return ()
    return (f"weight files that are not part of the model are not read: {some(unread)}",)


def _no_weights(folder: Path) -> CheckpointError | RunError:
    """The error for a folder with neither the one file nor an index: what is there instead, and what to do."""
    names = listed(folder)
    weights = [name for name in names if name.endswith(".safetensors")]
    shards = fnmatch.filter(weights, "*-of-*.safetensors")
    others = [name for name in names if name.endswith(_UNSAFE_SUFFIXES)]
    if adapter := [name for name in names if name in _ADAPTER]:
        found = f"holds only an adapter ({adapter[-1]}); merge it into its base model and save the result"
    elif shards:
        found = f"holds shards, first {shards[0][:80]!r}, and no index; get {_INDEX} too"
    elif "consolidated.safetensors" in weights:
        found = "holds only consolidated.safetensors; get the checkpoint in the layout of transformers"
    elif weights:
        found = f"holds {weights[0][:80]!r} and no {_SINGLE}; rename it to {_SINGLE} if it is the whole model"
    elif others:
        found = f"holds only {others[0]}; expected safetensors, convert the checkpoint first"
        return CheckpointError("UNSUPPORTED_FORMAT", f"{folder}: {found}")
    else:
        found = f"holds no {_SINGLE} and no {_INDEX}; get the whole checkpoint"
    return missing(folder / _SINGLE, "SHARD_MISSING", f"{folder}: {found}")


def _open_single(folder: Path, *, alone: bool) -> dict[str, StoredTensor]:
    shard, tensors = _open_shard(folder, _SINGLE)
    if alone:
        # shards beside the one file, and no index that says which is right
        _check_unlisted(folder, "model-*-of-*.safetensors", {_SINGLE}, "there is no index")
    return {name: StoredTensor(shard, info) for name, info in tensors.items()}


def _open_indexed(folder: Path) -> dict[str, StoredTensor]:
    index = _read_index(folder)
    weight_map = _weight_map(index)
    files = sorted(set(weight_map.values()))
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        shard, found = _open_shard(folder, file)
        for name, info in found.items():
            if weight_map.get(name) != file:
                raise CheckpointError(
                    "SHARD_CONTENT",
                    f"{file}: holds {name!r}, which the index places in {weight_map.get(name, 'no file')}; "
                    "get index and shards again",
                )
            tensors[name] = StoredTensor(shard, info)
    lost = sorted(set(weight_map) - set(tensors))
    if lost:
        raise CheckpointError(
            "SHARD_CONTENT",
            f"{_INDEX}: {len(lost)} tensors are not in their file, first {lost[0][:80]!r} in {weight_map[lost[0]]}; "
            "get index and shards again",
        )
    _check_unlisted(folder, "model*.safetensors", {_SINGLE, *files}, f"{_INDEX} does not list it")
    _check_total(index.get("metadata"), sum(tensor.info.num_bytes for tensor in tensors.values()))
    return tensors


def _read_index(folder: Path) -> dict[str, Any]:
    return read_object(folder / _INDEX, "SHARD_CONTENT", env.max_header_bytes())


def _weight_map(index: dict[str, Any]) -> dict[str, str]:
    mapping = index.get("weight_map")
    if not isinstance(mapping, dict) or not mapping:
        raise CheckpointError("SHARD_CONTENT", f"{_INDEX}: weight_map is missing or empty; get the index again")
    for name, file in mapping.items():
        if not is_bare_name(file) or not file.endswith(".safetensors"):
            raise CheckpointError(
                "SHARD_PATH",
                f"{_INDEX}: tensor {name[:80]!r} lies in {str(file)[:80]!r}; expected the bare name of a .safetensors "
                "file in the same folder",
            )
    return mapping


def _check_unlisted(folder: Path, pattern: str, known: set[str], why: str) -> None:
    unlisted = [name for name in fnmatch.filter(listed(folder), pattern) if name not in known]
    if unlisted:
        raise CheckpointError(
            "SHARD_UNLISTED",
            f"{folder}: holds {len(unlisted)} more weight files, first {unlisted[0][:80]!r}: {why}; remove what is "
            "stale, or get the whole checkpoint again",
        )


def _check_total(metadata: Any, num_bytes: int) -> None:
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    # some writers say it as a float; true is no number
    if total is not None and (isinstance(total, bool) or total != num_bytes):
        raise CheckpointError(
            "SHARD_SIZE",
            f"{_INDEX}: total_size is {str(total)[:80]}; the tensors have {num_bytes}; get index and shards again, or "
            "correct or remove metadata.total_size where the publisher's index is wrong",
        )


def _open_shard(folder: Path, name: str) -> tuple[Shard, dict[str, TensorInfo]]:
    # the shard notes size and time before the header is read, so that no later change goes unnoticed
    fd = open_weights(folder, name)
    shard = Shard(folder / name, fd)
    try:
        return shard, read_header(fd, name)
    except OSError as error:
        raise io_error(f"cannot read {folder / name}", error) from None
