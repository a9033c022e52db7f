"""Logits of a reference plan kept in a folder: it runs once for any number of plans that are compared with it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import safetensors.torch
import torch
from safetensors import SafetensorError

from pyruntime.checkpoint.atomic import write_bytes, write_text
from pyruntime.checkpoint.files import io_error
from pyruntime.checkpoint.strict_json import read_object
from pyruntime.errors import CheckpointError, RunError
from pyruntime.evaluate.identity import digest
from pyruntime.plan import Plan
from pyruntime.plan.likelihood import LogitRows, Window, logit_rows

_FORMAT: Final = "pyruntime-logits"
_VERSION: Final = 1
_INDEX: Final = "index.json"
# of one file; also what is in memory before it is written
_SHARD_BYTES: Final = 64 << 20


class LogitsCache:
    """The reference's logits for one text in `folder`/KEY, float32: index.json, and shards of 64 MB as safetensors.

    `key` is what they depend on: hashes of model and text, and every setting. The index is written last, so a folder
    without one is not finished and is written anew. The size is 4 bytes x tokens x vocabulary.
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
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError("IO", f"cannot make {self._folder}: {error.strerror}") from None
        shards: list[list[tuple[int, int]]] = []
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
        write_text(self._folder / _INDEX, json.dumps({**self._about, "shards": shards}) + "\n")

    def _save(self, number: int, held: Sequence[LogitRows]) -> list[tuple[int, int]]:
        tensors = {str(i): each.logits.contiguous() for i, each in enumerate(held)}
        write_bytes(self._shard(number), safetensors.torch.save(tensors))
        return [(each.window, each.begin) for each in held]

    def _read(self) -> Iterator[LogitRows]:
        index = read_object(self._folder / _INDEX, "CACHE", 1 << 26)
        if {name: index.get(name) for name in self._about} != self._about:
            raise self._changed(_INDEX)
        for number, places in enumerate(index["shards"]):
            path = self._shard(number)
            try:
                tensors = safetensors.torch.load(path.read_bytes())
                yield from (LogitRows(window, begin, tensors[str(i)]) for i, (window, begin) in enumerate(places))
            except (SafetensorError, KeyError):
                raise self._changed(path.name) from None
            except OSError as error:
                raise io_error(f"cannot read {path}", error) from None

    def _shard(self, number: int) -> Path:
        return self._folder / f"logits-{number:05d}.safetensors"

    def _changed(self, name: str) -> CheckpointError:
        return CheckpointError("CACHE", f"{self._folder / name} is not as it was written; remove {self._folder}")
