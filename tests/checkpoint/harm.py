"""Ways to spoil a good checkpoint: its bytes, its names, its place on the disk, and what happens while it is read."""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoint.craft import (
    INDEX,
    SINGLE,
    Bad,
    header_entry,
    meanwhile,
    pack,
    reheader,
    rewrite,
    split,
    write_index,
)

Harm = Callable[[Path, pytest.MonkeyPatch], object]


def bad(row: str, code: str, exit_code: int, cases: dict[str, Harm], *words: str, **more: Any) -> list[Bad]:
    """Cases of one row that are refused alike; `more` are fields of `Bad`."""
    return [Bad(row, what, harm, code, exit_code, words, **more) for what, harm in cases.items()]


def check_rows(cases: Sequence[Bad], letter: str, last: int, legal: str) -> None:
    """Every row from 1 to `last` has a case, but for the one of what is legal, and no case stands twice."""
    assert {each.row for each in cases} | {legal} == {f"{letter}{number:02}" for number in range(1, last + 1)}
    assert len({str(each) for each in cases}) == len(cases)


Q = "model.layers.1.self_attn.q_proj.weight"
UP = "model.layers.2.mlp.up_proj.weight"
MLPS = [f"model.layers.{i}.mlp.{part}_proj.weight" for i in range(4) for part in ("down", "gate", "up")]


def bytes_of(data: bytes) -> Harm:
    return lambda folder, _: (folder / SINGLE).write_bytes(data)


def text(change: Callable[[bytes], bytes]) -> Harm:
    """The header as text, edited."""
    return lambda folder, _: reheader(folder, change)


def entry(**fields: Any) -> Harm:
    """What the header says of one tensor, with fields replaced."""
    return lambda folder, _: header_entry(folder, Q, lambda each: each.update(fields))


def moved(begin: int, end: int) -> Harm:
    """One tensor's offsets moved by so many bytes."""

    def move(each: dict[str, Any]) -> None:
        each["data_offsets"] = [each["data_offsets"][0] + begin, each["data_offsets"][1] + end]

    return lambda folder, _: header_entry(folder, Q, move)


def renamed(name: str) -> Harm:
    return text(lambda header: header.replace(json.dumps(Q).encode(), json.dumps(name).encode()))


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Harm:
    return lambda folder, _: rewrite(folder, change)


def index(file: Any) -> Harm:
    """An index that places a tensor in `file`."""

    def harm(folder: Path, _: pytest.MonkeyPatch) -> None:
        first, second = split(folder)
        weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
        write_index(folder, {**weight_map, Q: file})
        shutil.copy(folder / first, folder.parent / "outside.safetensors")
        assert second in weight_map.values()

    return harm


def sharded(change: Callable[[Path, str, str], object]) -> Harm:
    """`change` harms a folder of two shards, whose names it is given."""
    return lambda folder, _: change(folder, *split(folder))


def instead(make: Callable[[Path], object]) -> Harm:
    """Something else in place of the weight file, which moves beside the folder."""

    def harm(folder: Path, _: pytest.MonkeyPatch) -> None:
        (folder / SINGLE).rename(folder.parent / "outside.safetensors")
        make(folder / SINGLE)

    return harm


def a_socket(path: Path) -> None:
    here = Path.cwd()
    # the name of a socket may have no more than about a hundred bytes
    os.chdir(path.parent)
    try:
        with socket.socket(socket.AF_UNIX) as each:
            each.bind(path.name)
    finally:
        os.chdir(here)


def a_device(folder: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setenv("PYRUNTIME_LINK_ROOT", "/dev")
    instead(lambda path: path.symlink_to("/dev/zero"))(folder, patch)


def later(change: Callable[[Path], object]) -> Harm:
    """A change of the weight file between check and reading."""

    def harm(folder: Path, patch: pytest.MonkeyPatch) -> None:
        # a clock that ticks seldom must not hide the change
        os.utime(folder / SINGLE, (1e9, 1e9))
        meanwhile(patch, lambda: change(folder / SINGLE))

    return harm


def overwrite(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-64, os.SEEK_END)
        file.write(b"\0" * 64)


def append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"\0" * 64)


def claims(header_bytes: int) -> Harm:
    """A header that claims so many bytes, in a file that has them, but not on the disk."""

    def harm(folder: Path, _: pytest.MonkeyPatch) -> None:
        with (folder / SINGLE).open("wb") as file:
            file.write(header_bytes.to_bytes(8, "little") + b"{")
            file.truncate(header_bytes + 8)

    return harm


def many_tensors() -> bytes:
    one = '{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    return pack(("{" + ",".join(f'"{i}":{one}' for i in range(100_001)) + "}").encode())


def failing(function: str, number: int, *, on: str = SINGLE) -> Harm:
    """The system call fails on the one file, whatever name or descriptor it is given by."""

    def harm(folder: Path, patch: pytest.MonkeyPatch) -> None:
        honest = getattr(os, function)

        def broken(file: Any, *args: Any, **kwargs: Any) -> Any:
            name = os.readlink(f"/proc/self/fd/{file}") if isinstance(file, int) else os.fspath(file)
            if os.path.basename(name) == on:
                raise OSError(number, os.strerror(number))
            return honest(file, *args, **kwargs)

        patch.setattr(os, function, broken)

    return harm


def vanish_behind_config(folder: Path, patch: pytest.MonkeyPatch) -> None:
    from pyruntime.checkpoint import reader

    honest = reader.open_tensors

    def spy(*args: Any) -> Any:
        shutil.rmtree(folder)
        return honest(*args)

    patch.setattr(reader, "open_tensors", spy)


def edit_index(folder: Path, **keys: Any) -> None:
    (folder / INDEX).write_text(json.dumps({**json.loads((folder / INDEX).read_text()), **keys}))


def twice(text: str) -> str:
    """JSON of an index that names one tensor twice."""
    return text.replace('"weight_map": {', f'"weight_map": {{"{Q}": "model-00001-of-00002.safetensors", ')


def only(name: str) -> Harm:
    return lambda folder, _: (folder / SINGLE).rename(folder / name)
