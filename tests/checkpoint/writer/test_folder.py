"""Where a folder may be written, what is asked before, and what it and its files look like."""

from __future__ import annotations

import hashlib
import json
import os
import re
import resource
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import pyruntime
from pyruntime.checkpoint import read_model
from pyruntime.checkpoint.atomic import Disk
from pyruntime.checkpoint.manifest import MANIFEST, verify_manifest
from pyruntime.checkpoint.writer import check_target, recover, write_pruned
from pyruntime.checkpoint.writer.dialects import WriteDialect, config_in
from pyruntime.cli.main import run
from pyruntime.errors import CheckpointError, RunError, UsageError
from pyruntime.spec import DropPlan
from tests.checkpoint.writer.faults import contents, in_child

PLAN = DropPlan(attention=(1,), mlp=(3,))
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")


@pytest.fixture
def source(text_model: tuple[Path, Any]) -> Path:
    return text_model[0]


def fingerprint(folder: Path) -> dict[str, tuple[str, int, int]]:
    """Content, time of change and mode of every file."""
    return {
        path.name: (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns, path.stat().st_mode)
        for path in [folder, *sorted(folder.iterdir())]
        if path.is_file()
    }


def test_the_source_is_neither_changed_nor_opened_for_writing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = fingerprint(source)
    flags: list[int] = []
    honest = os.open

    def spy(path: Any, how: int, *args: Any, **kwargs: Any) -> int:
        if "dir_fd" in kwargs or Path(path).is_relative_to(source):
            flags.append(how)
        return honest(path, how, *args, **kwargs)

    monkeypatch.setattr(os, "open", spy)
    for dialect in ("hf", "zeros"):
        write_pruned(source, PLAN, tmp_path / dialect, dialect=dialect)
    assert flags and not any(how & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) for how in flags)
    assert fingerprint(source) == before


