"""The lm-eval adapter against lm-eval's own transformers model, on local tasks; skipped where lm-eval is missing."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from pyruntime.cli.main import run
from pyruntime.engine.load import load
from pyruntime.errors import UsageError
from tests.generation import SENTENCES

pytestmark = pytest.mark.slow
pytest.importorskip("lm_eval", reason="lm-eval is not installed (extra lm-eval)")

TextModel = tuple[Path, Any]
WORDS = " ".join(SENTENCES).split()


def sentence(seed: int, length: int) -> str:
    draw = random.Random(seed)
    return " ".join(draw.choices(WORDS, k=length))


def requests(*arguments: tuple[Any, ...]) -> list[Any]:
    from lm_eval.api.instance import Instance

    kinds: Any = "loglikelihood"
    return [Instance(request_type=kinds, doc={}, arguments=each, idx=0) for each in arguments]


@pytest.fixture(scope="module")
def both(text_model: TextModel) -> tuple[Any, Any]:
    """lm-eval's transformers model and ours, of the same files."""
    pytest.importorskip("accelerate", reason="accelerate, which lm-eval's transformers model needs, is not installed")
    from lm_eval.models.huggingface import HFLM

    from pyruntime.integrations.lm_eval import PyruntimeLM

    theirs = HFLM(pretrained=str(text_model[0]), device="cpu", dtype="float32", batch_size=1)
    # the author's seven tokens would end it sooner than the task says
    theirs.model.generation_config.max_new_tokens = None
    return theirs, PyruntimeLM(str(text_model[0]), dtype="float32")


def test_log_likelihoods_are_those_of_lm_evals_own_model(both: tuple[Any, Any]) -> None:
    theirs, ours = both
    pairs = [
        ("the cat", " sat on the mat"),
        ("the cat ", "sat"),
        ("once upon a time  ", "there was"),
        ("", "the cat sat"),
        ("the", " end"),
        # longer than the context of 64 tokens
        (sentence(1, 120), " the end"),
    ]
    found = ours.loglikelihood(requests(*pairs), disable_tqdm=True)
    expected = theirs.loglikelihood(requests(*pairs), disable_tqdm=True)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], rel=1e-4)


def test_a_greedy_continuation_is_called_so(both: tuple[Any, Any]) -> None:
    theirs, ours = both
    (text,) = ours.generate_until(requests(("the cat", {"max_gen_toks": 1})), disable_tqdm=True)
    pair = requests(("the cat", text))
    assert [g for _, g in ours.loglikelihood(pair, True)] == [g for _, g in theirs.loglikelihood(pair, True)] == [True]


def test_rolling_log_likelihoods_are_those_of_lm_evals_own_model(both: tuple[Any, Any]) -> None:
    theirs, ours = both
    texts = [(sentence(seed, length),) for seed, length in ((1, 3), (2, 40), (3, 150), (4, 64))]
    found = ours.loglikelihood_rolling(requests(*texts), disable_tqdm=True)
    assert found == pytest.approx(theirs.loglikelihood_rolling(requests(*texts), disable_tqdm=True), rel=1e-4)


@pytest.mark.parametrize(
    "settings",
    [
        {"until": ["\n\n"], "max_gen_toks": 12},
        {"until": "a", "max_gen_toks": 20, "do_sample": False, "temperature": 0.7},
        {"until": [], "max_new_tokens": 5},
    ],
)
def test_generated_text_is_that_of_lm_evals_own_model(both: tuple[Any, Any], settings: dict[str, Any]) -> None:
    theirs, ours = both
    contexts: Sequence[Any] = [(text, settings) for text in ("the cat", sentence(5, 90), "once upon")]
    found = ours.generate_until(requests(*contexts), disable_tqdm=True)
    assert found == theirs.generate_until(requests(*contexts), disable_tqdm=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"num_beams": 4}, "num_beams"), ({"max_gen_toks": 64}, "holds 64: lower max_gen_toks")],
)
def test_generation_that_cannot_be_done_is_refused(
    both: tuple[Any, Any], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        both[1].generate_until(requests(("the", settings)), disable_tqdm=True)


@pytest.fixture(scope="module")
def task_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A multiple-choice task and a generation task in lm-eval's form, and the first one's items in ours."""
    folder = tmp_path_factory.mktemp("tasks")
    draw = random.Random(0)
    items = [
        {
            "query": sentence(i, 6),
            "choices": [sentence(100 * k + i, 2 + k) for k in range(3)],
            "gold": draw.randrange(3),
        }
        for i in range(40)
    ]
    (folder / "items.jsonl").write_text("\n".join(map(json.dumps, items)) + "\n")
    data = {"path": "json", "data_files": {"test": str(folder / "items.jsonl")}}
    choose = {
        "task": "local_choice",
        "dataset_path": data["path"],
        "dataset_kwargs": {"data_files": data["data_files"]},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{query}}",
        "doc_to_target": "gold",
        "doc_to_choice": "choices",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    (folder / "choice.yaml").write_text(json.dumps(choose))
    return folder


def evaluate(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    code = run([*map(str, arguments), "--json"])
    out, _ = capsys.readouterr()
    assert code == 0
    # lm-eval may print before us
    found: dict[str, Any] = json.loads(out.splitlines()[-1])
    return found


def test_the_command_gives_lm_evals_figures_and_ours_agree(
    text_model: TextModel,
    task_folder: Path,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    tasks = f"local_choice,{task_folder / 'items.jsonl'}"
    command = ["eval", text_model[0], "--tasks", tasks, "--include-path", task_folder, "--drop-attn", "1"]
    model = evaluate(capsys, *command)["model"]
    theirs, ours = model["lm_eval"]["local_choice"], model["tasks"]["items"]
    assert ours["num_items"] == 40
    for name in ("acc", "acc_norm"):
        assert theirs[f"{name},none"] == pytest.approx(ours[name])
        assert theirs[f"{name}_stderr,none"] == pytest.approx(ours[f"{name}_stderr"])


def test_a_task_that_nobody_knows_is_refused(text_model: TextModel, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["eval", str(text_model[0]), "--tasks", "no_such_task"]) == 2
    assert "lm-eval has no task no_such_task" in capsys.readouterr().err


def test_what_was_dropped_is_dropped_under_lm_eval(text_model: TextModel) -> None:
    from pyruntime.integrations.lm_eval import PyruntimeLM

    one = PyruntimeLM(str(text_model[0]), drop_attn=[1, 2], dtype="float32")
    other = PyruntimeLM(load(text_model[0], dtype="float32"))
    pair = requests(("the cat", " sat"))
    assert one.loglikelihood(pair, True) != other.loglikelihood(pair, True)
    assert torch.isfinite(torch.tensor(one.loglikelihood(pair, True)[0][0]))
