"""Every kind of bad weight file, L01 to L18, through the command: its error, its exit code, and nothing read before."""

from __future__ import annotations

import errno
import os
import shutil
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoint.craft import (
    INDEX,
    SINGLE,
    Bad,
    check_refusal,
    pack,
    reconfigure,
    split,
)
from tests.checkpoint.harm import (
    MLPS,
    UP,
    Q,
    a_device,
    a_socket,
    append,
    bad,
    bytes_of,
    check_rows,
    claims,
    edit_index,
    entry,
    failing,
    index,
    instead,
    later,
    many_tensors,
    moved,
    only,
    overwrite,
    renamed,
    sharded,
    tensors,
    text,
    twice,
    vanish_behind_config,
)

BAD: list[Bad] = [
    *bad("L01", "HEADER_SIZE", 3, {"empty": bytes_of(b""), "seven bytes": bytes_of(b"\2" * 7)}, SINGLE),
    *bad(
        "L01",
        "HEADER_SIZE",
        3,
        {f"N = {n}": bytes_of(pack(b"{}", header_bytes=n)) for n in (3, 1 << 63, (1 << 64) - 1)},
    ),
    *bad(
        "L02",
        "HEADER_TOO_LARGE",
        3,
        {"N = 16 MiB + 1": claims((16 << 20) + 1), "N = 1 TiB": claims(1 << 40)},
        "16777216",
    ),
    *bad(
        "L02",
        "HEADER_TOO_LARGE",
        3,
        {"100001 tensors": lambda f, _: bytes_of(many_tensors())(f, _)},
        "100001",
        "100000",
    ),
    *bad(
        "L03",
        "HEADER_JSON",
        3,
        {
            "not UTF-8": text(lambda header: header.replace(b"self_attn", b"self\xffattn", 1)),
            "not JSON": text(lambda header: header.replace(b":", b"=", 1)),
            "an array": text(lambda header: b"[" + header + b"]"),
            "nine deep": text(lambda header: b'{"__metadata__":{"a":' + b"[" * 7 + b"]" * 7 + b"}," + header[1:]),
            "nine deep in a shape": entry(shape=[[[[[[[32]]]]]]]),
            "leading space": text(lambda header: b" " + header),
            "trailing NUL": text(lambda header: header + b"\0"),
        },
        SINGLE,
    ),
    *bad(
        "L04",
        "DUPLICATE_NAME",
        3,
        {
            "tensor twice": text(lambda header: header.rstrip()[:-1] + b"," + header[header.index(b'"lm_head') :]),
            "inner key twice": text(
                lambda header: header.replace(b'{"dtype":"F32"', b'{"dtype":"F32","dtype":"F32"', 1)
            ),
            "extra inner key": entry(strides=[32, 1]),
        },
    ),
    *bad(
        "L05",
        "OFFSETS",
        3,
        {
            "overlap": moved(-4, -4),
            "hole": moved(4, 4),
            "gap at the end": lambda folder, _: append(folder / SINGLE),
            "end before begin": moved(8192, 0),
            "negative": entry(data_offsets=[-4096, 0]),
            "float": moved(0.0, 0),  # type: ignore[arg-type]
            "product beyond 64 bits": entry(shape=[1 << 62, 1 << 62, 16]),
            "product that wraps to the right size": entry(shape=[(1 << 62) + 1024]),
        },
        "tensor '",
    ),
    *bad(
        "L06",
        "TRUNCATED",
        3,
        {"data cut": lambda f, _: os.truncate(f / SINGLE, (f / SINGLE).stat().st_size - 1)},
        SINGLE,
    ),
    *bad(
        "L06",
        "TRUNCATED",
        3,
        {
            "cut later": later(lambda path: os.truncate(path, 3000)),
            "a byte less later": later(lambda path: os.truncate(path, path.stat().st_size - 1)),
        },
        SINGLE,
        late=True,
    ),
    *bad(
        "L06", "CHANGED", 3, {"overwritten later": later(overwrite), "longer later": later(append)}, SINGLE, late=True
    ),
    *bad(
        "L07",
        "DTYPE",
        3,
        {
            str(dtype): tensors(lambda all_tensors, dtype=dtype: all_tensors.update({Q: all_tensors[Q].to(dtype)}))
            for dtype in (torch.int32, torch.float64, torch.bool, torch.float8_e4m3fn)
        },
        Q,
    ),
    *bad(
        "L07",
        "DTYPE",
        3,
        {"another than dtype": lambda f, _: reconfigure(f, dtype="float16")},
        "float32",
        "float16",
        "--dtype",
    ),
    *bad(
        "L07",
        "DTYPE",
        3,
        {
            "another than torch_dtype": lambda f, _: reconfigure(f, dtype=..., torch_dtype="bfloat16"),
            "one tensor of bfloat16": tensors(lambda all_tensors: all_tensors.update({Q: all_tensors[Q].bfloat16()})),
            "no dtype that exists": lambda f, _: reconfigure(f, dtype=["bfloat16"]),
        },
        "float32",
        "bfloat16",
        "--dtype float32",
    ),
    *bad(
        "L08",
        "TENSOR_NAME",
        3,
        {
            what: renamed(name)
            for what, name in {
                "empty": "",
                "NUL": "a\0b",
                "control characters": "a\x1b[2Jb",
                "513 bytes": "a" * 513,
                "dots": "a..b",
                "slash": "a/b",
            }.items()
        },
        SINGLE,
    ),
    *bad(
        "L09",
        "MISSING_TENSOR",
        3,
        {"all of a kind": tensors(lambda t: [t.pop(each) for each in MLPS])},
        "12 tensors",
        *MLPS[:10],
    ),
    *bad(
        "L09",
        "UNEXPECTED_TENSOR",
        3,
        {"twelve": tensors(lambda t: t.update({f"x{i:02}": torch.ones(1) for i in range(12)}))},
        "12 tensors",
        *(f"x{i:02}" for i in range(10)),
    ),
    *bad(
        "L09",
        "MISSING_TENSOR",
        3,
        {"renamed": tensors(lambda t: t.update({each.replace("mlp", "ffn"): t.pop(each) for each in MLPS}))},
        *(f"model.layers.{i}.{part}.down_proj" for i in range(3) for part in ("mlp", "ffn")),
        "12 tensors are missing",
        "12 tensors do not belong",
    ),
    *bad(
        "L10",
        "SHAPE",
        3,
        {"two": tensors(lambda t: t.update({Q: t[Q][:16].clone(), UP: t[UP].T.contiguous()}))},
        Q,
        "[16, 32]",
        "[32, 32]",
        UP,
        "[32, 56]",
        "[56, 32]",
    ),
    *bad(
        "L11",
        "SHARD_PATH",
        3,
        {
            "parent": index("../outside.safetensors"),
            "absolute": index("/tmp/outside.safetensors"),
            "URL": index("https://host/outside.safetensors"),
            "backslash": index("..\\outside.safetensors"),
            "NUL": index("outside.safetensors\0.safetensors"),
            "another suffix": index("outside.bin"),
            "no text": index(7),
            "too long": index("a" * 300 + ".safetensors"),
        },
        INDEX,
        Q,
    ),
    *bad(
        "L12",
        "SHARD_PATH",
        3,
        {
            "link": instead(lambda path: path.symlink_to("../outside.safetensors")),
            "link to itself": instead(lambda path: path.symlink_to(SINGLE)),
            "FIFO": instead(os.mkfifo),
            "folder": instead(Path.mkdir),
            "socket": instead(a_socket),
            "device": a_device,
        },
        SINGLE,
    ),
    *bad(
        "L13", "SHARD_MISSING", 3, {"missing": sharded(lambda f, first, second: (f / second).unlink())}, "model-00002"
    ),
    *bad(
        "L13",
        "SHARD_UNLISTED",
        3,
        {
            "unlisted": sharded(
                lambda f, first, second: shutil.copy(f / first, f / "model-00003-of-00002.safetensors")
            ),
            "shards without an index": lambda f, _: shutil.copy(f / SINGLE, f / "model-00003-of-00002.safetensors"),
        },
        "model-00003",
    ),
    *bad(
        "L13",
        "SHARD_CONTENT",
        3,
        {
            "in two": sharded(lambda f, first, second: shutil.copy(f / first, f / second)),
            "elsewhere": index("model-00002-of-00002.safetensors"),
        },
        "model-0000",
    ),
    *bad(
        "L13",
        "SHARD_SIZE",
        3,
        {
            str(size): sharded(lambda f, first, second, size=size: edit_index(f, metadata={"total_size": size}))
            for size in (1, True, "all", 1 << 70)
        },
        "total_size",
    ),
    *bad(
        "L13",
        "DUPLICATE_NAME",
        3,
        {"mapped twice": sharded(lambda f, first, second: (f / INDEX).write_text(twice((f / INDEX).read_text())))},
        Q,
    ),
    *bad("L14", "SHARD_CONTENT", 3, {"both": lambda f, _: split(f, keep_single=True)}, SINGLE, INDEX, "--prefer"),
    *bad(
        "L15",
        "NOT_FINITE",
        3,
        {"NaN": tensors(lambda t: t[UP].__setitem__((5, 3), torch.nan))},
        UP,
        "1 of 1792",
        "[5, 3]",
        late=True,
    ),
    *bad(
        "L15",
        "NOT_FINITE",
        3,
        {
            "infinities": tensors(lambda t: t[UP][7:9, 30:].fill_(-torch.inf)),
            "both": tensors(lambda t: t[UP][7:9, 30:].copy_(torch.tensor([torch.nan, torch.inf]))),
        },
        UP,
        "4 of 1792",
        "[7, 30]",
        late=True,
    ),
    *bad("L17", "IO", 5, {"reading a tensor": failing("preadv", errno.EIO)}, "EIO", SINGLE, late=True),
    *bad("L17", "IO", 5, {"reading a header": failing("pread", errno.EIO)}, "EIO", SINGLE),
    *bad("L17", "IO", 5, {"permission": failing("open", errno.EACCES)}, "EACCES", SINGLE),
    *bad(
        "L17",
        "IO",
        5,
        {"permission of the config": failing("open", errno.EACCES, on="config.json")},
        "EACCES",
    ),
    *bad(
        "L17",
        "IO",
        5,
        {"stale index": lambda f, p: (split(f), failing("open", errno.ESTALE, on=INDEX)(f, p))},
        "ESTALE",
    ),
    *bad("L17", "IO", 5, {"stale file system": failing("stat", errno.ESTALE)}, "ESTALE"),
    *bad("L17", "IO", 5, {"permission of the folder": failing("stat", errno.EACCES, on="m")}, "EACCES"),
    *bad("L17", "IO", 5, {"a list of the folder": failing("listdir", errno.EIO, on="m")}, "EIO"),
    *bad("L17", "IO", 5, {"the folder vanishes": vanish_behind_config}, "ENOENT"),
    *bad(
        "L18",
        "UNSUPPORTED_FORMAT",
        3,
        {end: only(f"model.{end}") for end in ("bin", "pt", "pkl", "gguf")},
        "safetensors",
    ),
]


@pytest.mark.parametrize("each", BAD, ids=str)
def test_a_bad_file_is_refused_in_one_line(
    each: Bad,
    text_model: tuple[Path, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = shutil.copytree(text_model[0], tmp_path / "m")
    if each.row not in ("L01", "L02"):
        check_refusal(each, folder, monkeypatch, capsys)
        return
    # harmed already: what the harm itself takes does not count
    each.harm(folder, monkeypatch)
    tracemalloc.start()
    check_refusal(replace(each, harm=lambda *_: None), folder, monkeypatch, capsys)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 << 20


def test_every_row_has_its_cases() -> None:
    """L16 is what must not matter."""
    check_rows(BAD, "L", 18, legal="L16")