def places(source: Path, tmp_path: Path) -> dict[str, tuple[Path, str]]:
    """Targets that are refused, and a word of the reason."""
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "file").write_text("x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "way").symlink_to(source.parent)
    return {
        "the source itself": (source, "never changed"),
        "the source by another way": (tmp_path / "way" / source.name, "never changed"),
        "the source by dots": (source / ".." / source.name, "never changed"),
        "inside the source": (source / "pruned", "never changed"),
        "around the source": (source.parent, "never changed"),
        "a link": (tmp_path / "link", "is a link"),
        "a file": (tmp_path / "file", "is no folder"),
        "a folder of other things": (tmp_path / "full", "holds no checkpoint"),
        "a mount point": (Path("/dev/shm"), "another file system"),
        "the root": (Path("/"), "name of a new folder"),
    }


NAMES = (
    "the source itself", "the source by another way", "the source by dots", "inside the source", "around the source",
    "a link", "a file", "a folder of other things", "a mount point", "the root",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_what_must_not_be_replaced_is_refused_even_if_it_may_be_overwritten(
    source: Path, tmp_path: Path, name: str
) -> None:
    out, word = places(source, tmp_path)[name]
    before, names = fingerprint(source), sorted(os.listdir(tmp_path))
    for refuse in (lambda: write_pruned(source, PLAN, out, overwrite=True), lambda: check_target(out, [source], True)):
        with pytest.raises(UsageError, match=word) as caught:
            refuse()
        assert (caught.value.code, caught.value.exit_code) == ("OUTPUT", 2)
    assert (fingerprint(source), sorted(os.listdir(tmp_path))) == (before, names)


# beside config.json and, or not, a manifest of ours
FOREIGN = ("thesis.tex", ".cache/x", "original/x", "src/", "main.py", "pytorch_model.bin", "chapter.md", ".env", "link")


@pytest.mark.parametrize("ours", [True, False], ids=["with our manifest", "without"])
@pytest.mark.parametrize("name", FOREIGN)
def test_a_folder_that_holds_anything_but_a_checkpoint_is_not_overwritten(
    source: Path, tmp_path: Path, name: str, ours: bool
) -> None:
    out = tmp_path / "out"
    write_pruned(source, PLAN, out)
    if not ours:
        (out / MANIFEST).unlink()
    first = name.partition("/")[0]
    if name == "link":
        (out / name).symlink_to(source)
    elif "/" in name:
        (out / first).mkdir()
    if not name.endswith("/") and name != "link":
        (out / name).write_text("x")
    before = sorted(out.rglob("*"))
    for refuse in (lambda: write_pruned(source, PLAN, out, overwrite=True), lambda: check_target(out, [source], True)):
        with pytest.raises(UsageError, match=re.escape(repr(first))) as caught:
            refuse()
        assert caught.value.code == "OUTPUT"
    assert sorted(out.rglob("*")) == before
    assert os.listdir(tmp_path) == ["out"]


def test_a_checkpoint_of_the_hub_is_overwritten(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    write_pruned(source, PLAN, out, shard_bytes=20_000)
    (out / MANIFEST).unlink()
    for name in ("README.md", "LICENSE.txt", ".gitattributes", "tokenizer.model", "chat_template.jinja"):
        (out / name).write_text("x")
    check_target(out, [source], overwrite=True)
    write_pruned(source, PLAN, out, overwrite=True)
    assert not (out / "README.md").exists()
    verify_manifest(out)


def test_what_comes_into_the_old_folder_during_the_write_is_not_lost(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    write_pruned(source, PLAN, out)

    def save(done: int, total: int) -> None:
        (out / "thesis.tex").write_text("x")

    with pytest.raises(UsageError, match=r"'thesis\.tex'"):
        write_pruned(source, DropPlan(), out, overwrite=True, progress=save)
    assert (out / "thesis.tex").read_text() == "x"
    assert os.listdir(tmp_path) == ["out"]


def test_a_target_is_checked_without_a_trace(source: Path, tmp_path: Path) -> None:
    check_target(tmp_path / "out", [source], overwrite=False)
    assert os.listdir(tmp_path) == []
    (tmp_path / "out").mkdir()
    with pytest.raises(UsageError, match="exists"):
        check_target(tmp_path / "out", [source], overwrite=False)
    check_target(tmp_path / "out", [source], overwrite=True)
    assert os.listdir(tmp_path) == ["out"]


def test_a_folder_that_exists_is_refused_unless_it_may_be_overwritten(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    write_pruned(source, PLAN, out)
    before = contents(out)
    with pytest.raises(UsageError, match=r"exists; .*--overwrite") as caught:
        write_pruned(source, DropPlan(), out)
    assert caught.value.code == "OUTPUT"
    assert contents(out) == before
    write_pruned(source, DropPlan(), out, overwrite=True)
    assert read_model(out).spec == read_model(source).spec
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("out", ["/proc/pruned", "/nowhere/at/all/pruned"])
def test_a_parent_that_cannot_be_written_is_an_error_of_the_disk(source: Path, out: str) -> None:
    for refuse in (lambda: write_pruned(source, PLAN, Path(out)), lambda: check_target(Path(out), [source], False)):
        with pytest.raises(RunError, match=f"cannot write {out}: E") as caught:
            refuse()
        assert (caught.value.code, caught.value.exit_code) == ("IO", 5)


def test_room_is_asked_for_before_anything_is_written(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = sum(len(content) for content in _written(source, tmp_path / "whole").values())
    made: list[Path] = []
    monkeypatch.setattr(Disk, "mkdir", lambda disk, path: made.append(path))
    monkeypatch.setattr(Disk, "free_bytes", lambda disk, folder: size)
    with pytest.raises(RunError, match=rf"ENOSPC \(\d+ bytes are needed, {size} are free") as caught:
        write_pruned(source, PLAN, tmp_path / "out")
    assert caught.value.exit_code == 5
    assert made == []
    assert os.listdir(tmp_path) == ["whole"]


def _written(source: Path, out: Path) -> dict[str, bytes]:
    write_pruned(source, PLAN, out)
    found = contents(out)
    assert found is not None
    return {name: content for name, content in found.items() if name != MANIFEST}


@pytest.mark.parametrize("limit", [0, 100, 5000, 40_000])
def test_a_limit_of_the_size_of_files_leaves_nothing(source: Path, tmp_path: Path, limit: int) -> None:
    def work() -> int:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try:
            write_pruned(source, PLAN, tmp_path / "out")
        except RunError as error:
            return error.exit_code if "EFBIG" in str(error) or "too large" in str(error) else 1
        return 0

    assert in_child(work)() == 5
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_modes_follow_the_umask(source: Path, tmp_path: Path, mask: int) -> None:
    old = os.umask(mask)
    try:
        write_pruned(source, PLAN, tmp_path / "out")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o777 & ~mask
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").iterdir()} == {0o666 & ~mask}


def test_what_goes_along_is_data_of_the_model_and_never_code_or_other_weights(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for path in source.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    others = ("modeling_x.py", "pytorch_model.bin", "pytorch_model.bin.index.json", "README.md", "optimizer.pt", ".env")
    for name in (*others, "LICENSE", "chat_template.jinja"):
        (folder / name).write_text("{}")
    (folder / "special_tokens_map.json").mkdir()
    write_pruned(folder, PLAN, tmp_path / "out")
    found = sorted(os.listdir(tmp_path / "out"))
    wanted = {*TOKENIZER_FILES, "LICENSE", "chat_template.jinja", "config.json", "model.safetensors", MANIFEST}
    assert found == sorted(wanted)
    for name in (*TOKENIZER_FILES, "LICENSE"):
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()
    verify_manifest(tmp_path / "out")


def test_the_manifest_says_what_was_done_from_what(source: Path, tmp_path: Path) -> None:
    write_pruned(source, PLAN, tmp_path / "one", made={"figures": {"perplexity": 4.5}})
    write_pruned(tmp_path / "one", DropPlan(mlp=(0,)), tmp_path / "two")
    one, two = (json.loads((tmp_path / name / MANIFEST).read_text())["made"] for name in ("one", "two"))
    assert one["by"] == f"pyruntime {pyruntime.__version__}"
    assert DropPlan.from_json(one["plan"]) == PLAN
    assert one["figures"] == {"perplexity": 4.5}
    header = (source / "model.safetensors").read_bytes()
    header = header[: 8 + int.from_bytes(header[:8], "little")]
    own = hashlib.sha256((source / "config.json").read_bytes() + header).hexdigest()
    assert one["from"] == {"name": source.name, "config_and_headers_sha256": own}
    manifest = hashlib.sha256((tmp_path / "one" / MANIFEST).read_bytes()).hexdigest()
    assert two["from"] == {"name": "one", "manifest_sha256": manifest}
    assert str(tmp_path) not in (tmp_path / "two" / MANIFEST).read_text()


def test_what_would_read_as_something_else_is_not_written(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(dialect: WriteDialect, config: Mapping[str, Any], gone: DropPlan) -> dict[str, Any]:
        return config_in(dialect, config, gone | DropPlan(attention=(2,)))

    monkeypatch.setattr("pyruntime.checkpoint.writer.pruned.config_in", wrong)
    with pytest.raises(CheckpointError, match="would read as another model: layer 2 differs") as caught:
        write_pruned(source, PLAN, tmp_path / "out")
    assert caught.value.code == "WRITER"
    assert os.listdir(tmp_path) == []


def test_an_interrupt_leaves_nothing(source: Path, tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        assert (tmp_path / ".out.pyruntime-tmp").is_dir()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_pruned(source, PLAN, tmp_path / "out", progress=interrupt)
    assert os.listdir(tmp_path) == []


def test_progress_ends_where_it_says(source: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    written = write_pruned(source, PLAN, tmp_path / "out", progress=lambda done, total: seen.append((done, total)))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert {total for _, total in seen} == {2 * written.weight_bytes}
    assert seen[-1][0] == 2 * written.weight_bytes


def test_verify_removes_what_a_killed_write_left_and_gives_back_what_it_took(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    write_pruned(source, PLAN, out)
    before = contents(out)
    (tmp_path / ".out.pyruntime-tmp").mkdir()
    (tmp_path / ".out.pyruntime-tmp" / "model.safetensors").write_text("half")
    assert run(["verify", str(out)]) == 0
    assert "removed .out.pyruntime-tmp" in capsys.readouterr().out
    out.rename(tmp_path / ".out.pyruntime-old")
    assert run(["verify", str(out)]) == 0
    said = capsys.readouterr().out
    assert "gave out back its name" in said and "OK: " in said
    assert contents(out) == before
    assert os.listdir(tmp_path) == ["out"]
    assert recover(out) == ()
