"""Tokenizer against transformers' own, and against files that lie."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from pyruntime.checkpoint import strict_json
from pyruntime.engine.tokenizer import Tokenizer
from pyruntime.errors import CheckpointError, UsageError

TEXTS = [
    "",
    " ",
    "Once upon a time",
    "  two  spaces\tand\n\nlines ",
    "café é 🦙👩‍🚀 中文 \ufffd \x00 \ufeff",
    "<s>hello</s> <unk> world<s>",
    "a" * 300,
    "<|extra|>x <extra_0> <image>",
]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m.content | trim }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
CHAT = [{"role": "user", "content": " Hi <s> 🦙 "}, {"role": "assistant", "content": "the cat"}]


def make_backend(post_processor: bool) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["the cat sat on the mat, the end. hello world"] * 3, trainer)
    if post_processor:
        backend.post_processor = tokenizers.processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
        )
    return backend


def write_folder(folder: Path, config: dict[str, Any], post_processor: bool = True, **files: Any) -> Path:
    make_backend(post_processor).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


NAMES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
FAST = {**NAMES, "tokenizer_class": "PreTrainedTokenizerFast"}


def assert_like_transformers(folder: Path) -> None:
    from transformers import AutoTokenizer

    theirs, ours = AutoTokenizer.from_pretrained(folder, local_files_only=True), Tokenizer(folder)
    for text in TEXTS:
        for special in (True, False):
            ids = theirs.encode(text, add_special_tokens=special)
            assert ours.encode(text, add_special_tokens=special) == ids, (text, special)
        for skip in (True, False):
            assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)
    assert (ours.bos_id, ours.eos_id) == (theirs.bos_token_id, theirs.eos_token_id)
    assert (ours.pad_id, ours.unk_id) == (theirs.pad_token_id, theirs.unk_token_id)
    assert set(theirs.all_special_ids) <= ours.special_ids
    assert ours.vocab_size == len(theirs)


@pytest.mark.parametrize("model", ["stories260k", "babyllama-char-1m"])
def test_real_models_like_transformers(model: str) -> None:
    data = os.environ.get("PYRUNTIME_TEST_DATA")
    if data is None:
        pytest.skip("PYRUNTIME_TEST_DATA not set")
    assert_like_transformers(Path(data) / "models" / model)


@pytest.mark.parametrize("post_processor", [True, False])
@pytest.mark.parametrize("add_bos", [True, False, None])
def test_bos_like_transformers(tmp_path: Path, post_processor: bool, add_bos: bool | None) -> None:
    config = FAST if add_bos is None else {**FAST, "add_bos_token": add_bos, "add_eos_token": False}
    folder = write_folder(tmp_path, config, post_processor)
    assert_like_transformers(folder)
    # the rule that this comparison found: only the post-processor counts
    assert (Tokenizer(folder).encode("x")[0] == 1) == post_processor


ADDED = {"content": "<|extra|>", "lstrip": True, "rstrip": True, "normalized": False, "special": True}
CONFIGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "a special token that tokenizer.json lacks": ({**FAST, "pad_token": "<|extra|>"}, {}),
    "an ordinary token that is named special": ({**FAST, "unk_token": "the"}, {}),
    "flags in an object": ({**FAST, "pad_token": {**ADDED, "__type": "AddedToken"}}, {}),
    "a list of extra tokens": ({**FAST, "extra_special_tokens": ["<|extra|>", "<extra_0>"]}, {}),
    "the old name of that list": ({**FAST, "additional_special_tokens": ["<extra_0>"]}, {}),
    "a token of a model family": ({**FAST, "image_token": "<image>"}, {}),
    "added_tokens_decoder": (
        {**FAST, "added_tokens_decoder": {"2": {**ADDED, "content": "</s>"}, "320": ADDED, "1": {"content": "<s>"}}},
        {},
    ),
    "special_tokens_map.json": (
        {"tokenizer_class": "PreTrainedTokenizerFast"},
        {"special_tokens_map": {"bos_token": "<s>", "eos_token": {**ADDED, "content": "</s>"}, "pad_token": "<image>"}},
    ),
    "special_tokens_map.json beside added_tokens_decoder": (
        {**FAST, "added_tokens_decoder": {"1": {**ADDED, "content": "<s>"}}},
        {"special_tokens_map": {"pad_token": "<image>", "bos_token": "</s>"}},
    ),
    "split_special_tokens": ({**FAST, "split_special_tokens": True}, {}),
}


@pytest.mark.parametrize("case", sorted(CONFIGS))
def test_tokens_of_the_config_like_transformers(tmp_path: Path, case: str) -> None:
    config, files = CONFIGS[case]
    assert_like_transformers(write_folder(tmp_path, config, **files))


def test_truncation_and_padding_in_the_file_do_not_apply(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, FAST)
    backend = make_backend(True)
    backend.enable_truncation(4)
    backend.enable_padding(length=50, pad_id=2, pad_token="</s>")
    backend.save(str(folder / "tokenizer.json"))
    assert_like_transformers(folder)
    assert len(Tokenizer(folder).encode("a b c d e f g")) == 14


def test_a_disagreement_about_bos_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="pyruntime"):
        Tokenizer(write_folder(tmp_path, {**FAST, "add_bos_token": True}, post_processor=True))
        assert caplog.records == []
        Tokenizer(write_folder(tmp_path, {**FAST, "add_bos_token": True}, post_processor=False))
    assert len(caplog.records) == 1
    assert "tokenizer.json is obeyed" in caplog.text


def test_loading_and_encoding_import_no_transformers(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, {**FAST, "chat_template": TEMPLATE})
    code = (
        "import sys; from pyruntime.engine.tokenizer import Tokenizer; "
        f"t = Tokenizer({str(folder)!r}); t.decode(t.encode('the cat')); "
        "t.apply_chat_template([{'role': 'user', 'content': 'x'}]); assert 'transformers' not in sys.modules; "
        "assert t.hf().encode('the cat') == t.encode('the cat'); assert t.hf() is t.hf()"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# what single methods promise


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    return Tokenizer(write_folder(tmp_path, {**FAST, "chat_template": TEMPLATE}))


@pytest.mark.parametrize("text", ["\ud800", "abc\udfff", "\udce9 x"])
def test_lone_surrogates_are_refused(tokenizer: Tokenizer, text: str) -> None:
    with pytest.raises(UsageError, match="lone surrogate U\\+D"):
        tokenizer.encode(text)


@pytest.mark.parametrize("text", [None, b"abc", 5, ["a"]])
def test_only_text_is_encoded(tokenizer: Tokenizer, text: Any) -> None:
    with pytest.raises(UsageError, match="expected a string"):
        tokenizer.encode(text)


@pytest.mark.parametrize("ids", [[-1], [2**40], ["a"], [1.5]])
def test_ids_that_are_none_are_refused(tokenizer: Tokenizer, ids: Any) -> None:
    with pytest.raises(UsageError, match="cannot decode"):
        tokenizer.decode(ids)


def test_token_to_text_is_what_a_token_adds(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(" the cat 🦙", add_special_tokens=False)
    assert tokenizer.token_to_text(ids[0]) == " the"
    assert tokenizer.token_piece(ids[0]) == "Ġthe"
    assert tokenizer.token_to_text(ids[-1]) == "\ufffd"
    assert tokenizer.token_to_text(1) == "<s>"
    assert tokenizer.token_to_text(9999) == ""
    assert tokenizer.token_piece(9999) is None
    assert tokenizer.byte_fallback_ids == frozenset()


def test_check_vocab(tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer.check_vocab(tokenizer.vocab_size)
    assert caplog.text == ""
    with pytest.raises(CheckpointError, match=r"eos_token '</s>' has id 2; the model has ids 0 to 1"):
        tokenizer.check_vocab(2)
    with pytest.raises(CheckpointError, match=r"the embedding ids 0 to 9; this tokenizer belongs to another model"):
        tokenizer.check_vocab(10)


def test_added_tokens_beyond_the_embedding_are_noted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Tokens that were added for training, often for padding, stand in the tokenizers of published models."""
    folder = write_folder(tmp_path, FAST)
    size = Tokenizer(folder).vocab_size
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"added_tokens_decoder": {str(size): {"content": "<pad-of-training>"}}})
    )
    tokenizer = Tokenizer(folder)
    tokenizer.check_vocab(size)
    assert f"ids up to {size}" in caplog.text and f"0 to {size - 1}" in caplog.text
    assert tokenizer.encode("<pad-of-training>", add_special_tokens=False) == [size]


