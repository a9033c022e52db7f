"""Logits of a reference plan kept in a folder: it runs once for any number of plans that are compared with it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import safetensors.torch
import torch
from safetensors import SafetensorError

from pyruntime.checkpoint.atomic import make_folder, write_bytes, write_text
from pyruntime.checkpoint.strict_json import read_bytes, read_object
from pyruntime.errors import CheckpointError
from pyruntime.evaluate.identity import digest
from pyruntime.plan import Plan
from pyruntime.plan.likelihood import LogitRows, Window, logit_rows

_FORMAT: Final = "pyruntime-logits"
_VERSION: Final = 2
_INDEX: Final = "index.json"
# of one file; also what is in memory before it is written
_SHARD_BYTES: Final = 64 << 20
# of 256 rows, as many as one run gives, for a vocabulary of a million, beside a full shard
_MAX_SHARD_BYTES: Final = 2 << 30
_MAX_INDEX_BYTES: Final = 64 << 20


class LogitsCache:
    """The reference's logits for one text in `folder`/KEY, float32: index.json, and shards of 64 MB as safetensors.

    `key` is what they depend on: hashes of model and text, and every setting. The index is written last, so a folder
    without one is not finished and is written anew. It holds the hash of each shard and of itself, so that what was
    changed is not taken. The size is 4 bytes x tokens x vocabulary.
    """

    def __init__(self, folder: Path, key: dict[str, Any], windows: Sequence[Window]) -> None:
        tokens = [[list(window.token_ids), window.first] for window in windows]
        self._about = {"format": _FORMAT, "version": _VERSION, **key, "windows_sha256": digest(tokens)}
        self._folder = folder / digest(self._about)[:32]
        self._windows = windows

    @property
    def is_complete(self) -> bool:
        """Whether the logits are there."""
        return (self._folder / _INDEX).exists()

    def rows(self, plan: Plan | None) -> Iterator[LogitRows]:
        """The rows in order, from the files where they are there, else from `plan`, written on the way.

        The files are complete once the last row was taken. Raises RunError IO, CheckpointError CACHE for files that
        were changed.
        """
        if self.is_complete:
            yield from self._read()
        else:
            assert plan is not None
            yield from self._write(logit_rows(plan, self._windows))

    def _write(self, rows: Iterable[LogitRows]) -> Iterator[LogitRows]:
        make_folder(self._folder)
        shards: list[dict[str, Any]] = []
        held: list[LogitRows] = []
        for each in rows:
            # the plan writes over its buffers in the next step
            held.append(LogitRows(each.window, each.begin, each.logits.to("cpu", torch.float32, copy=True)))
            if sum(kept.logits.nbytes for kept in held) >= _SHARD_BYTES:
                shards.append(self._save(len(shards), held))
                held = []
            yield each
        if held:
            shards.append(self._save(len(shards), held))
        index = {**self._about, "shards": shards}
        write_text(self._folder / _INDEX, json.dumps({**index, "index_sha256": digest(index)}) + "\n")

    def _save(self, number: int, held: Sequence[LogitRows]) -> dict[str, Any]:
        tensors = {str(i): each.logits.contiguous() for i, each in enumerate(held)}
        data = safetensors.torch.save(tensors)
        write_bytes(self._shard(number), data)
        return {"sha256": hashlib.sha256(data).hexdigest(), "rows": [[each.window, each.begin] for each in held]}

    def _read(self) -> Iterator[LogitRows]:
        for number, shard in enumerate(self._shards()):
            path = self._shard(number)
            try:
                data = read_bytes(path, "CACHE", _MAX_SHARD_BYTES)
            except CheckpointError:
                raise self._changed(path.name) from None
            if hashlib.sha256(data).hexdigest() != shard["sha256"]:
                raise self._changed(path.name)
            try:
                tensors = safetensors.torch.load(data)
                yield from (
                    LogitRows(window, begin, tensors[str(i)]) for i, (window, begin) in enumerate(shard["rows"])
                )
            except (SafetensorError, KeyError):
                raise self._changed(path.name) from None

    def _shards(self) -> list[dict[str, Any]]:
        """The lines of the index, of which no byte was changed since it was written."""
        try:
            index = read_object(self._folder / _INDEX, "CACHE", _MAX_INDEX_BYTES)
        except CheckpointError:
            raise self._changed(_INDEX) from None
        own = index.pop("index_sha256", None)
        if digest(index) != own or {name: index.get(name) for name in self._about} != self._about:
            raise self._changed(_INDEX)
        return list(index["shards"])

    def _shard(self, number: int) -> Path:
        return self._folder / f"logits-{number:05d}.safetensors"

    def _changed(self, name: str) -> CheckpointError:
        return CheckpointError("CACHE", f"{self._folder / name} is not as it was written; remove {self._folder}")
