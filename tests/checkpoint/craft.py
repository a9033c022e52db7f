"""Checkpoint files made by hand: what no honest writer would write, and small honest ones."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


def pack(header: bytes | Mapping[str, Any], data: bytes = b"", header_bytes: int | None = None) -> bytes:
    """A safetensors file; `header_bytes` is the length it claims, by default the true one."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if header_bytes is None else header_bytes).to_bytes(8, "little") + text + data


def write_index(folder: Path, weight_map: Any, **more: Any) -> None:
    """An index of shards in `folder`."""
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map, **more}))


def write_shards(folder: Path, shards: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
    """Shards by file name, and the index that tells the truth about them."""
    for file, tensors in shards.items():
        save_file(dict(tensors), folder / file)
    write_index(folder, {name: file for file, tensors in shards.items() for name in tensors})


def edited(source: Path, target: Path, config: Mapping[str, Any] | None = None) -> Path:
    """A copy of the checkpoint `source` in `target`; keys of `config` replace, and `...` removes."""
    shutil.copytree(source, target)
    whole = {**json.loads((source / "config.json").read_text()), **(config or {})}
    (target / "config.json").write_text(json.dumps({key: value for key, value in whole.items() if value is not ...}))
    return target


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Let `change` edit the tensors of the single file in `folder`."""
    tensors = load_file(folder / SINGLE)
    change(tensors)
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})


@contextmanager
def watched_reads() -> Iterator[list[tuple[int, int]]]:
    """Byte ranges [begin, end) of all positioned reads made inside."""
    seen: list[tuple[int, int]] = []
    pread, preadv = os.pread, os.preadv

    def spy_pread(fd: int, count: int, start: int) -> bytes:
        seen.append((start, start + count))
        return pread(fd, count, start)

    def spy_preadv(fd: int, buffers: Any, start: int, *flags: int) -> int:
        buffers = list(buffers)
        seen.append((start, start + sum(len(each) for each in buffers)))
        return preadv(fd, buffers, start, *flags)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "pread", spy_pread)
        patch.setattr(os, "preadv", spy_preadv)
        yield seen


@contextmanager
def watched_opens() -> Iterator[list[str]]:
    """Base names of all files opened inside through `os.open`."""
    seen: list[str] = []
    honest = os.open

    def spy(path: Any, *args: Any, **kwargs: Any) -> int:
        seen.append(os.path.basename(os.fspath(path)))
        return honest(path, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "open", spy)
        yield seen


def num_open_files() -> int:
    """Open file descriptors of this process."""
    return len(os.listdir("/proc/self/fd"))
