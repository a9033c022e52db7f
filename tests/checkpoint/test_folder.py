"""The weight files of a folder: indexes that lie, links that lead away, things that are no files."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from pyruntime.checkpoint.folder import open_tensors
from pyruntime.checkpoint.strict_json import read_object
from pyruntime.errors import CheckpointError, PyruntimeError, RunError
from tests.checkpoint.craft import INDEX, SINGLE, num_open_files, watched_opens, write_index, write_shards

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
X, Y = torch.arange(4.0), torch.arange(6.0).reshape(2, 3)


def within_seconds(call: Callable[[], Any], seconds: float = 20) -> Any:
    """The result of `call`, or a failure where it hangs."""
    results: list[Any] = []

    def run() -> None:
        try:
            results.append(call())
        except BaseException as error:
            results.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    assert results, f"still running after {seconds} seconds"
    result = results.pop()
    if isinstance(result, BaseException):
        raise result
    return result


@pytest.fixture(autouse=True)
def _nothing_stays_open() -> Iterator[None]:
    before = num_open_files()
    yield
    # a full collection is slow: only where an exception in a cycle may still hold a file
    if num_open_files() > before:
        gc.collect()
    assert num_open_files() <= before


def refused(folder: Path, code: str) -> str:
    """The message with which the folder is refused."""
    with pytest.raises(CheckpointError) as caught:
        within_seconds(lambda: open_tensors(folder))
    assert caught.value.code == code
    message = caught.value.one_line()
    assert message.isprintable()
    return message


def test_shards_are_found_by_their_index(tmp_path: Path) -> None:
    write_shards(tmp_path, {FIRST: {"x": X}, SECOND: {"y": Y}})
    found = open_tensors(tmp_path)
    assert {name: (each.shard.path.name, each.info.shape) for name, each in found.items()} == {
        "x": (FIRST, (4,)),
        "y": (SECOND, (2, 3)),
    }
    for name, tensor in (("x", X), ("y", Y)):
        info = found[name].info
        assert found[name].shard.read(info.start, info.num_bytes) == tensor.numpy().tobytes()


# L11
BAD_PATHS: dict[str, Any] = {
    "parent": "../outside.safetensors",
    "absolute": "/outside.safetensors",
    "folder": "sub/outside.safetensors",
    "this folder": "./outside.safetensors",
    "URL": "http://host/outside.safetensors",
    "file URL": "file:outside/x.safetensors",
    "backslash": "sub\\outside.safetensors",
    "drive": "..\\outside.safetensors",
    "NUL": "outside.safetensors\0.safetensors",
    "newline": "out\nside.safetensors",
    "hidden": ".outside.safetensors",
    "pickle": "outside.bin",
    "no suffix": "outside",
    "suffix in capitals": "outside.SAFETENSORS",
    "suffix alone": ".safetensors",
    "two dots": "..",
    "empty": "",
    "number": 5,
    "null": None,
    "list": ["outside.safetensors"],
}


@pytest.mark.parametrize("case", BAD_PATHS)
def test_an_index_may_only_name_files_beside_it(tmp_path: Path, case: str) -> None:
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    # readable files at the places named, so that only the rule can refuse them
    for place in (tmp_path, folder, folder / "sub"):
        save_file({"x": X}, place / "outside.safetensors")
        save_file({"x": X}, place / ".outside.safetensors")
        save_file({"x": X}, place / "outside.bin")
    write_index(folder, {"x": BAD_PATHS[case]})
    with watched_opens() as opened:
        message = refused(folder, "SHARD_PATH")
    assert opened == [INDEX]
    assert "'x'" in message


# L12
def test_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"x": X}, tmp_path / "secret.safetensors")
    (folder / SINGLE).symlink_to("../secret.safetensors")
    refused(folder, "SHARD_PATH")
    (folder / SINGLE).rename(folder / FIRST)
    write_index(folder, {"x": FIRST})
    refused(folder, "SHARD_PATH")


def test_a_link_within_the_folder_is_followed(tmp_path: Path) -> None:
    save_file({"x": X}, tmp_path / "real.safetensors")
    (tmp_path / SINGLE).symlink_to("real.safetensors")
    assert open_tensors(tmp_path).keys() == {"x"}


def hub_cache(tmp_path: Path) -> Path:
    """A snapshot as the Hub's cache lays it out, its shards links to blobs named by their hash."""
    repository = tmp_path / "models--owner--name"
    snapshot = repository / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    write_shards(repository / "blobs", {FIRST: {"x": X}, SECOND: {"y": Y}})
    for number, name in enumerate((FIRST, SECOND, INDEX)):
        (repository / "blobs" / name).rename(repository / "blobs" / f"{number:064x}")
        (snapshot / name).symlink_to(f"../../blobs/{number:064x}")
    return snapshot


