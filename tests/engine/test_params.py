"""SamplingParams: names, defaults and bounds."""

from __future__ import annotations

import copy
import logging
import pickle
from dataclasses import FrozenInstanceError, fields, replace
from typing import Any

import pytest

from pyruntime.engine import params
from pyruntime.engine.params import SamplingParams, eos_token_ids
from pyruntime.errors import UsageError

NAN, INF = float("nan"), float("inf")

VLLM_DEFAULTS: dict[str, Any] = {
    "n": 1,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "seed": None,
    "stop": (),
    "stop_token_ids": (),
    "ignore_eos": False,
    "max_tokens": 16,
    "min_tokens": 0,
    "logprobs": None,
    "prompt_logprobs": None,
    "detokenize": True,
    "skip_special_tokens": True,
    "include_stop_str_in_output": False,
    "logit_bias": None,
    "allowed_token_ids": None,
}

# field -> (accepted, refused)
CASES: dict[str, tuple[list[Any], list[Any]]] = {
    "n": ([1, 16], [0, -1, 17, 2**31, 2**63, 1e3, True, "5", None, 1.0]),
    "presence_penalty": ([-2, 2, 0.5, -0.0], [-2.1, 2.1, NAN, INF, -INF, "1", None, True]),
    "frequency_penalty": ([-2, 2.0], [-2.1, 2.1, NAN, 10**400]),
    "repetition_penalty": ([1e-6, 1, 10], [0, 0.0, -0.0, -1, 10.01, NAN, INF, True]),
    "temperature": ([0, -0.0, 1e-9, 100], [-1e-9, 100.1, NAN, INF, 1e999, None, "1", False]),
    "top_p": ([1e-9, 1], [0, -0.0, 1.01, NAN, None, True]),
    "top_k": ([-1, 0, 1, 2**31 - 1], [-2, 2**31, 1.0, True, None, "5", NAN]),
    "min_p": ([0, 1, 0.5], [-0.01, 1.01, NAN, INF]),
    "seed": ([None, 0, -1, -(2**63), 2**63 - 1], [2**63, -(2**63) - 1, 1.0, True, "7"]),
    "stop": (
        [None, "a", ["a", "b"], ("x" * 128,), [], ["a"] * 16],
        ["", [""], "x" * 129, ["a"] * 17, 5, [5], [None], b"ab", {"a": 1}, True],
    ),
    "stop_token_ids": ([None, [], [0], (5, 6)], [[-1], [1.0], [True], "12", 5, 0, ["1"], [2**31], [0] * 1025, False]),
    "ignore_eos": ([True, False], [0, 1, None, "true"]),
    "max_tokens": ([None, 1, 2**31 - 1], [0, -1, 2**31, 1.5, True, "5", NAN]),
    "min_tokens": ([0, 16], [-1, 2**31, None, True, 17]),
    "logprobs": ([None, 0, 20], [-1, 21, True, 1.0]),
    "prompt_logprobs": ([None, 0, 20], [-1, 21, False]),
    "detokenize": ([True, False], [0, None]),
    "skip_special_tokens": ([True, False], [1]),
    "include_stop_str_in_output": ([True, False], ["no"]),
    "logit_bias": (
        [None, {}, {3: -100}, {0: 100.0}],
        [
            {-1: 1.0},
            {True: 1.0},
            {"3": 1.0},
            {3: 100.5},
            {3: NAN},
            {3: True},
            {3: "1"},
            [(3, 1)],
            dict.fromkeys(range(1025), 1),
        ],
    ),
    "allowed_token_ids": ([None, [0], (1, 2)], [[], [-1], [True], [1.5], "1", 3]),
}


def test_names_and_defaults_are_those_of_vllm() -> None:
    assert {f.name: getattr(SamplingParams(), f.name) for f in fields(SamplingParams)} == VLLM_DEFAULTS


