"""A folder before a write, the write, and what may be there after it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyruntime.checkpoint.writer import write_native, write_pruned
from pyruntime.spec import DropPlan
from tests.checkpoint.writer.faults import Case, Write, contents, no_exchange, no_fsync
from tests.specs import ATTENTION, PLAIN_MLP, model_of, random_model

PLANS = (DropPlan(attention=(0,)), DropPlan(mlp=(0,)))
SPEC = model_of([(ATTENTION, PLAIN_MLP, False)])


# what is written over what; where names cannot be exchanged, it takes two steps
CASES = {
    "new": ("pruned", False, False),
    "overwritten": ("pruned", True, False),
    "overwritten in two steps": ("pruned", True, True),
    "native overwritten": ("native", True, False),
}


def writer(kind: str, source: Path) -> Write:
    """A writer of a folder in two versions; `source` is a new folder that it may use."""
    models = [random_model(SPEC, seed=seed) for seed in (0, 1)]
    if kind == "native":
        return lambda out, version: write_native(models[version], out, dtype="float32", overwrite=True)
    write_native(models[0], source, dtype="bfloat16")
    (source / "tokenizer.json").write_text("{}")
    (source / "pyruntime_manifest.json").unlink()
    return lambda out, version: write_pruned(source, PLANS[version], out, overwrite=True, shard_bytes=8000)


@pytest.fixture(scope="session", params=CASES)
def prepared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A case with both its versions written."""
    kind, exists, two_steps = CASES[request.param]
    folder = tmp_path_factory.mktemp("versions")
    write = writer(kind, folder / "source")
    for version in (0, 1):
        write(folder / str(version), version)
    versions = (contents(folder / "0"), contents(folder / "1"))
    return Case(write, folder / "0" if exists else None, versions, two_steps)


@pytest.fixture
def case(prepared: Case) -> Iterator[Case]:
    """A case on its disk: one that need keep nothing, and where there are two steps, cannot exchange names."""
    with no_fsync(), no_exchange() if prepared.two_steps else contextlib.nullcontext():
        yield prepared
