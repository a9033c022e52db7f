"""What loading decides beside the plan: defaults, ends, what is said, and arguments that are no arguments."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pyruntime import LLM, CheckpointError, SamplingParams, UsageError, env
from pyruntime.cli.main import run
from pyruntime.engine.load import EngineSizes, load
from tests.checkpoint.craft import rewrite
from tests.generation import greedy, tokens

TextModel = tuple[Path, Any]


def variant(folder: Path, target: Path, generation: dict[str, Any], config: dict[str, Any] | None = None) -> Path:
    """A copy with another generation_config.json; keys of `config` go into config.json."""
    shutil.copytree(folder, target)
    (target / "generation_config.json").write_text(json.dumps(generation))
    stored = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**stored, **(config or {})}))
    return target


@pytest.fixture
def level() -> Iterator[logging.Logger]:
    """The package's logger, as the host has set it."""
    logger = logging.getLogger("pyruntime")
    before = logger.level
    logger.setLevel(logging.ERROR)
    yield logger
    logger.setLevel(before)


def test_a_setting_that_is_not_used_is_said_once(
    text_model: TextModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    generation = {"no_repeat_ngram_size": 3, "suppress_tokens": [1, 2], "typical_p": 0.9, "num_beams": 4, "new": "x"}
    folder = variant(text_model[0], tmp_path / "m", {**generation, "temperature": 0.5, "eos_token_id": 1})
    with caplog.at_level(logging.WARNING, logger="pyruntime"):
        load(folder)
    (record,) = caplog.records
    assert all(name in record.getMessage() for name in generation)
    assert "no_repeat_ngram_size=3" in record.getMessage()
    assert "temperature" not in record.getMessage()


def test_settings_that_change_nothing_need_no_word(
    text_model: TextModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    neutral = {
        "_from_model_config": True,
        "transformers_version": "4.57.1",
        "bos_token_id": 0,
        "pad_token_id": [0],
        "eos_token_id": 1,
        "do_sample": True,
        "use_cache": True,
        "cache_implementation": "static",
        "max_length": 4096,
        "num_beams": 1,
        "typical_p": 1.0,
        "length_penalty": 1.0,
        "no_repeat_ngram_size": 0,
        "suppress_tokens": None,
        "bad_words_ids": [],
        "output_scores": False,
        "max_new_tokens": 5,
        "min_new_tokens": 2,
        "stop_strings": ["zz"],
        "top_k": 50,
    }
    with caplog.at_level(logging.WARNING, logger="pyruntime"):
        load(variant(text_model[0], tmp_path / "m", neutral))
    assert caplog.records == []


def test_stop_strings_of_the_author_are_dropped_with_a_word_where_there_is_no_tokenizer(
    text_model: TextModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = variant(text_model[0], tmp_path / "m", {"stop_strings": "zz", "max_new_tokens": 3})
    with caplog.at_level(logging.WARNING, logger="pyruntime"):
        llm = LLM(folder, skip_tokenizer_init=True)
    assert "stop_strings" in caplog.text
    assert llm.get_default_sampling_params() == SamplingParams(max_tokens=3)
    assert llm.generate([5, 6], use_tqdm=False)[0].finished


def test_the_tokenizer_names_the_end_where_no_file_does(text_model: TextModel, tmp_path: Path) -> None:
    folder = variant(text_model[0], tmp_path / "m", {}, {"eos_token_id": None})
    assert load(folder).eos_token_ids == (1,)
    assert load(folder, skip_tokenizer_init=True).eos_token_ids == ()
    named = variant(text_model[0], tmp_path / "named", {}, {"eos_token_id": 7})
    assert load(named).eos_token_ids == (7,)


@pytest.mark.parametrize("value", ["x", True, 2.5, -1, 0])
def test_a_cache_size_is_a_number_of_bytes(text_model: TextModel, value: Any) -> None:
    with pytest.raises(UsageError, match="kv_cache_memory_bytes is"):
        LLM(text_model[0], kv_cache_memory_bytes=value)


@pytest.mark.parametrize("value", ["a", None, True, 1.5, 2**63, [1]])
def test_a_seed_is_a_64_bit_integer(text_model: TextModel, value: Any) -> None:
    with pytest.raises(UsageError, match="seed is"):
        LLM(text_model[0], seed=value)


@pytest.mark.parametrize("name", ["max_num_seqs", "max_num_batched_tokens", "max_model_len"])
@pytest.mark.parametrize("value", ["x", True, 0, -3, 1.0, [2]])
def test_sizes_are_positive_integers(name: str, value: Any) -> None:
    with pytest.raises(UsageError, match=f"{name} is"):
        EngineSizes(**{name: value})


def test_bad_sizes_are_refused_before_a_weight_is_read(text_model: TextModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyruntime.llm.load", lambda *_, **__: pytest.fail("the model was loaded"))
    with pytest.raises(UsageError, match="seed is"):
        LLM(text_model[0], seed=None)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["dtype", "target", "device"])
@pytest.mark.parametrize("value", [None, 5, ["cpu"]])
def test_names_are_text(text_model: TextModel, name: str, value: Any) -> None:
    with pytest.raises(UsageError, match=f"{name} is"):
        LLM(text_model[0], **{name: value})


@pytest.mark.parametrize("value", [None, 5, [""]])
def test_a_model_is_a_path_or_a_name(value: Any) -> None:
    with pytest.raises(UsageError, match="model is"):
        LLM(value)


@pytest.mark.parametrize("device", ["meta", "meta:0"])
def test_a_device_without_memory_is_refused(text_model: TextModel, device: str) -> None:
    with pytest.raises(UsageError, match="device 'meta") as refusal:
        LLM(text_model[0], device=device)
    assert refusal.value.code == "DEVICE"


def test_the_hosts_logging_level_stays(
    text_model: TextModel, level: logging.Logger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYRUNTIME_LOGGING_LEVEL", raising=False)
    load(text_model[0])
    assert level.level == logging.ERROR
    monkeypatch.setenv("PYRUNTIME_LOGGING_LEVEL", "info")
    load(text_model[0])
    assert level.level == logging.INFO


def test_the_logging_level_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYRUNTIME_LOGGING_LEVEL", raising=False)
    assert env.logging_level() is None
    monkeypatch.setenv("PYRUNTIME_LOGGING_LEVEL", "Debug")
    assert env.logging_level() == "DEBUG"
    monkeypatch.setenv("PYRUNTIME_LOGGING_LEVEL", "loud")
    with pytest.raises(UsageError, match="'loud'"):
        env.logging_level()


@pytest.mark.parametrize("max_tokens", [2, 100])
def test_the_authors_defaults_run_whatever_was_said_beside_them(
    text_model: TextModel, tmp_path: Path, max_tokens: int, capsys: pytest.CaptureFixture[str]
) -> None:
    generation = {"do_sample": False, "max_new_tokens": 1000, "min_new_tokens": 20, "eos_token_id": 1}
    folder = variant(text_model[0], tmp_path / "m", generation)
    (output,) = LLM(folder).generate([5, 6, 7], use_tqdm=False)
    assert len(tokens(output)) >= 20
    assert run(["generate", str(folder), "the cat", "--max-tokens", str(max_tokens)]) == 0
    assert capsys.readouterr().err == ""


def test_plain_params_run_behind_a_prompt_that_leaves_one_place(text_model: TextModel) -> None:
    prompt = [5] * 63
    (output,) = LLM(text_model[0]).generate(prompt, SamplingParams(temperature=0.0, ignore_eos=True), use_tqdm=False)
    assert tokens(output) == greedy(text_model[1], prompt, 1)
    assert output.outputs[0].finish_reason == "length"


@pytest.mark.parametrize("dtype, value", [("float16", 1e6), ("bfloat16", 3.4e38)])
def test_a_weight_that_the_dtype_asked_for_cannot_hold_is_refused(
    text_model: TextModel, tmp_path: Path, dtype: str, value: float
) -> None:
    """float16 ends at 65504; 3.4e38 rounds beyond bfloat16's last number, which is 3.39e38."""
    folder = shutil.copytree(text_model[0], tmp_path / "m")
    name = "model.layers.1.mlp.up_proj.weight"
    rewrite(folder, lambda tensors: tensors[name].__setitem__((2, 3), value))
    with pytest.raises(CheckpointError, match=rf"{name}: 1 of 1792 .* as {dtype}, first \[2, 3\]") as caught:
        load(folder, dtype=dtype)
    assert caught.value.code == "NOT_FINITE"
    load(folder, dtype="float32")
    load(folder, dtype=dtype, check_weights=False)


@pytest.mark.parametrize("value", [1, 0, "yes", [True]])
def test_check_weights_is_true_or_false(text_model: TextModel, value: Any) -> None:
    with pytest.raises(UsageError, match="check_weights"):
        load(text_model[0], check_weights=value)