# files


def refused(folder: Path, match: str) -> None:
    with pytest.raises(CheckpointError, match=match):
        Tokenizer(folder)


def test_a_missing_tokenizer_is_refused(tmp_path: Path) -> None:
    refused(tmp_path, r"tokenizer\.json is missing; expected .*save_pretrained")


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b"{}", b'{"model": 5}', b"\xff\xfe", b"[" * 100_000, b'{"version": "1.0"}']
)
def test_a_corrupt_tokenizer_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    refused(tmp_path, r"tokenizer\.json")


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    data = (write_folder(tmp_path, FAST) / "tokenizer.json").read_bytes().rstrip()
    for size in range(0, len(data), 997):
        (tmp_path / "tokenizer.json").write_bytes(data[:size])
        refused(tmp_path, r"tokenizer\.json")


@pytest.mark.parametrize(
    "name, limit",
    [("tokenizer.json", 64 << 20), ("tokenizer_config.json", 8 << 20), ("special_tokens_map.json", 8 << 20)],
)
def test_a_file_above_the_limit_is_refused(tmp_path: Path, name: str, limit: int) -> None:
    folder = write_folder(tmp_path, FAST)
    with (folder / name).open("wb") as file:
        file.truncate(limit + 1)
    refused(folder, f"at most {limit} are read")


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json"])
def test_a_file_of_more_items_than_any_needs_is_refused_unparsed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Megabytes of brackets would become gigabytes of lists."""
    folder = write_folder(tmp_path, FAST)
    # the map is read where the configuration lists no tokens
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / name).write_text('{"x": [' + "[]," * 200_000 + "1]}")
    walk = strict_json.nesting
    monkeypatch.setattr(
        strict_json,
        "nesting",
        lambda text, limit: pytest.fail("the text was walked") if len(text) > 100_000 else walk(text, limit),
    )
    refused(folder, "200002 brackets")


@pytest.mark.parametrize("key", ["9" * 5000, "\u0663", "99999999999999999999", "-1", "1.0", ""])
def test_an_added_token_without_a_sound_id_is_refused(tmp_path: Path, key: str) -> None:
    folder = write_folder(tmp_path, FAST)
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": {key: {"content": "<x>"}}}))
    refused(folder, "added_tokens_decoder")


def test_an_added_token_at_another_id_is_noted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write_folder(tmp_path, FAST)
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": {"99999": {"content": "<x>"}}}))
    tokenizer = Tokenizer(folder)
    assert "99999" in caplog.text and "<x>" in caplog.text
    assert tokenizer.token_piece(99999) is None


@pytest.mark.parametrize("content", ["{", "[]", '"x"', "[" * 100_000, "\x00"])
def test_a_corrupt_config_is_refused(tmp_path: Path, content: str) -> None:
    folder = write_folder(tmp_path, FAST)
    (folder / "tokenizer_config.json").write_text(content)
    refused(folder, r"tokenizer_config\.json")


@pytest.mark.parametrize(
    "config",
    [
        {"bos_token": {"content": 5}},
        {"added_tokens_decoder": {"x": "a"}},
        {"added_tokens_decoder": [1]},
        {"added_tokens_decoder": {"1": 5}},
        {"extra_special_tokens": [5]},
        {"extra_special_tokens": 5},
        {"chat_template": 5},
        {"chat_template": "x" * (2**20 + 1)},
    ],
)
def test_a_lying_config_is_refused(tmp_path: Path, config: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=r"expected|no text"):
        Tokenizer(write_folder(tmp_path, config))


def test_a_folder_in_place_of_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").mkdir()
    refused(tmp_path, "no regular file")


# chat templates


def test_chat_like_transformers(tokenizer: Tokenizer) -> None:
    for prompt in (True, False):
        ids = tokenizer.hf().apply_chat_template(CHAT, add_generation_prompt=prompt, return_dict=False)
        assert tokenizer.apply_chat_template(CHAT, add_generation_prompt=prompt) == ids
    rendered = tokenizer.render_chat(CHAT)
    assert rendered == "<s>[user] Hi <s> 🦙</s>\n[assistant] the cat</s>\n[assistant]"
    assert tokenizer.has_chat_template


def test_the_template_file_wins_and_lists_have_a_default(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, {**FAST, "chat_template": "config"})
    (folder / "chat_template.jinja").write_text("file")
    assert Tokenizer(folder).render_chat(CHAT) == "file"
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    (folder / "chat_template.jinja").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps({**FAST, "chat_template": named}))
    assert Tokenizer(folder).render_chat(CHAT) == "plain"


def test_without_a_template_the_error_says_what_to_do(tmp_path: Path) -> None:
    tokenizer = Tokenizer(write_folder(tmp_path, FAST))
    assert not tokenizer.has_chat_template
    with pytest.raises(UsageError, match=r"no chat template; use a plain prompt, or .* chat_template\.jinja"):
        tokenizer.apply_chat_template(CHAT)


@pytest.mark.parametrize(
    "messages", [[], "hi", None, 5, {"role": "user"}, ["hi"], [{"content": "x"}], [{1}], [{"role": 5}]]
)
def test_messages_are_checked(tokenizer: Tokenizer, messages: Any) -> None:
    with pytest.raises(UsageError, match="messages"):
        tokenizer.apply_chat_template(messages)


def test_surrogates_in_messages_are_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(UsageError, match="surrogate"):
        tokenizer.apply_chat_template([{"role": "user", "content": "\ud800"}])


def test_a_template_with_a_syntax_error_is_the_checkpoints_fault(tmp_path: Path) -> None:
    tokenizer = Tokenizer(write_folder(tmp_path, {**FAST, "chat_template": "{% if %}"}))
    with pytest.raises(CheckpointError, match="cannot be parsed"):
        tokenizer.render_chat(CHAT)
