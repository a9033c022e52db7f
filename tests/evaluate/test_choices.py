"""Multiple choice: the files, the boundary between context and continuation, and scores against transformers."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from pyruntime.engine.load import load
from pyruntime.engine.tokenizer import Tokenizer
from pyruntime.errors import UsageError
from pyruntime.evaluate import Measures, Window, continuations, measure, multiple_choice, pair_window, read_items
from pyruntime.evaluate.choices import _best
from pyruntime.evaluate.items import Item
from pyruntime.evaluate.statistics import mean_of, ratio_of
from tests.generation import SENTENCES, byte_level_bpe
from tests.helpers import hf_logits, make_plan

TextModel = tuple[Path, Any]
Figures = Callable[[str, str], dict[str, Any]]
WORDS = " ".join(SENTENCES).split()


def save(path: Path, *values: object) -> Path:
    path.write_text("".join(f"{json.dumps(value)}\n" for value in values), encoding="utf-8")
    return path


def test_three_forms_of_items_are_read(tmp_path: Path) -> None:
    path = save(
        tmp_path / "a.jsonl",
        {"query": "Which?", "choices": ["this", " that"], "gold": 1},
        {"query": "A line.\n", "choices": ["this", "that"], "gold": 0, "uid": "x"},
        {"context_options": ["Ann", "Bob"], "continuation": "won.", "gold": 0},
        {"good": "He runs.", "bad": "He run.", "uid": "agreement"},
    )
    assert read_items(path) == (
        Item((("Which?", " this"), ("Which?", " that")), 1, (4, 5)),
        Item((("A line.\n", "this"), ("A line.\n", "that")), 0, (4, 4), "x"),
        Item((("Ann", " won."), ("Bob", " won.")), 0, (4, 4)),
        Item((("", "He runs."), ("", "He run.")), 0, (8, 7), "agreement"),
    )
    assert len(read_items(path, limit=2)) == 2


GOOD: dict[str, Any] = {"query": "a", "choices": ["b", "c"], "gold": 0}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({**GOOD, "gold": 2}, "line 2: gold is '2'; expected an integer from 0 to 1"),
        ({**GOOD, "gold": -1}, "gold is '-1'"),
        ({**GOOD, "gold": True}, "gold is 'True'"),
        ({**GOOD, "gold": "0"}, "line 2: gold is '0'"),
        ({"query": "a", "choices": ["b", "c"]}, "gold is 'None'"),
        ({**GOOD, "choices": []}, "choices is '\\[\\]'; expected a list of two texts or more"),
        ({**GOOD, "choices": ["b"]}, "expected a list of two texts"),
        ({**GOOD, "choices": ["b", ""]}, "expected a list of two texts"),
        ({**GOOD, "choices": "bc"}, "expected a list of two texts"),
        ({**GOOD, "query": 3}, "query is '3'; expected a text"),
        ({"good": "a", "bad": ""}, "bad is ''; expected a text"),
        ({"context_options": ["a", "b"], "continuation": "", "gold": 0}, "continuation is ''"),
        ({"question": "a"}, "has the keys \\['question'\\]; expected"),
        ([1], "is a list; expected a JSON object"),
        ({**GOOD, "uid": "a\nb"}, "uid is"),
    ],
)
def test_a_bad_item_is_named_with_its_line(tmp_path: Path, value: object, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        read_items(save(tmp_path / "a.jsonl", GOOD, value))
    assert caught.value.code == "TASK"
    assert "a.jsonl, line 2" in str(caught.value)


def test_a_file_without_items_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no item"):
        read_items(save(tmp_path / "a.jsonl"))


def log_likelihood(hf_model: Any, ids: list[int], first: int) -> tuple[float, bool]:
    """Sum over the tokens from `first` on, and whether each is the likeliest; by transformers, uncached."""
    rows = hf_logits(hf_model, ids[:-1])[first - 1 :].double().log_softmax(-1)
    targets = torch.tensor(ids[first:])
    return float(rows.gather(1, targets[:, None]).sum()), bool((rows.argmax(-1) == targets).all())


def test_both_are_encoded_together_and_cut_where_the_context_ends_alone(text_model: TextModel) -> None:
    folder, hf_model = text_model
    plan, tokenizer, backend = make_plan(folder), Tokenizer(folder), byte_level_bpe(300)
    for context, continuation, bare in (
        ("the cat", " sat on the mat", "the cat"),
        ("the cat ", "sat", "the cat"),
        ("once upon\n\n", " a time", "once upon"),
        # the boundary falls into a token that both make together
        ("the ca", "t sat on the mat", "the ca"),
    ):
        whole, first = backend.encode(context + continuation).ids, len(backend.encode(bare).ids)
        window = pair_window(plan, tokenizer, context, continuation)
        assert (list(window.token_ids), window.first) == (whole, first)
        (found,) = continuations(plan, [window])
        expected, greedy = log_likelihood(hf_model, whole, first)
        assert found.log_likelihood == pytest.approx(expected, rel=1e-4)
        assert (found.num_tokens, found.is_greedy) == (len(whole) - first, greedy)


def test_without_a_context_the_opening_token_stands_in_front(text_model: TextModel) -> None:
    folder, hf_model = text_model
    ids = [0, *byte_level_bpe(300).encode("the cat").ids]
    window = pair_window(make_plan(folder), Tokenizer(folder), "", "the cat")
    assert (list(window.token_ids), window.first) == (ids, 1)
    (found,) = continuations(make_plan(folder), [window])
    assert found.log_likelihood == pytest.approx(log_likelihood(hf_model, ids, 1)[0], rel=1e-4)


def test_what_does_not_fit_is_cut_off_at_the_front(text_model: TextModel) -> None:
    folder = text_model[0]
    context = " ".join(random.Random(0).choices(WORDS, k=200))
    whole = byte_level_bpe(300).encode(f"{context} the end").ids
    window = pair_window(make_plan(folder), Tokenizer(folder), context, " the end")
    assert list(window.token_ids) == whole[-65:]
    with pytest.raises(UsageError, match=r"tokens; the model holds 64"):
        pair_window(make_plan(folder), Tokenizer(folder), "the", f" {context}")


def test_a_continuation_without_a_token_is_refused(text_model: TextModel) -> None:
    with pytest.raises(UsageError, match="adds no token"):
        pair_window(make_plan(text_model[0]), Tokenizer(text_model[0]), "", "")


def test_a_greedy_continuation_is_known(text_model: TextModel) -> None:
    folder, hf_model = text_model
    plan, ids = make_plan(folder), byte_level_bpe(300).encode("the cat").ids
    best = int(hf_logits(hf_model, ids)[-1].argmax())
    found = continuations(plan, [Window([*ids, best], len(ids)), Window([*ids, (best + 1) % 300], len(ids))])
    assert [each.is_greedy for each in found] == [True, False]


def test_accuracies_are_counted_by_sum_by_character_and_by_token(text_model: TextModel, tmp_path: Path) -> None:
    folder, hf_model = text_model
    draw, backend = random.Random(3), byte_level_bpe(300)
    values = []
    for i in range(30):
        choices = [" ".join(draw.choices(WORDS, k=1 + 2 * k)) for k in range(3)]
        values.append(
            {"query": f"{WORDS[i % 7]} the", "choices": choices, "gold": draw.randrange(3), "uid": "ab"[i % 2]}
        )
    items = read_items(save(tmp_path / "a.jsonl", *values))
    right: dict[str, list[int]] = {"acc": [], "acc_norm": [], "acc_token": []}
    for value in values:
        first = len(backend.encode(str(value["query"])).ids)
        sums, tokens = [], []
        for choice in value["choices"]:
            ids = backend.encode(f"{value['query']} {choice}").ids
            sums.append(log_likelihood(hf_model, ids, first)[0])
            tokens.append(len(ids) - first)
        by = {"acc": [1] * 3, "acc_norm": [len(choice) for choice in value["choices"]], "acc_token": tokens}
        for name, sizes in by.items():
            best = max(range(3), key=lambda k: sums[k] / sizes[k])
            right[name].append(int(best == value["gold"]))
    loaded = load(folder, dtype="float32", target="reference")
    windows = [pair_window(loaded.plan, Tokenizer(folder), *pair) for item in items for pair in item.pairs]
    found = multiple_choice(loaded.plan, items, windows).to_json()
    for name, each in right.items():
        mean = sum(each) / 30
        assert found[name] == pytest.approx(mean)
        # the standard error of a mean with the sample's own spread, as lm-eval has it
        assert found[f"{name}_stderr"] == pytest.approx(math.sqrt(mean * (1 - mean) / 29))
    assert found["groups"] == {
        "a": pytest.approx(sum(right["acc"][::2]) / 15),
        "b": pytest.approx(sum(right["acc"][1::2]) / 15),
    }


def test_the_first_of_equals_wins() -> None:
    # as numpy's argmax, which lm-eval takes
    assert _best([1.0, 1.0, 0.5]) == 0


def test_means_and_ratios_equal_their_definitions() -> None:
    assert mean_of([1.0, 2.0, 6.0]).mean == 3.0
    assert mean_of([1.0, 2.0, 6.0]).error == pytest.approx(math.sqrt((4 + 1 + 9) / 2 / 3))
    assert mean_of([4.0]).error is None
    # units of one size: the ratio is the mean of their own ratios, and so is its error
    equal = ratio_of([2.0, 4.0, 12.0], [2, 2, 2])
    assert equal.mean == 3.0
    assert equal.error == pytest.approx(mean_of([1.0, 2.0, 6.0]).error)
    # sums that are in proportion to the sizes leave no doubt
    assert ratio_of([2.0, 6.0], [1, 3]).error == 0.0


@contextmanager
def no_bars(what: str, num_tokens: int) -> Iterator[Callable[[int], None]]:
    yield lambda count: None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "task", "metric", "published"),
    # published by each model's SOURCE.md, measured with transformers; the endings by mean over tokens and by sum
    [
        ("stories260k", "tinystories-endings", "acc_token", 0.445),
        ("stories260k", "tinystories-endings", "acc", 0.338),
        ("stories260k", "blimp-subset", "acc", 0.628),
        ("bitllama-1m", "blimp-subset", "acc", 0.610),
    ],
)
def test_published_accuracies(
    test_data: Path,
    accuracies: Callable[[str, str], dict[str, Any]],
    name: str,
    task: str,
    metric: str,
    published: float,
) -> None:
    found = accuracies(name, task)
    # a tie or two of 400 items may be decided by the last digits, or by one token more of context
    assert found[metric] == pytest.approx(published, abs=0.0055 if task == "tinystories-endings" else 0.002)


@pytest.fixture(scope="module")
def accuracies(test_data: Path) -> Figures:
    """Figures of a model on a task, computed once."""
    known: dict[tuple[str, str], dict[str, Any]] = {}

    def of(name: str, task: str) -> dict[str, Any]:
        if (name, task) not in known:
            loaded = load(test_data / "models" / name, dtype="float32")
            items = read_items(test_data / "corpora" / f"{task}.jsonl")
            found = measure(loaded, Measures(tasks={task: items}), no_bars, name)
            known[name, task] = found.tasks[task].to_json()
        return known[name, task]

    return of