def test_every_field_has_cases() -> None:
    assert set(CASES) == set(VLLM_DEFAULTS)


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, (good, _) in CASES.items() for value in good])
def test_values_in_bounds_are_accepted(name: str, value: Any) -> None:
    SamplingParams(**{name: value})


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, (_, bad) in CASES.items() for value in bad])
def test_values_out_of_bounds_are_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(UsageError) as refusal:
        SamplingParams(**{name: value})
    assert refusal.value.code == "PARAMS"
    assert name in str(refusal.value)
    assert "expected" in str(refusal.value)
    assert len(str(refusal.value)) < 300


def test_a_huge_integer_makes_a_short_message() -> None:
    with pytest.raises(UsageError, match="digits"):
        SamplingParams(seed=10**5000)


def test_lists_become_tuples_and_nothing_can_change() -> None:
    stop, ids, bias = ["a", "b"], [1, 2], {5: 1}
    given = SamplingParams(stop=stop, stop_token_ids=ids, logit_bias=bias, allowed_token_ids=ids)
    stop.append("c")
    ids.append(3)
    bias[6] = 2
    assert given.stop_strings == ("a", "b")
    assert given.stop_ids == (1, 2)
    assert given.allowed_token_ids == (1, 2)
    assert given.logit_bias == {5: 1.0}
    assert SamplingParams(stop="ab").stop_strings == ("ab",)
    with pytest.raises(TypeError):
        given.logit_bias[5] = 2.0  # type: ignore[index]
    with pytest.raises(FrozenInstanceError):
        given.n = 2  # type: ignore[misc]


def test_copies_are_equal() -> None:
    given = SamplingParams(stop="x", logit_bias={5: 1.0}, seed=3)
    assert pickle.loads(pickle.dumps(given)) == given  # noqa: S301 - our own bytes
    assert copy.deepcopy(given) == given
    assert hash(replace(given)) == hash(given)
    assert replace(given, n=2).logit_bias == {5: 1.0}


def test_zero_temperature_is_greedy_and_has_no_sign() -> None:
    assert SamplingParams(temperature=-0.0).greedy
    assert str(SamplingParams(temperature=-0.0).temperature) == "0.0"
    assert not SamplingParams(temperature=1e-9).greedy


def test_min_tokens_may_not_exceed_max_tokens() -> None:
    SamplingParams(min_tokens=5, max_tokens=5)
    SamplingParams(min_tokens=50, max_tokens=None)
    with pytest.raises(UsageError, match="min_tokens is 6; expected at most max_tokens, which is 5"):
        SamplingParams(min_tokens=6, max_tokens=5)


def test_stop_strings_need_text() -> None:
    with pytest.raises(UsageError, match="detokenize"):
        SamplingParams(stop="x", detokenize=False)


@pytest.mark.parametrize("name", ["stop_token_ids", "allowed_token_ids"])
def test_ids_are_checked_against_the_vocabulary(name: str) -> None:
    given = SamplingParams(**{name: [9]})
    given.check_vocab(10)
    with pytest.raises(UsageError, match=f"{name} is 9; expected one from 0 to 8"):
        given.check_vocab(9)


def test_bias_is_checked_against_the_vocabulary() -> None:
    SamplingParams(logit_bias={9: 1.0}).check_vocab(10)
    with pytest.raises(UsageError, match="logit_bias is 9"):
        SamplingParams(logit_bias={9: 1.0}).check_vocab(9)


# aliases and defaults


def test_max_new_tokens_is_an_alias_and_warns_once(caplog: pytest.LogCaptureFixture) -> None:
    params._warn_alias_once.cache_clear()
    with caplog.at_level(logging.WARNING, logger="pyruntime"):
        assert SamplingParams.create(max_new_tokens=7).max_tokens == 7
        assert SamplingParams.create(max_new_tokens=8).max_tokens == 8
        assert SamplingParams.create(max_tokens=9).max_tokens == 9
    assert [record.message for record in caplog.records if "max_new_tokens" in record.message] != []
    assert len(caplog.records) == 1


