"""The trained skipless models of examples/: merged ones write the same text."""

from __future__ import annotations

from pathlib import Path

import pytest

from pyruntime import LLM, SamplingParams
from pyruntime.checkpoint import read_model
from pyruntime.checkpoint.writer import write_native
from pyruntime.passes.merge import MergeKind, MergeOptions, MergeReport, merge

EXAMPLES = Path(__file__).parents[2] / "examples"
FOLDERS = sorted(path.parent for path in EXAMPLES.glob("skipless-*/config.json"))
NUM_TOKENS = 200
NUM_CHARS = 80


def kinds(folder: Path) -> list[MergeKind]:
    """Those that are exact for every layer of the model."""
    normed = any(attention.pre is not None for _, attention in read_model(folder).spec.attentions())
    return [MergeKind.TRIANGULAR] if normed else [MergeKind.Q_P, MergeKind.PIVOTED]


def text_of(folder: Path, target: str) -> str:
    prompt = (EXAMPLES / "held_out.txt").read_text(encoding="utf-8")[:NUM_CHARS]
    llm = LLM(folder, dtype="float32", target=target)
    params = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, min_tokens=NUM_TOKENS)
    (found,) = llm.generate([prompt], params)
    assert len(found.outputs[0].token_ids) == NUM_TOKENS
    return found.outputs[0].text


@pytest.mark.skipif(not FOLDERS, reason="examples/ has no skipless model")
@pytest.mark.parametrize("target", ["reference", "cpu"])
@pytest.mark.parametrize(
    ("folder", "kind"),
    [(folder, kind) for folder in FOLDERS for kind in kinds(folder)],
    ids=lambda each: str(each)[-16:],
)
def test_a_merged_trained_model_writes_the_same_text(
    folder: Path, kind: MergeKind, target: str, tmp_path: Path
) -> None:
    model = read_model(folder)
    merged = merge(model, MergeOptions(kind=kind, dtype="float32", store_dtype="float32"))
    report = merged.reports[-1]
    assert isinstance(report, MergeReport)
    assert all(row.entry is not None and row.output is not None for row in report.layers), report.notes
    write_native(merged, tmp_path / "merged", dtype="float32", files_from=folder)
    assert text_of(tmp_path / "merged", target) == text_of(folder, target)