def test_the_links_of_the_hub_cache_are_followed(tmp_path: Path) -> None:
    snapshot = hub_cache(tmp_path)
    assert open_tensors(snapshot).keys() == {"x", "y"}
    # also where the user reaches the snapshot through a link of his own
    (tmp_path / "mine").symlink_to(snapshot)
    assert open_tensors(tmp_path / "mine").keys() == {"x", "y"}


def test_a_link_out_of_the_hub_cache_is_refused(tmp_path: Path) -> None:
    snapshot = hub_cache(tmp_path)
    save_file({"x": X}, tmp_path / "secret.safetensors")
    (snapshot / FIRST).unlink()
    (snapshot / FIRST).symlink_to("../../../secret.safetensors")
    refused(snapshot, "SHARD_PATH")


@pytest.mark.parametrize("place", ["trick/snapshots/evil", "models--owner--name/snapshots/evil"])
def test_only_the_blobs_of_a_hub_cache_may_be_linked_to(tmp_path: Path, place: str) -> None:
    """Any folder can lie in one that is called snapshots."""
    folder = tmp_path / place
    folder.mkdir(parents=True)
    save_file({"x": X}, folder.parents[1] / "secret.safetensors")
    (folder / SINGLE).symlink_to("../../secret.safetensors")
    refused(folder, "SHARD_PATH")
    blobs = folder.parents[1] / "blobs"
    blobs.mkdir()
    (folder.parents[1] / "secret.safetensors").rename(blobs / "secret.safetensors")
    (folder / SINGLE).unlink()
    (folder / SINGLE).symlink_to("../../blobs/secret.safetensors")
    if place.startswith("models--"):
        assert open_tensors(folder).keys() == {"x"}
    else:
        refused(folder, "SHARD_PATH")


def test_blobs_that_are_a_link_themselves_lead_nowhere(tmp_path: Path) -> None:
    snapshot = hub_cache(tmp_path)
    (snapshot.parents[1] / "blobs").rename(tmp_path / "elsewhere")
    (snapshot.parents[1] / "blobs").symlink_to(tmp_path / "elsewhere")
    refused(snapshot, "SHARD_PATH")


def test_a_chain_of_links_is_judged_by_its_end(tmp_path: Path) -> None:
    snapshot = hub_cache(tmp_path)
    blob = (snapshot / FIRST).resolve()
    blob.rename(tmp_path / "secret.safetensors")
    blob.symlink_to(tmp_path / "secret.safetensors")
    refused(snapshot, "SHARD_PATH")


def test_a_link_to_itself_is_refused(tmp_path: Path) -> None:
    (tmp_path / FIRST).symlink_to(FIRST)
    write_index(tmp_path, {"x": FIRST})
    with pytest.raises(PyruntimeError):
        open_tensors(tmp_path)


def test_a_device_is_refused(tmp_path: Path) -> None:
    (tmp_path / SINGLE).symlink_to("/dev/zero")
    refused(tmp_path, "SHARD_PATH")


