"""Texts from files: what is read, what is refused by line, and which bytes the predicted tokens stand for."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch

from pyruntime.engine.tokenizer import Tokenizer
from pyruntime.errors import UsageError
from pyruntime.evaluate import change, opening_token, read_corpus, text_quality, tokenize
from pyruntime.spec import DropPlan
from tests.generation import byte_level_bpe
from tests.helpers import hf_logits, make_plan, without

TextModel = tuple[Path, Any]
DOCUMENTS = ["the cat sat on the mat. " * 8, "once upon a time", "ümläuts: two  spaces", "a", "the end"]
DENSE = DropPlan()
PRUNED = DropPlan(attention=(1, 2))


def lines(path: Path, documents: list[str]) -> Path:
    path.write_text("\n".join(json.dumps({"text": each}) for each in documents) + "\n\n", encoding="utf-8")
    return path


def test_a_plain_file_is_one_document_and_jsonl_one_a_line(tmp_path: Path) -> None:
    plain = tmp_path / "a.txt"
    plain.write_bytes(b"one\r\n\r\ntwo\n")
    assert read_corpus(plain).documents == ("one\r\n\r\ntwo\n",)
    assert read_corpus(lines(tmp_path / "a.jsonl", DOCUMENTS)).documents == tuple(DOCUMENTS)


def test_a_text_is_cut_at_the_characters_asked_for(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", DOCUMENTS)
    count = len(DOCUMENTS[0]) + 4
    assert read_corpus(path, count).documents == (DOCUMENTS[0], "once")
    assert read_corpus(path, 10**9).documents == tuple(DOCUMENTS)


def test_the_hash_tells_where_a_document_ends(tmp_path: Path) -> None:
    found = {read_corpus(lines(tmp_path / "a.jsonl", each)).sha256 for each in (["ab", "c"], ["a", "bc"], ["abc"])}
    assert len(found) == 3


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": 3}\n', 'a.jsonl, line 2: has no "text"'),
        ("a.jsonl", b'{"text": "a"}\n\n[]\n', "line 3: is a list; expected a JSON object"),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', "line 2: is not valid JSON"),
        ("a.jsonl", b'{"text": "\xff"}\n', "line 1: is not UTF-8"),
        ("a.txt", b"abc\xff", "is not UTF-8 at byte 3"),
        ("a.txt", b"", "holds no text"),
        ("a.jsonl", b'{"text": ""}\n', "holds no text"),
        ("a.jsonl", b'{"text": " "}\n', "holds no text"),
        ("missing.txt", None, "missing.txt is no file"),
    ],
)
def test_a_bad_file_is_named_with_its_line(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=message) as caught:
        read_corpus(tmp_path / name)
    assert caught.value.code == "TEXT"


@pytest.mark.parametrize("length", [1, 0, 65])
def test_a_window_that_the_model_cannot_hold_is_refused(text_model: TextModel, tmp_path: Path, length: int) -> None:
    corpus = read_corpus(lines(tmp_path / "a.jsonl", DOCUMENTS))
    with pytest.raises(UsageError, match=f"window is {length} tokens; expected 2 to 64"):
        tokenize(corpus, Tokenizer(text_model[0]), 64, length=length)


def test_the_opening_token_is_the_tokenizers_own(text_model: TextModel, tmp_path: Path) -> None:
    # it has a bos_token, and its tokenizer.json puts none in front
    assert opening_token(Tokenizer(text_model[0])) is None


@pytest.mark.parametrize("bos", [None, 0])
def test_figures_equal_transformers_document_by_document(
    text_model: TextModel, tmp_path: Path, bos: int | None
) -> None:
    folder, hf_model = text_model
    corpus = read_corpus(lines(tmp_path / "a.jsonl", DOCUMENTS))
    text = tokenize(corpus, Tokenizer(folder), 64, bos=bos)
    backend = byte_level_bpe(300)
    nll, count, num_bytes, sums, sizes = 0.0, 0, 0, [], []
    for document in DOCUMENTS:
        encoded = backend.encode(document, add_special_tokens=False)
        assert len(encoded.ids) < 64
        ids = [*([] if bos is None else [bos]), *encoded.ids]
        seen = 0 if bos is not None else encoded.offsets[0][1]
        num_bytes += len(document[seen:].encode())
        if len(ids) < 2:
            continue
        rows = hf_logits(hf_model, ids)[:-1].double()
        own = float(torch.nn.functional.cross_entropy(rows, torch.tensor(ids[1:]), reduction="sum"))
        nll, count, sums, sizes = nll + own, count + len(ids) - 1, [*sums, own], [*sizes, len(ids) - 1]
    found = text_quality(make_plan(folder), text)
    figures = found.to_json()
    mean = nll / count
    assert (figures["num_tokens"], text.num_bytes, text.round_trip) == (count, num_bytes, True)
    assert figures["perplexity"] == pytest.approx(math.exp(mean), rel=1e-4)
    assert figures["bits_per_byte"] == pytest.approx(nll / math.log(2) / num_bytes, rel=1e-5)
    residuals = sum((s - mean * n) ** 2 for s, n in zip(sums, sizes, strict=True))
    error = math.sqrt(len(sums) / (len(sums) - 1) * residuals) / count
    assert figures["nats_per_token_stderr"] == pytest.approx(error, rel=1e-3)
    assert figures["perplexity_stderr"] == pytest.approx(math.exp(mean) * error, rel=1e-3)
    assert figures["stderr_over"] == "document"


def test_a_longer_window_and_a_shorter_stride_are_what_they_say(text_model: TextModel, tmp_path: Path) -> None:
    folder, hf_model = text_model
    (tmp_path / "a.txt").write_text(" ".join(DOCUMENTS * 4), encoding="utf-8")
    corpus, tokenizer = read_corpus(tmp_path / "a.txt"), Tokenizer(folder)
    text = tokenize(corpus, tokenizer, 64, length=32, stride=8)
    ids = tokenizer.encode(corpus.documents[0])
    # the loop of the Hugging Face guide on perplexity: labels of what is context are left out
    nll, previous = 0.0, 0
    for begin in range(0, len(ids), 8):
        end = min(begin + 32, len(ids))
        rows = hf_logits(hf_model, ids[begin:end])[:-1].double()
        losses = torch.nn.functional.cross_entropy(rows, torch.tensor(ids[begin + 1 : end]), reduction="none")
        nll += float(losses[-(end - max(previous, 1)) :].sum())
        previous = end
        if end == len(ids):
            break
    found = text_quality(make_plan(folder), text)
    assert found.perplexity.num_tokens == len(ids) - 1
    assert found.perplexity.nll == pytest.approx(nll, rel=1e-5)
    assert found.to_json()["stderr_over"] == "window"


def test_the_change_is_that_of_the_two_perplexities_with_the_error_of_pairs(
    text_model: TextModel, tmp_path: Path
) -> None:
    folder, hf_model = text_model
    text = tokenize(read_corpus(lines(tmp_path / "a.jsonl", DOCUMENTS)), Tokenizer(folder), 64)
    dense, pruned = (text_quality(make_plan(folder, plan), text) for plan in (DENSE, PRUNED))
    found = change(dense, pruned)
    assert found.mean == pytest.approx(pruned.perplexity.value / dense.perplexity.value - 1)
    differences = []
    for window in text.windows:
        if len(window.token_ids) > 1:
            targets = torch.tensor(list(window.token_ids[1:]))
            own = [hf_logits(model, window.token_ids)[:-1].double() for model in (hf_model, without(hf_model, PRUNED))]
            nlls = [float(torch.nn.functional.cross_entropy(rows, targets, reduction="sum")) for rows in own]
            differences.append((nlls[1] - nlls[0], len(targets)))
    total = sum(n for _, n in differences)
    ratio = sum(d for d, _ in differences) / total
    k = len(differences)
    error = math.sqrt(k / (k - 1) * sum((d - ratio * n) ** 2 for d, n in differences)) / total
    assert found.error == pytest.approx((1 + found.mean) * error, rel=1e-3)


def test_a_text_that_the_tokens_do_not_give_back_is_marked(text_model: TextModel, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    backend = byte_level_bpe(300)
    # a lossy tokenizer: everything becomes lower case
    backend.normalizer = tokenizers.normalizers.Lowercase()
    backend.save(str(folder / "tokenizer.json"))
    for content, same in (("The Cat", False), ("the cat", True)):
        (tmp_path / "a.txt").write_text(content)
        assert tokenize(read_corpus(tmp_path / "a.txt"), Tokenizer(folder), 64).round_trip is same
