"""What LLM can be asked for when it is made: drops, dtype, sizes; and what is refused, by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pyruntime import LLM, DropPlan, PyruntimeError, RunError, SamplingParams, UsageError
from pyruntime.passes.drop import save_drop_plan
from tests.generation import greedy, tokens
from tests.helpers import without

TextModel = tuple[Path, Any]

GREEDY = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)


def test_without_a_tokenizer_ids_run_and_text_is_refused(make_llama: Callable[..., TextModel]) -> None:
    folder, hf_model = make_llama()
    llm = LLM(folder, skip_tokenizer_init=True)
    (output,) = llm.generate([5, 6, 7], GREEDY, use_tqdm=False)
    assert tokens(output) == greedy(hf_model, [5, 6, 7], 6)
    assert output.outputs[0].text == ""
    for call in (lambda: llm.generate("text", use_tqdm=False), llm.get_tokenizer):
        with pytest.raises(UsageError, match="skip_tokenizer_init"):
            call()
    with pytest.raises(PyruntimeError, match="tokenizer"):
        LLM(folder)


def test_drops_are_taken_in_every_form(text_model: TextModel, tmp_path: Path) -> None:
    folder, hf_model = text_model
    plan = DropPlan(attention=(2, 3), mlp=(1,))
    save_drop_plan(plan, tmp_path / "plan.json")
    forms: list[dict[str, Any]] = [
        {"drop_attn": "last:2", "drop_mlp": "1"},
        {"drop_attn": [2, 3], "drop_mlp": (1,)},
        {"drop_attn": "2-3", "drop_mlp": "1-1"},
        {"drop_plan": plan},
        {"drop_plan": tmp_path / "plan.json"},
        {"drop_plan": str(tmp_path / "plan.json")},
        {"drop_plan": DropPlan(attention=(2,)), "drop_attn": [3], "drop_mlp": [1]},
    ]
    expected = greedy(without(hf_model, plan), [5, 6, 7], 6)
    for form in forms:
        llm = LLM(folder, **form)
        assert llm.model.spec.dropped("attention") == (2, 3), form
        assert llm.model.spec.dropped("mlp") == (1,), form
        assert tokens(llm.generate([5, 6, 7], GREEDY, use_tqdm=False)[0]) == expected, form
    block = LLM(folder, drop_block=[0])
    expected = greedy(without(hf_model, DropPlan(attention=(0,), mlp=(0,))), [5, 6, 7], 6)
    assert tokens(block.generate([5, 6, 7], GREEDY, use_tqdm=False)[0]) == expected


def test_dropped_attentions_own_no_cache(text_model: TextModel) -> None:
    dense, half, none = (LLM(text_model[0], drop_attn=drop) for drop in (None, [0, 1], "0-3"))
    # two heads of eight values, keys and values, four bytes each, four layers
    assert dense.plan.kv_bytes_per_token == 2 * 8 * 2 * 4 * 4
    assert dense.engine.kv_cache_bytes == 64 * 64 * dense.plan.kv_bytes_per_token
    assert half.engine.kv_cache_bytes * 2 == dense.engine.kv_cache_bytes
    assert none.engine.kv_cache_bytes == 0


def test_the_cache_takes_no_more_than_it_was_given(text_model: TextModel) -> None:
    page = 16 * 2 * 8 * 2 * 4 * 4
    llm = LLM(text_model[0], kv_cache_memory_bytes=2 * page + 5)
    assert llm.engine.config.num_pages == 2
    assert llm.engine.kv_cache_bytes == 2 * page
    with pytest.raises(UsageError, match="needs 3 cache pages"):
        llm.generate([1] * 30, SamplingParams(max_tokens=4), use_tqdm=False)


def test_a_cache_is_never_larger_than_all_sequences_at_once_could_fill(text_model: TextModel) -> None:
    llm = LLM(text_model[0], kv_cache_memory_bytes=1 << 50, max_num_seqs=3)
    assert llm.engine.config.num_pages == 3 * 4


def test_the_cache_takes_a_share_of_the_memory_there_is(text_model: TextModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def has(num_bytes: int) -> None:
        for module in ("load", "memory"):
            monkeypatch.setattr(f"pyruntime.engine.{module}.available_memory", lambda: num_bytes)

    page = 16 * 2 * 8 * 2 * 4 * 4
    has(100 * page)
    assert LLM(text_model[0]).engine.config.num_pages == 40
    with pytest.raises(RunError, match="a KV cache of 101 pages needs") as refusal:
        LLM(text_model[0], kv_cache_memory_bytes=101 * page)
    assert refusal.value.code == "MEMORY"
    monkeypatch.setattr("pyruntime.engine.load.available_memory", lambda: 9 * page)
    with pytest.raises(RunError, match=r"one sequence of 64 tokens needs .* lower max_model_len"):
        LLM(text_model[0])
    assert LLM(text_model[0], max_model_len=48).engine.config.num_pages == 3


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_model_len": 65}, "max_model_len is 65; the model was made for 1 to 64"),
        ({"max_model_len": 0}, "max_model_len is 0"),
        ({"max_num_seqs": 0}, "max_num_seqs"),
        ({"max_num_batched_tokens": 0}, "max_num_batched_tokens"),
        ({"kv_cache_memory_bytes": 100}, "kv_cache_memory_bytes is 100; a page takes 8192"),
        ({"dtype": "int8"}, "dtype 'int8' is not known; expected auto, .*float32"),
        ({"target": "tpu"}, "target 'tpu' does not exist; expected one of .*reference"),
        ({"device": "nonsense"}, "device 'nonsense'"),
        ({"drop_attn": [4]}, "layer 4 does not exist; the layers are 0 to 3"),
        ({"drop_attn": "last:5"}, "last:5"),
        ({"drop_mlp": "1,x"}, "'x' names no layers"),
        ({"drop_plan": "no/such.json"}, "no/such.json"),
    ],
)
def test_bad_options_are_refused_by_name(text_model: TextModel, options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        LLM(text_model[0], **options)


@pytest.mark.parametrize("dtype", ["float64", "bfloat16", "float16"])
def test_a_dtype_may_be_asked_for(text_model: TextModel, dtype: str) -> None:
    llm = LLM(text_model[0], dtype=dtype, max_model_len=32)
    assert str(llm.plan.dtype) == f"torch.{dtype}"
    (output,) = llm.generate([5, 6, 7], SamplingParams(temperature=0.0, max_tokens=29), use_tqdm=False)
    assert output.finished


def test_two_runs_with_one_seed_are_equal(text_model: TextModel) -> None:
    hot = SamplingParams(temperature=2.0, max_tokens=9)
    drawn = [
        [tokens(output) for output in LLM(text_model[0], seed=seed).generate([[5], [5]], hot, use_tqdm=False)]
        for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1]
    assert drawn[0] != drawn[2]
    assert drawn[0][0] != drawn[0][1]


@pytest.mark.parametrize("wrong", [7, "foo", {"temperature": 0}, [None], ["foo"]])
def test_sampling_params_of_another_type_are_refused(make_llama: Callable[..., tuple[Path, Any]], wrong: Any) -> None:
    llm = LLM(make_llama()[0], skip_tokenizer_init=True)
    with pytest.raises(UsageError) as error:
        llm.generate([[1, 2]], wrong, use_tqdm=False)
    assert error.value.code == "PARAMS"
    with pytest.raises(UsageError):
        next(llm.stream([1, 2], wrong))
    assert not llm.engine.has_unfinished