@pytest.mark.parametrize("name", [SINGLE, FIRST])
def test_a_fifo_does_not_hang(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    if name == FIRST:
        write_index(tmp_path, {"x": FIRST})
    refused(tmp_path, "SHARD_PATH")


def test_a_fifo_for_an_index_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / INDEX)
    refused(tmp_path, "SHARD_CONTENT")


@pytest.mark.parametrize("name", [SINGLE, FIRST])
def test_a_folder_is_no_weight_file(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    if name == FIRST:
        write_index(tmp_path, {"x": FIRST})
    refused(tmp_path, "SHARD_PATH")


def test_a_folder_for_a_json_file_leaves_nothing_open(tmp_path: Path) -> None:
    with pytest.raises(PyruntimeError):
        read_object(tmp_path, "CONFIG")


# L13
def test_a_shard_that_is_missing_is_named(tmp_path: Path) -> None:
    write_shards(tmp_path, {FIRST: {"x": X}, SECOND: {"y": Y}})
    (tmp_path / SECOND).unlink()
    assert SECOND in refused(tmp_path, "SHARD_MISSING")
    (tmp_path / SECOND).symlink_to("nowhere.safetensors")
    message = refused(tmp_path, "SHARD_MISSING")
    assert SECOND in message and "a link to nothing" in message


def test_a_wrong_sum_of_the_publisher_can_be_taken_out(tmp_path: Path) -> None:
    write_shards(tmp_path, {FIRST: {"x": X}, SECOND: {"y": Y}})
    right = {"x": FIRST, "y": SECOND}
    write_index(tmp_path, right, metadata={"total_size": 1})
    message = refused(tmp_path, "SHARD_SIZE")
    assert str(X.nbytes + Y.nbytes) in message and "remove metadata.total_size" in message
    write_index(tmp_path, right, metadata={})
    assert open_tensors(tmp_path).keys() == {"x", "y"}


MAPS: dict[str, tuple[dict[str, str], str]] = {
    "swapped": ({"x": SECOND, "y": FIRST}, "'x'"),
    "one tensor in the other file": ({"x": FIRST, "y": FIRST}, "'y'"),
    "a tensor in no file": ({"x": FIRST, "y": SECOND, "z": SECOND}, "'z'"),
    "a tensor that is not listed": ({"y": SECOND, "z": FIRST}, "'x'"),
}


@pytest.mark.parametrize("case", MAPS)
def test_an_index_that_disagrees_with_its_shards_is_refused(tmp_path: Path, case: str) -> None:
    write_shards(tmp_path, {FIRST: {"x": X}, SECOND: {"y": Y}})
    weight_map, at_fault = MAPS[case]
    write_index(tmp_path, weight_map)
    assert at_fault in refused(tmp_path, "SHARD_CONTENT")


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    write_shards(tmp_path, {FIRST: {"x": X}, SECOND: {"x": X, "y": Y}})
    write_index(tmp_path, {"x": FIRST, "y": SECOND})
    assert "'x'" in refused(tmp_path, "SHARD_CONTENT")


def test_an_index_that_lists_a_tensor_twice_is_refused(tmp_path: Path) -> None:
    write_shards(tmp_path, {FIRST: {"x": X}, SECOND: {"y": Y}})
    (tmp_path / INDEX).write_text(f'{{"weight_map": {{"x": "{FIRST}", "x": "{SECOND}", "y": "{SECOND}"}}}}')
    refused(tmp_path, "DUPLICATE_NAME")


@pytest.mark.parametrize("weight_map", [{}, [], None, "x", 3])
def test_an_index_without_a_map_is_refused(tmp_path: Path, weight_map: Any) -> None:
    write_index(tmp_path, weight_map)
    assert "weight_map" in refused(tmp_path, "SHARD_CONTENT")


@pytest.mark.parametrize("text", ["", "[]", "{", "\0", '{"weight_map": NaN}', "[" * 100_000])
def test_an_index_that_is_no_json_object_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / INDEX).write_text(text)
    assert INDEX in refused(tmp_path, "SHARD_CONTENT")