def test_both_names_are_refused() -> None:
    with pytest.raises(UsageError, match="both"):
        SamplingParams.create(max_tokens=1, max_new_tokens=1)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(UsageError, match=r"unknown sampling parameter 'temprature'; expected one of .*temperature"):
        SamplingParams.create(temprature=1)


def test_defaults_from_a_generation_config() -> None:
    config = {"do_sample": True, "temperature": 0.6, "top_k": 50, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.1}
    found = SamplingParams.defaults_from(
        {**config, "max_new_tokens": 77, "bos_token_id": 1, "transformers_version": "5"}
    )
    assert found == SamplingParams(
        temperature=0.6, top_k=50, top_p=0.9, min_p=0.1, repetition_penalty=1.1, max_tokens=77
    )
    assert SamplingParams.defaults_from({}) == SamplingParams()
    assert SamplingParams.defaults_from({"temperature": None, "top_k": None}) == SamplingParams()


def test_a_generation_config_may_name_stops_and_a_least_length() -> None:
    found = SamplingParams.defaults_from({"min_new_tokens": 3, "stop_strings": ["a", "b"]})
    assert found == SamplingParams(min_tokens=3, stop=["a", "b"])
    assert SamplingParams.defaults_from({"stop_strings": "a"}).stop == ("a",)
    assert SamplingParams.defaults_from({"min_new_tokens": 3}, min_tokens=1).min_tokens == 1


def test_the_authors_least_length_gives_way_to_the_largest() -> None:
    # 16 is the default of max_tokens, which the author did not choose
    assert SamplingParams.defaults_from({"min_new_tokens": 30}).min_tokens == 16
    assert SamplingParams.defaults_from({"min_new_tokens": 30, "max_new_tokens": 40}, max_tokens=5).min_tokens == 5
    assert SamplingParams.defaults_from({"min_new_tokens": 30}, max_new_tokens=5).min_tokens == 5
    assert SamplingParams.defaults_from({"min_new_tokens": 30}, max_tokens=None).min_tokens == 30
    with pytest.raises(UsageError, match="min_tokens is 30"):
        SamplingParams.defaults_from({}, min_tokens=30)
    with pytest.raises(UsageError, match="min_tokens is 'x'"):
        SamplingParams.defaults_from({"min_new_tokens": "x"})


def test_do_sample_false_is_greedy_unless_overridden() -> None:
    config = {"do_sample": False, "temperature": 0.6}
    assert SamplingParams.defaults_from(config).temperature == 0.0
    assert SamplingParams.defaults_from({"do_sample": False}).greedy
    assert SamplingParams.defaults_from(config, temperature=0.5).temperature == 0.5


def test_overrides_win() -> None:
    config = {"max_new_tokens": 10, "top_k": 5}
    assert SamplingParams.defaults_from(config, max_tokens=3, seed=1) == SamplingParams(max_tokens=3, top_k=5, seed=1)
    assert SamplingParams.defaults_from(config, max_new_tokens=4).max_tokens == 4
    assert SamplingParams.defaults_from(config, top_k=0).top_k == 0


def test_a_lying_generation_config_is_refused() -> None:
    with pytest.raises(UsageError, match="top_p"):
        SamplingParams.defaults_from({"top_p": 7})


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ({"eos_token_id": 2}, {"eos_token_id": 3}, (2,)),
        ({"eos_token_id": [5, 2, 5]}, {"eos_token_id": 3}, (5, 2)),
        ({}, {"eos_token_id": 3}, (3,)),
        ({"eos_token_id": None}, {"eos_token_id": [0, 1]}, (0, 1)),
        ({}, {}, ()),
    ],
)
def test_eos_ids(generation: dict[str, Any], config: dict[str, Any], expected: tuple[int, ...]) -> None:
    assert eos_token_ids(generation, config) == expected


@pytest.mark.parametrize("bad", [-1, "2", True, [True], [1.0], {"a": 1}, 2**31])
def test_bad_eos_ids_are_refused(bad: Any) -> None:
    with pytest.raises(UsageError, match=r"eos_token_id of generation_config\.json"):
        eos_token_ids({"eos_token_id": bad}, {})
