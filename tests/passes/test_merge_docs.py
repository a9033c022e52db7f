"""The Python of docs/merging.md runs as it stands."""

from __future__ import annotations

from pathlib import Path

import pytest

from pyruntime.checkpoint.writer import write_native
from tests.passes.skipless import attention, mlp, model_of, skipless, weights_of

DOCS = Path(__file__).parents[2] / "docs" / "merging.md"


def python_blocks() -> list[str]:
    """Indented paragraphs that begin with an import."""
    paragraphs = DOCS.read_text(encoding="utf-8").split("\n\n")
    return ["\n".join(line[4:] for line in each.splitlines()) for each in paragraphs if each.startswith("    from ")]


def test_the_python_of_the_docs_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = skipless([(attention(), mlp())] * 2)
    write_native(model_of(spec, weights_of(spec)), tmp_path / "skipless", dtype="float32")
    monkeypatch.chdir(tmp_path)
    blocks = python_blocks()
    assert blocks
    for block in blocks:
        exec(compile(block, str(DOCS), "exec"), {})  # noqa: S102
    assert "LayerMerge(index=1" in capsys.readouterr().out
