"""From what a user calls a model to a folder: a path as it is, a Hub id through huggingface_hub."""

from __future__ import annotations

import errno
import fnmatch
import glob
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Final

from pyruntime.checkpoint.files import io_error, is_bare_name, is_there
from pyruntime.checkpoint.folder import shard_names
from pyruntime.errors import RunError, UsageError

# nothing that could be executed or unpickled is ever fetched, nor a second copy of the weights (consolidated.*)
_PATTERNS: Final = ("model*.safetensors", "*.json", "*.jinja", "tokenizer.model")
# the disk, its server or its owner says no; other errors, such as of a name too long, are about the name
_MACHINE: Final = (errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE)
_HUB_ID: Final = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)


def is_fetched(name: str, shards: Collection[str]) -> bool:
    """Whether pyruntime fetches the file `name` of a repository whose index lists `shards`."""
    known = name in shards or any(fnmatch.fnmatchcase(name, pattern) for pattern in _PATTERNS)
    return known and is_bare_name(name)


def resolve_model(model: str | Path, revision: str | None = None) -> Path:
    """Folder of the model named `model`: an existing folder, or a Hub id (downloaded once, then from the local cache).

    Raises UsageError MODEL when it is neither, RunError IO when the folder cannot be read or the Hub not be
    reached.
    """
    try:
        path = Path(model).expanduser()
        is_folder, exists = path.is_dir(), path.exists()
    except (OSError, RuntimeError) as error:
        if isinstance(error, OSError) and error.errno in _MACHINE:
            raise io_error(f"cannot read {model}", error) from None
        # a name too long for a file, ~ of nobody
        raise UsageError("MODEL", f"{str(model)!r} is no folder and no Hub id ({error})") from None
    if is_folder:
        return path
    if exists:
        raise UsageError("MODEL", f"{path} is a file; expected the folder that holds config.json")
    name = str(model)
    if not _HUB_ID.fullmatch(name) or isinstance(model, Path):
        raise UsageError("MODEL", f"{name!r} is no folder and no Hub id; expected a path, or owner/name")
    return _download(name, revision)


def _download(name: str, revision: str | None) -> Path:
    folder = _snapshot(name, revision, _PATTERNS)
    absent = [shard for shard in shard_names(folder) if not is_there(folder / shard)]
    if absent:
        # shards under other names; by the folder's own commit, since a branch may have moved
        _snapshot(name, folder.name, [glob.escape(shard) for shard in absent])
    return folder


def _snapshot(name: str, revision: str | None, patterns: Sequence[str]) -> Path:
    # imported here: it costs a quarter of a second that a local model need not pay
    import huggingface_hub
    from huggingface_hub import errors

    try:
        return Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=list(patterns)))
    except errors.LocalEntryNotFoundError:
        raise RunError(
            "IO",
            f"{name!r} is no local folder, is not in the local cache, and the Hub cannot be reached; check the name",
        ) from None
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.HFValidationError) as error:
        raise UsageError("MODEL", f"{name!r} is no local folder and the Hub refuses it: {error}") from None
    # broad: the library lets through whatever its HTTP client raises
    except Exception as error:
        raise RunError("IO", f"downloading {name!r} failed: {error}") from None
