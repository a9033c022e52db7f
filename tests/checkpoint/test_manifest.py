"""Manifests: made as hashlib says, checked at load without a tensor byte, and verified to the last one (C12)."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from pyruntime.checkpoint import read_model
from pyruntime.checkpoint.manifest import MANIFEST, make_manifest, verify_manifest
from pyruntime.cli.main import run
from pyruntime.errors import CheckpointError, RunError
from tests.checkpoint.craft import INDEX, SINGLE, split, watched_opens, watched_reads

TextModel = tuple[Path, Any]
Capture = pytest.CaptureFixture[str]


@pytest.fixture
def folder(text_model: TextModel, tmp_path: Path) -> Path:
    """A good folder with a manifest."""
    copy = shutil.copytree(text_model[0], tmp_path / "m")
    vouch(copy)
    return copy


def vouch(folder: Path, **changes: Any) -> None:
    """Write the manifest of `folder`; `changes` replace its parts."""
    (folder / MANIFEST).unlink(missing_ok=True)
    (folder / MANIFEST).write_text(json.dumps({**make_manifest(folder, {"by": "a test"}), **changes}))


def files_of(folder: Path) -> dict[str, Any]:
    files: dict[str, Any] = json.loads((folder / MANIFEST).read_text())["files"]
    return files


def flip_last_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def verify(capsys: Capture, folder: Path) -> tuple[int, str, str]:
    code = run(["verify", str(folder)])
    out, err = capsys.readouterr()
    return code, out, err


def test_a_manifest_holds_what_hashlib_says(folder: Path) -> None:
    # the Hub's copy of a folder comes without these
    for name in ("README.md", "notes.txt", ".hidden.json", "pytorch_model.bin"):
        (folder / name).write_text("x")
    (folder / "sub.json").mkdir()
    shutil.copy(folder / SINGLE, folder / "extra.safetensors")
    found = make_manifest(folder, {"with": "pyruntime"})
    assert (found["format"], found["version"], found["made"]) == ("pyruntime-manifest", 1, {"with": "pyruntime"})
    json_files = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert found["files"].keys() == json_files | {SINGLE, "extra.safetensors"}
    for name, entry in found["files"].items():
        data = (folder / name).read_bytes()
        assert (entry["bytes"], entry["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
        header = data[: 8 + int.from_bytes(data[:8], "little")]
        expected = None if name in json_files else hashlib.sha256(header).hexdigest()
        assert entry.get("header_sha256") == expected


def test_a_folder_that_is_as_its_manifest_says_is_read(folder: Path, text_model: TextModel, capsys: Capture) -> None:
    header_end = 8 + int.from_bytes((folder / SINGLE).read_bytes()[:8], "little")
    with watched_reads() as reads:
        model = read_model(folder)
    assert model.spec == read_model(text_model[0]).spec and model.notes == ()
    assert all(end <= header_end for _, end in reads)
    files = files_of(folder)
    num_bytes = sum(entry["bytes"] for entry in files.values())
    assert verify(capsys, folder) == (0, f"OK: {len(files)} files, {num_bytes} bytes, as {MANIFEST} says\n", "")


def test_shards_and_links_of_the_hub_are_checked_alike(folder: Path, tmp_path: Path, capsys: Capture) -> None:
    snapshot = tmp_path / "models--a--b" / "snapshots" / "c"
    blobs = snapshot.parents[1] / "blobs"
    split(folder)
    vouch(folder)
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in folder.iterdir():
        path.rename(blobs / path.name)
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    assert {INDEX, "model-00001-of-00002.safetensors"} <= files_of(snapshot).keys()
    assert verify(capsys, snapshot)[0] == 0
    flip_last_byte(blobs / "model-00002-of-00002.safetensors")
    read_model(snapshot)
    assert "model-00002" in verify(capsys, snapshot)[2]


@pytest.mark.parametrize("name", [SINGLE, "tokenizer.json"])
def test_a_byte_that_changed_is_found_by_verify(folder: Path, capsys: Capture, name: str) -> None:
    flip_last_byte(folder / name)
    data = (folder / name).read_bytes()
    # neither size nor header tells
    read_model(folder)
    code, out, err = verify(capsys, folder)
    assert (code, out) == (3, "")
    assert err.startswith("error[MANIFEST_MISMATCH]: ") and err.count("\n") == 1
    assert name in err and hashlib.sha256(data).hexdigest() in err and files_of(folder)[name]["sha256"] in err


def test_what_loading_refuses_verify_refuses_too(folder: Path, capsys: Capture) -> None:
    shutil.copy(folder / SINGLE, folder / "extra.safetensors")
    assert "'extra.safetensors'" in verify(capsys, folder)[2]
    (folder / "extra.safetensors").unlink()
    os.truncate(folder / SINGLE, 4000)
    code, _, err = verify(capsys, folder)
    assert code == 3 and "size is 4000" in err and str(files_of(folder)[SINGLE]["bytes"]) in err


def test_a_folder_without_a_manifest_cannot_be_verified(text_model: TextModel, capsys: Capture) -> None:
    code, out, err = verify(capsys, text_model[0])
    assert (code, out) == (3, "")
    assert err.startswith(f"error[MANIFEST]: {MANIFEST} is missing") and err.count("\n") == 1


GOOD = {"bytes": 1, "sha256": "0" * 64}
BAD: dict[str, dict[str, Any]] = {
    "another format": {"format": "manifest"},
    "a later version": {"version": 2},
    "a version of true": {"version": True},
    "an unknown key": {"signature": "x"},
    "made a text": {"made": "x"},
    "no files": {"files": {}},
    "a list of files": {"files": ["config.json"]},
    "itself": {"files": {MANIFEST: GOOD}},
    "an entry of text": {"files": {"a": "0" * 64}},
    "an unknown field": {"files": {"a": {**GOOD, "mode": 1}}},
    "no hash": {"files": {"a": {"bytes": 1}}},
    "weights without a hash of the header": {"files": {SINGLE: GOOD}},
    "a header of what has none": {"files": {"a": {**GOOD, "header_sha256": "0" * 64}}},
    "negative bytes": {"files": {"a": {**GOOD, "bytes": -1}}},
    "bytes of true": {"files": {"a": {**GOOD, "bytes": True}}},
    "bytes beyond 63 bits": {"files": {"a": {**GOOD, "bytes": 1 << 63}}},
    "a short hash": {"files": {"a": {**GOOD, "sha256": "0" * 63}}},
    "a hash in capitals": {"files": {"a": {**GOOD, "sha256": "A" * 64}}},
    "a hash of numbers": {"files": {"a": {**GOOD, "sha256": 5}}},
}
NAMES = ["../a", "/etc/passwd", "sub/a", "..", ".", "", ".hidden", "a\\b", "a\0b", "a\nb", "a\x1b[2J", "a" * 256]
BAD |= {f"name {name!r}"[:40]: {"files": {name: GOOD}} for name in NAMES}


@pytest.mark.parametrize("case", BAD)
def test_a_manifest_that_is_not_clear_is_refused(folder: Path, case: str) -> None:
    (folder.parent / "a").write_text("x")
    vouch(folder, **BAD[case])
    with watched_opens() as opened, pytest.raises(CheckpointError) as caught:
        read_model(folder)
    assert caught.value.code == "MANIFEST"
    assert str(caught.value).startswith(MANIFEST) and str(caught.value).isprintable()
    # nothing that it names was looked at
    assert opened == [MANIFEST]


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b'{"files": NaN}', b"[" * 100_000, b" " * ((1 << 20) + 1)])
def test_a_manifest_that_is_no_object_is_refused(folder: Path, content: bytes) -> None:
    (folder / MANIFEST).write_bytes(content)
    with pytest.raises(CheckpointError, match=MANIFEST) as caught:
        read_model(folder)
    assert caught.value.code == "MANIFEST"


def test_a_link_that_leads_away_is_not_followed(folder: Path, tmp_path: Path) -> None:
    (folder / "config.json").rename(tmp_path / "config.json")
    (folder / "config.json").symlink_to(tmp_path / "config.json")
    with pytest.raises(CheckpointError) as caught:
        read_model(folder)
    assert caught.value.code == "SHARD_PATH"


def test_progress_ends_at_the_sum_of_all_files(folder: Path) -> None:
    seen: list[tuple[int, int]] = []
    verify_manifest(folder, lambda done, total: seen.append((done, total)))
    total = sum(entry["bytes"] for entry in files_of(folder).values())
    assert seen[-1] == (total, total)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_a_read_error_is_one_of_the_disk(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "pread", broken)
    with pytest.raises(RunError, match=r"EIO \(Input/output error\)") as caught:
        verify_manifest(folder)
    assert caught.value.exit_code == 5
