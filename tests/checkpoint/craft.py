"""Checkpoint files made by hand: what no honest writer would write, and small honest ones."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pyruntime.checkpoint.weight import Shard
from pyruntime.cli.main import run
from pyruntime.engine import load
from pyruntime.ops import attention, cache, layout, memory

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


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
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


@dataclass(frozen=True)
class Bad:
    """One thing wrong with a checkpoint, and what the command must say to it.

    `harm` edits a good folder, or arranges that something happens while it is read. `late` faults show only when
    tensors are read; all others before a weight is read or room for one is made.
    """

    row: str
    what: str
    harm: Callable[[Path, pytest.MonkeyPatch], object]
    code: str
    exit_code: int
    words: tuple[str, ...] = ()
    arguments: tuple[str, ...] = ()
    late: bool = False

    def __str__(self) -> str:
        return f"{self.row} {self.what}"


def check_refusal(bad: Bad, folder: Path, patch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """The line with which `pyruntime generate` refuses the harmed `folder`: one line, no traceback, nothing printed."""
    touched: list[str] = []

    def spied(where: Any, name: str) -> None:
        honest = getattr(where, name)

        def spy(*args: Any, **kwargs: Any) -> Any:
            touched.append(name)
            return honest(*args, **kwargs)

        patch.setattr(where, name, spy)

    bad.harm(folder, patch)
    spied(Shard, "read")
    for module in (memory, cache, attention):
        spied(module, "alloc")
    for module in (memory, layout):
        spied(module, "alloc_weights")
    code = run(["generate", str(folder), "the cat", *bad.arguments])
    out, err = capsys.readouterr()
    assert (code, out) == (bad.exit_code, ""), err
    assert err.startswith(f"error[{bad.code}]: "), err
    assert err.count("\n") == 1 and err.rstrip("\n").isprintable() and "Traceback" not in err, err
    assert all(word in err for word in bad.words), err
    assert bad.late or touched == []
    return err


def meanwhile(patch: pytest.MonkeyPatch, change: Callable[[], object]) -> None:
    """Have `change` happen once, between the check of a checkpoint and the reading of its tensors."""
    honest = load.build

    def spy(spec: Any) -> Any:
        change()
        return honest(spec)

    patch.setattr(load, "build", spy)


def reheader(folder: Path, change: Callable[[bytes], bytes], file: str = SINGLE) -> None:
    """Let `change` edit the header of a weight file as text; the data stay."""
    whole = (folder / file).read_bytes()
    begin = 8 + int.from_bytes(whole[:8], "little")
    (folder / file).write_bytes(pack(change(whole[8:begin]), whole[begin:]))


def header_entry(folder: Path, name: str, change: Callable[[dict[str, Any]], object], file: str = SINGLE) -> None:
    """Let `change` edit what the header says of the tensor `name`."""

    def edit(text: bytes) -> bytes:
        entries = json.loads(text)
        change(entries[name])
        return json.dumps(entries).encode()

    reheader(folder, edit, file)


def reconfigure(folder: Path, **config: Any) -> None:
    """Replace keys of config.json; `...` removes."""
    whole = {**json.loads((folder / "config.json").read_text()), **config}
    (folder / "config.json").write_text(json.dumps({key: value for key, value in whole.items() if value is not ...}))


def split(folder: Path, keep_single: bool = False) -> tuple[str, str]:
    """Make two shards of the single file in `folder`; their names."""
    names = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    tensors = load_file(folder / SINGLE)
    half = sorted(tensors)[: len(tensors) // 2]
    first = {name: tensors.pop(name) for name in half}
    write_shards(folder, {names[0]: first, names[1]: tensors})
    if not keep_single:
        (folder / SINGLE).unlink()
    return names
