"""The trained skipless models of examples/: merged ones write the same text."""

from __future__ import annotations

from pathlib import Path

import pytest

from pyruntime import LLM, CompletionOutput, SamplingParams
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


def completion_of(folder: Path, target: str) -> CompletionOutput:
    prompt = (EXAMPLES / "held_out.txt").read_text(encoding="utf-8")[:NUM_CHARS]
    llm = LLM(folder, dtype="float32", target=target)
    params = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, min_tokens=NUM_TOKENS, logprobs=2)
    (found,) = llm.generate([prompt], params, use_tqdm=False)
    assert len(found.outputs[0].token_ids) == NUM_TOKENS
    return found.outputs[0]


def gap_at_first_difference(one: CompletionOutput, other: CompletionOutput) -> float:
    """Nats between the two likeliest tokens of `one` where `other` goes on with another token."""
    pairs = zip(one.token_ids, other.token_ids, strict=True)
    first = next(i for i, (left, right) in enumerate(pairs) if left != right)
    assert one.logprobs is not None
    best, second = sorted((each.logprob for each in one.logprobs[first].values()), reverse=True)[:2]
    return best - second


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
    expected, found = completion_of(folder, target), completion_of(tmp_path / "merged", target)
    if kind is MergeKind.Q_P and found.text != expected.text:
        # in each layer the plain form multiplies two roundings of 6e-8, of weights and of the stream, by the condition
        # number: it may turn a tie around, and no more
        measured = [row.entry_measured for row in report.layers]
        cond = sum(each.cond for each in measured if each is not None and each.cond is not None)
        assert cond > 1e3
        assert gap_at_first_difference(expected, found) < 2 * 6e-8 * cond
        return
    assert found.text == expected.text
