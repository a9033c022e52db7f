"""Manifests: made as hashlib says, checked at load without a tensor byte, and verified to the last one (C12)."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.utils import filter_repo_objects

from pyruntime.checkpoint import read_model, resolve_model
from pyruntime.checkpoint.manifest import MANIFEST, make_manifest, verify_manifest
from pyruntime.cli.main import run
from pyruntime.errors import CheckpointError, RunError
from tests.checkpoint.craft import INDEX, SINGLE, split, watched_opens, watched_reads, write_index

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
    for name in ("README.md", "notes.txt", ".hidden.json", "pytorch_model.bin", "consolidated.safetensors"):
        (folder / name).write_text("x")
    (folder / "sub.json").mkdir()
    found = make_manifest(folder, {"with": "pyruntime"})
    assert (found["format"], found["version"], found["made"]) == ("pyruntime-manifest", 1, {"with": "pyruntime"})
    json_files = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert found["files"].keys() == json_files | {SINGLE}
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
    shutil.copy(folder / SINGLE, folder / "model-extra.safetensors")
    assert "'model-extra.safetensors'" in verify(capsys, folder)[2]
    (folder / "model-extra.safetensors").unlink()
    os.truncate(folder / SINGLE, 4000)
    code, _, err = verify(capsys, folder)
    assert code == 3 and "size is 4000" in err and str(files_of(folder)[SINGLE]["bytes"]) in err


def test_a_folder_without_a_manifest_cannot_be_verified(text_model: TextModel, capsys: Capture) -> None:
    code, out, err = verify(capsys, text_model[0])
    assert (code, out) == (3, "")
    assert err.startswith(f"error[MANIFEST]: {MANIFEST} is missing") and err.count("\n") == 1
    assert "pyruntime verify FOLDER --write" in err


ADDED = ["special_tokens_map.json", "chat_template.jinja", "tokenizer.model", INDEX, "model-extra.safetensors"]


@pytest.mark.parametrize("name", ADDED)
def test_a_file_that_was_added_is_refused(folder: Path, capsys: Capture, name: str) -> None:
    (folder / name).write_text("{}")
    refused_by_both(folder, capsys, name)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", SINGLE])
def test_a_manifest_that_leaves_out_a_file_is_refused(folder: Path, capsys: Capture, name: str) -> None:
    vouch(folder, files={each: entry for each, entry in files_of(folder).items() if each != name})
    refused_by_both(folder, capsys, name)


def refused_by_both(folder: Path, capsys: Capture, name: str) -> None:
    with pytest.raises(CheckpointError, match=f"'{name}'") as caught:
        read_model(folder)
    assert caught.value.code == "MANIFEST_MISMATCH"
    assert verify(capsys, folder) == (3, "", caught.value.one_line() + "\n")


def test_what_the_hub_gives_of_a_vouched_folder_is_as_its_manifest_says(
    folder: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = split(folder)
    weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    for name in (first, second):
        (folder / name).rename(folder / f"pytorch_{name}")
    write_index(folder, {tensor: f"pytorch_{file}" for tensor, file in weight_map.items()})
    for name in ("README.md", "consolidated.safetensors", "adapter_model.safetensors"):
        (folder / name).write_text("x")
    vouch(folder)
    assert {f"pytorch_{first}", f"pytorch_{second}"} <= files_of(folder).keys()
    (note,) = read_model(folder).notes
    assert "adapter_model.safetensors, consolidated.safetensors" in note

    def fetch(_: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        copy = tmp_path / "hub"
        copy.mkdir(exist_ok=True)
        for name in filter_repo_objects(os.listdir(folder), allow_patterns=allow_patterns):
            shutil.copy(folder / name, copy)
        return str(copy)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    copy = resolve_model("owner/name")
    assert not (copy / "consolidated.safetensors").exists()
    assert read_model(copy).notes == ()
    assert verify(capsys, copy)[0] == 0
    # a manifest of another writer may list what is not fetched
    whole = files_of(folder) | {"README.md": {"bytes": 1, "sha256": hashlib.sha256(b"x").hexdigest()}}
    vouch(copy, files=whole)
    assert verify(capsys, copy)[0] == 0
    (copy / "README.md").write_text("y")
    assert "README.md" in verify(capsys, copy)[2]


def test_a_manifest_is_written_once(text_model: TextModel, tmp_path: Path, capsys: Capture) -> None:
    folder = shutil.copytree(text_model[0], tmp_path / "m")
    assert run(["verify", str(folder), "--write"]) == 0
    written = (folder / MANIFEST).read_bytes()
    assert str(len(files_of(folder))) in capsys.readouterr().out
    for name, entry in files_of(folder).items():
        assert entry["sha256"] == hashlib.sha256((folder / name).read_bytes()).hexdigest()
    assert verify(capsys, folder)[0] == 0
    flip_last_byte(folder / SINGLE)
    assert run(["verify", str(folder), "--write"]) == 3
    err = capsys.readouterr().err
    assert err.startswith("error[MANIFEST]: ") and "remove it first" in err and err.count("\n") == 1
    assert (folder / MANIFEST).read_bytes() == written


def test_no_manifest_is_written_of_nothing_or_of_what_cannot_be_read(
    text_model: TextModel, tmp_path: Path, capsys: Capture
) -> None:
    (tmp_path / "empty").mkdir()
    assert run(["verify", str(tmp_path / "empty"), "--write"]) == 3
    assert "error[MANIFEST]" in capsys.readouterr().err
    folder = shutil.copytree(text_model[0], tmp_path / "m")
    os.truncate(folder / SINGLE, 5)
    assert run(["verify", str(folder), "--write"]) == 3
    assert "error[HEADER_SIZE]" in capsys.readouterr().err
    assert not list(tmp_path.rglob(f"*{MANIFEST}*"))


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


@pytest.mark.parametrize("write", [False, True])
def test_progress_ends_at_the_sum_of_all_files(folder: Path, write: bool) -> None:
    seen: list[tuple[int, int]] = []
    if write:
        make_manifest(folder, {}, lambda done, total: seen.append((done, total)))
    else:
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
