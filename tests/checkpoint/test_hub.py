"""From what a user calls a model to a folder: paths, ids in the local cache, and what is refused."""

from __future__ import annotations

import importlib
import inspect
import os
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError, HTTPError, RepositoryNotFoundError
from huggingface_hub.utils import filter_repo_objects

from pyruntime.checkpoint import resolve_model
from pyruntime.errors import PyruntimeError, RunError, UsageError
from tests.checkpoint.craft import write_index

# the HTTP client that this huggingface_hub uses; its name differs between releases
http: Any = importlib.import_module(HTTPError.__module__.partition(".")[0])
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty Hub cache, with the network forbidden."""
    folder = tmp_path / "hub"
    folder.mkdir()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    # a name must never be found beside the tests by chance
    monkeypatch.chdir(tmp_path)
    return folder


def put(cache: Path, name: str, revision: str = "main") -> Path:
    """A downloaded model in the Hub's own layout."""
    repository = cache / f"models--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / COMMIT
    (repository / "refs").mkdir(parents=True)
    (repository / "blobs").mkdir()
    snapshot.mkdir(parents=True)
    (repository / "refs" / revision).write_text(COMMIT)
    (repository / "blobs" / "aa").write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/aa")
    return snapshot


def test_a_folder_is_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_model(tmp_path) == tmp_path
    assert resolve_model(str(tmp_path)) == tmp_path
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    # what lies on disk wins over the Hub
    assert resolve_model("owner/name").resolve() == tmp_path / "owner" / "name"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_model("~/owner/name") == tmp_path / "owner" / "name"


@pytest.mark.parametrize("name", ["owner/name", "name", "owner/Name-1.5_b.2"])
def test_a_hub_id_is_found_in_the_cache_offline(cache: Path, name: str) -> None:
    snapshot = put(cache, name)
    assert resolve_model(name).resolve() == snapshot


def test_a_revision_is_looked_up(cache: Path) -> None:
    snapshot = put(cache, "owner/name", "v2")
    assert resolve_model("owner/name", "v2").resolve() == snapshot
    assert resolve_model("owner/name", COMMIT).resolve() == snapshot
    with pytest.raises(RunError):
        resolve_model("owner/name")


def test_an_unknown_id_offline_is_one_line(cache: Path) -> None:
    with pytest.raises(RunError) as caught:
        resolve_model("owner/unknown")
    assert (caught.value.code, caught.value.exit_code) == ("IO", 5)
    assert "owner/unknown" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is None


def test_nothing_that_could_be_executed_is_asked_for(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def spy(*args: Any, **kwargs: Any) -> str:
        bound = inspect.signature(honest).bind(*args, **kwargs)
        asked.append(bound.arguments)
        return str(cache)

    honest = huggingface_hub.snapshot_download
    monkeypatch.setattr(huggingface_hub, "snapshot_download", spy)
    resolve_model("owner/name")
    repository = {
        "model.safetensors": True,
        "model-00001-of-00002.safetensors": True,
        "model.safetensors.index.json": True,
        "config.json": True,
        "generation_config.json": True,
        "tokenizer.json": True,
        "tokenizer_config.json": True,
        "tokenizer.model": True,
        "chat_template.jinja": True,
        "pytorch_model.bin": False,
        "model.pt": False,
        "model.pth": False,
        "model.ckpt": False,
        "training_args.bin": False,
        "modeling_dropped_llama.py": False,
        "optimizer.pkl": False,
        "model.gguf": False,
        "model.onnx": False,
        "tf_model.h5": False,
        "libx.so": False,
        "README.md": False,
    }
    # the library's own filter says what the patterns mean
    taken = set(filter_repo_objects(repository, allow_patterns=asked[0]["allow_patterns"]))
    assert taken == {name for name, wanted in repository.items() if wanted}
    assert asked[0]["repo_id"] == "owner/name"


def test_shards_under_other_names_are_fetched_by_the_same_commit(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = put(cache, "owner/name")
    shards = [f"pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    write_index(snapshot, {"x": shards[0], "y": shards[1], "z": shards[0]})
    stored = {*shards, "consolidated.safetensors", "pytorch_model-00001-of-00002.bin"}
    asked: list[str | None] = []

    def fetch(_: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append(revision)
        for name in filter_repo_objects(stored, allow_patterns=allow_patterns):
            (snapshot / name).touch()
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    for _ in range(2):
        assert resolve_model("owner/name", "main") == snapshot
    assert stored & set(os.listdir(snapshot)) == set(shards)
    # a branch may move in between; what is there is not asked for again
    assert asked == ["main", COMMIT, "main"]


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "x.bin", ".x.safetensors", "sub/x.safetensors", "*.safetensors", 5]
)
def test_an_index_cannot_have_anything_else_fetched(cache: Path, monkeypatch: pytest.MonkeyPatch, name: Any) -> None:
    snapshot = put(cache, "owner/name")
    write_index(snapshot, {"x": name})
    stored = {"x.bin", ".x.safetensors", "x.safetensors", "sub/x.safetensors"}
    taken: set[str] = set()

    def fetch(*_: Any, allow_patterns: list[str], **__: Any) -> str:
        taken.update(filter_repo_objects(stored, allow_patterns=allow_patterns))
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert resolve_model("owner/name") == snapshot
    assert taken == set()


BAD_NAMES = [
    "a/b/c",
    "owner/",
    "/owner/none",
    "-x",
    "own er/name",
    "owner/na\0me",
    "../none",
    "owner\\name",
    "owner/..",
]
BAD_NAMES += ["ünicode/name", "https://huggingface.co/owner/name", "x" * 300, "x/" + "y" * 300, "~no-such-user-here/x"]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_what_is_neither_folder_nor_id_is_refused(cache: Path, name: str) -> None:
    with pytest.raises(UsageError) as caught:
        resolve_model(name)
    assert (caught.value.code, caught.value.exit_code) == ("MODEL", 2)
    assert caught.value.one_line().isprintable()


def test_a_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.touch()
    with pytest.raises(UsageError, match="is a file") as caught:
        resolve_model(file)
    assert caught.value.code == "MODEL"


def test_a_path_object_never_means_a_hub_id(cache: Path) -> None:
    put(cache, "owner/name")
    with pytest.raises(UsageError):
        resolve_model(Path("owner/name"))


def hub_error(cls: type[HfHubHTTPError], status: int) -> Exception:
    request = http.Request("GET", "https://huggingface.co/api/models/owner/name")
    return cls(f"{status} Client Error.\n\nfor url x", response=http.Response(status, request=request))


FAILURES: dict[str, tuple[Exception, type[PyruntimeError], str]] = {
    "no such repository": (hub_error(RepositoryNotFoundError, 404), UsageError, "MODEL"),
    "server error": (hub_error(HfHubHTTPError, 503), RunError, "IO"),
    "disk full": (OSError(28, "No space left on device"), RunError, "IO"),
    "connection lost": (http.ReadError("connection reset by peer"), RunError, "IO"),
    "timeout": (http.ReadTimeout("timed out"), RunError, "IO"),
}


@pytest.mark.parametrize("case", FAILURES)
def test_a_download_that_fails_is_one_line(cache: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    failure, expected, code = FAILURES[case]

    def fail(*_: Any, **__: Any) -> str:
        raise failure

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(expected) as caught:
        resolve_model("owner/name")
    assert caught.value.code == code
    assert "owner/name" in str(caught.value)
    assert "\n" not in caught.value.one_line()


def test_the_tests_stay_offline() -> None:
    assert os.environ["HF_HUB_OFFLINE"] == "1"