def test_an_index_above_the_cap_is_refused_unread(tmp_path: Path) -> None:
    with (tmp_path / INDEX).open("wb") as file:
        file.truncate((16 << 20) + 1)
    assert "16777217" in refused(tmp_path, "SHARD_CONTENT")


def test_a_broken_shard_is_named(tmp_path: Path) -> None:
    write_shards(tmp_path, {FIRST: {"x": X}, SECOND: {"y": Y}})
    with (tmp_path / SECOND).open("ab") as file:
        file.write(b"tail")
    assert SECOND in refused(tmp_path, "OFFSETS")


# L14
def test_single_file_and_index_together_are_refused(tmp_path: Path) -> None:
    write_shards(tmp_path, {FIRST: {"x": X}, SECOND: {"y": Y}})
    save_file({"x": X, "y": Y}, tmp_path / SINGLE)
    message = refused(tmp_path, "SHARD_CONTENT")
    assert SINGLE in message and INDEX in message


# L18
@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "model.pt", "model.pth", "model.pkl", "model.ckpt", "model.gguf"]
)
def test_other_formats_are_refused_unopened(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x80\x04.")
    with watched_opens() as opened:
        assert name in refused(tmp_path, "UNSUPPORTED_FORMAT")
    assert opened == []


def test_other_formats_beside_safetensors_are_no_obstacle(tmp_path: Path) -> None:
    """Published LLM-Drop checkpoints carry a stale index of .bin files."""
    write_shards(tmp_path, {FIRST: {"x": X}})
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    (tmp_path / "pytorch_model.bin.index.json").write_text('{"weight_map": {"x": "pytorch_model.bin"}}')
    assert open_tensors(tmp_path).keys() == {"x"}


def test_a_folder_without_weights_says_so(tmp_path: Path) -> None:
    assert SINGLE in refused(tmp_path, "SHARD_MISSING")


INSTEAD = {
    ("adapter_model.safetensors", "training_args.bin"): "merge it into its base model",
    ("adapter_config.json",): "merge it into its base model",
    (FIRST, SECOND): f"get {INDEX} too",
    ("consolidated.safetensors",): "layout of transformers",
    ("model.fp16.safetensors", "optimizer.pt"): f"rename it to {SINGLE}",
}


@pytest.mark.parametrize("names", INSTEAD, ids=str)
def test_weights_of_another_kind_are_named_with_what_to_do(tmp_path: Path, names: tuple[str, ...]) -> None:
    for name in names:
        (tmp_path / name).write_bytes(b"{}")
    message = refused(tmp_path, "SHARD_MISSING")
    assert names[0] in message and INSTEAD[names] in message


def test_a_file_that_shrinks_after_the_check_is_truncated(tmp_path: Path) -> None:
    """L06: exact counts are read, so what is gone is an error and no zeros."""
    save_file({"x": X}, tmp_path / SINGLE)
    stored = open_tensors(tmp_path)["x"]
    os.truncate(tmp_path / SINGLE, stored.info.start + stored.info.num_bytes - 1)
    with pytest.raises(CheckpointError) as caught:
        stored.shard.read(stored.info.start, stored.info.num_bytes)
    assert caught.value.code == "TRUNCATED"
    assert stored.shard.bytes_read == 0


def test_a_read_error_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({"x": X}, tmp_path / SINGLE)
    stored = open_tensors(tmp_path)["x"]

    def broken(*_: Any) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", broken)
    with pytest.raises(RunError, match="Input/output error") as caught:
        stored.shard.read(stored.info.start, stored.info.num_bytes)
    assert (caught.value.code, caught.value.exit_code) == ("IO", 5)
    assert SINGLE in str(caught.value)
