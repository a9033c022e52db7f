"""What config.json says: bounds, both styles of rope, both dialects of drops, and what is refused or noted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pyruntime.checkpoint import Model, read_model
from pyruntime.errors import CheckpointError, PyruntimeError, UsageError
from pyruntime.spec import RopeKind
from tests.checkpoint.craft import edited

Make = Callable[..., tuple[Path, Any]]
Read = Callable[..., Model]


@pytest.fixture
def read(make_llama: Make, tmp_path: Path) -> Read:
    """Read the tiny Llama of four layers with keys of its config.json replaced, or removed with `...`."""

    def with_config(**config: Any) -> Model:
        return read_model(edited(make_llama()[0], tmp_path / f"m{len(os.listdir(tmp_path))}", config))

    return with_config


def refused(call: Callable[[], Any], code: str = "CONFIG") -> str:
    with pytest.raises(UsageError) as caught:
        call()
    assert (caught.value.code, caught.value.exit_code) == (code, 2)
    assert str(caught.value).isprintable()
    return str(caught.value)


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 2.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "llama3": {"rope_type": "llama3", **LLAMA3},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 20.0},
}


@pytest.mark.parametrize("kind", ROPES)
def test_both_styles_of_rope_give_equal_specifications(read: Read, kind: str) -> None:
    parameters = ROPES[kind]
    new = read(rope_parameters={**parameters, "rope_theta": 500.0})
    old = read(rope_parameters=..., rope_theta=500.0, rope_scaling=parameters)
    oldest = {("type" if key == "rope_type" else key): value for key, value in parameters.items()}
    mixed = read(rope_parameters=oldest, rope_theta=500.0)
    assert new.spec == old.spec == mixed.spec
    rope = new.spec.attentions()[0][1].rope
    assert rope is not None
    assert (rope.kind, rope.theta) == (RopeKind(kind), 500.0)
    assert new.notes == old.notes == ()


def test_without_any_rope_the_defaults_of_llama_hold(read: Read) -> None:
    rope = read(rope_parameters=...).spec.attentions()[0][1].rope
    assert rope is not None
    assert (rope.kind, rope.theta, rope.dim) == (RopeKind.DEFAULT, 10000.0, 8)


BAD_ROPES: dict[str, tuple[dict[str, Any], str]] = {
    "unknown kind": ({"rope_parameters": {"rope_type": "longrope", "factor": 2.0}}, "longrope"),
    "kind a number": ({"rope_parameters": {"rope_type": 3}}, "rope_type"),
    "unknown parameter": ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "twist": 1}}, "twist"),
    "no factor": ({"rope_parameters": {"rope_type": "linear"}}, "factor"),
    "factor a text": ({"rope_parameters": {"rope_type": "linear", "factor": "2"}}, "factor"),
    "two thetas": ({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e5}}, "rope_theta"),
    "two kinds": ({"rope_parameters": {"rope_type": "default", "type": "linear", "factor": 2.0}}, "type"),
    "null kind beside another": ({"rope_parameters": {"rope_type": None, "type": "longrope"}}, "longrope"),
    "both styles, unlike": (
        {"rope_parameters": {"rope_theta": 1e4}, "rope_scaling": {"type": "linear", "factor": 2.0}},
        "rope_scaling",
    ),
    "a list": ({"rope_parameters": [1]}, "rope_parameters"),
    "by layer type": ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "layer type"),
    "theta zero": ({"rope_parameters": {"rope_theta": 0.0}}, "rope_theta"),
    "llama3 factors swapped": (
        {"rope_parameters": {"rope_type": "llama3", **LLAMA3, "low_freq_factor": 5.0}},
        "low_freq_factor",
    ),
    "odd head": ({"head_dim": 7}, "rope dim"),
}


@pytest.mark.parametrize("case", BAD_ROPES)
def test_a_rope_that_is_not_understood_is_refused(read: Read, case: str) -> None:
    config, word = BAD_ROPES[case]
    assert word in refused(lambda: read(**config))


# C01 to C04
WHOLE = ["num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size"]
WHOLE += ["intermediate_size", "max_position_embeddings"]


@pytest.mark.parametrize("key", WHOLE)
@pytest.mark.parametrize("value", [0, -1, 4.0, True, "4", [4], 10**9, 10**400])
def test_sizes_are_bounded_integers(read: Read, key: str, value: Any) -> None:
    assert key in refused(lambda: read(**{key: value}))


@pytest.mark.parametrize("value", [0, 0.0, -1e-5, 1.5, "1e-5", True, [1e-5]])
def test_eps_is_a_bounded_number(read: Read, value: Any) -> None:
    assert "rms_norm_eps" in refused(lambda: read(rms_norm_eps=value))


@pytest.mark.parametrize("key", ["hidden_size", "num_attention_heads", "vocab_size", "intermediate_size"])
def test_required_keys_are_required(read: Read, key: str) -> None:
    assert key in refused(lambda: read(**{key: ...}))
    assert key in refused(lambda: read(**{key: None}))


@pytest.mark.parametrize("key", ["tie_word_embeddings", "attention_bias", "mlp_bias"])
@pytest.mark.parametrize("value", [0, 1, "false"])
def test_flags_are_bools(read: Read, key: str, value: Any) -> None:
    assert key in refused(lambda: read(**{key: value}))


RULES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "heads no multiple": ({"num_key_value_heads": 3}, ("num_heads 4", "num_kv_heads 3")),
    "more key heads": ({"num_key_value_heads": 8}, ("num_kv_heads", "8")),
    "hidden no multiple": ({"num_attention_heads": 5, "head_dim": ...}, ("hidden_size 32", "num_attention_heads 5")),
    "activation": ({"hidden_act": "mish"}, ("hidden_act", "mish", "silu")),
}


@pytest.mark.parametrize("case", RULES)
def test_sizes_that_do_not_fit_together_are_refused(read: Read, case: str) -> None:
    config, words = RULES[case]
    message = refused(lambda: read(**config))
    assert all(word in message for word in words), message


# C10, C11
@pytest.mark.parametrize("value", ["opt", "LLAMA", "", 3, None, ["llama"], ..., "x" * 100_000])
def test_an_unknown_architecture_is_refused_with_those_supported(read: Read, value: Any) -> None:
    message = refused(lambda: read(model_type=value))
    assert "model_type" in message and len(message) < 5000
    assert "llama" in message or value == "x" * 100_000


@pytest.mark.parametrize("value", [{"quant_method": "awq"}, [1], "x", True])
def test_what_cannot_be_honoured_is_refused_by_name(read: Read, value: Any) -> None:
    assert "quantization_config" in refused(lambda: read(quantization_config=value))


@pytest.mark.parametrize("value", [{}, [], False])
def test_a_quantisation_that_is_off_needs_no_word(read: Read, value: Any) -> None:
    assert read(quantization_config=value).notes == ()


@pytest.mark.parametrize("key", ["unsloth_version", "axolotl_config", "transformers.js_config", "resid_pdrop"])
def test_stamps_of_other_programs_need_no_word(read: Read, key: str) -> None:
    assert read(**{key: "1"}).notes == ()


def test_code_of_a_checkpoint_is_noted_and_never_run(make_llama: Make, tmp_path: Path) -> None:
    mapped = {
        "AutoConfig": "configuration_dropped_llama.LlamaConfig",
        "AutoModelForCausalLM": "modeling_dropped_llama.LlamaForCausalLM",
    }
    folder = edited(make_llama()[0], tmp_path / "m", {"auto_map": mapped, "trust_remote_code": True})
    marker = tmp_path / "marker"
    code = f"import pathlib\npathlib.Path({str(marker)!r}).touch()\n"
    code += "class LlamaConfig: pass\nclass LlamaForCausalLM: pass\n"
    for name in ("configuration_dropped_llama.py", "modeling_dropped_llama.py", "__init__.py", "conftest.py"):
        (folder / name).write_text(code)
    model = read_model(folder)
    assert sum("auto_map" in note for note in model.notes) == 1
    assert sum("trust_remote_code" in note for note in model.notes) == 1
    assert not marker.exists()
    # the marker would have shown: running the file leaves it
    subprocess.run([sys.executable, folder / "modeling_dropped_llama.py"], check=True, timeout=60)
    assert marker.exists()


@pytest.mark.parametrize("said", ["float32", "torch.float32", "auto", None])
def test_names_of_the_stored_dtype_are_no_conflict(read: Read, said: Any) -> None:
    model = read(torch_dtype=said, dtype=None)
    assert model.dtype_conflict is None and model.notes == ()


@pytest.mark.parametrize("said", ["bfloat16", "torch.bfloat16", "", 32, "torch.auto"])
def test_another_dtype_is_a_conflict(read: Read, said: Any) -> None:
    assert "float32" in str(read(torch_dtype=said, dtype=None).dtype_conflict)


def test_private_keys_are_noted(read: Read) -> None:
    (note,) = read(_sliding_window_patterns=3).notes
    assert "_sliding_window_patterns" in note


def test_known_keys_need_no_word(read: Read) -> None:
    assert (
        read(torch_dtype="float32", architectures=["X"], nothing=None, _commit_hash="3", id2label={"0": "x"}).notes
        == ()
    )


def test_names_of_unknown_keys_cannot_garble_a_terminal(read: Read) -> None:
    keys = {"a\x1b[2Jb": 1, "c\nd": 1, "e" * 5000: 1, **{f"key{i}": 1 for i in range(5000)}}
    message = refused(lambda: read(**keys))
    assert len(message) < 5000
    assert "5003 unknown keys" in message
    (note,) = read(**dict.fromkeys(keys, False)).notes
    assert note.isprintable() and len(note) < 5000


# C06, C07
LISTS: dict[str, tuple[Any, tuple[int, ...], bool]] = {
    "in the order of dropping": ([2, 3, 1], (1, 2, 3), False),
    "twice": ([1, 1, 3], (1, 3), True),
    "bools": ([False, True, False, True], (1, 3), True),
    "no bool true": ([False] * 4, (), True),
    "all": ([0, 1, 2, 3], (0, 1, 2, 3), False),
    "null": (None, (), False),
    "empty": ([], (), False),
    "absent": (..., (), False),
}


@pytest.mark.parametrize("case", LISTS)
@pytest.mark.parametrize("key, kind", [("drop_attn_list", "attention"), ("drop_mlp_list", "mlp")])
def test_lists_of_llm_drop_are_read(read: Read, key: str, kind: str, case: str) -> None:
    value, expected, noted = LISTS[case]
    model = read(**{key: value})
    assert model.spec.dropped(kind) == expected
    assert model.spec.dropped("mlp" if kind == "attention" else "attention") == ()
    assert any(key in note for note in model.notes) == noted


BAD_LISTS = [
    [4],
    [-1],
    [0, 4],
    [1.0],
    ["1"],
    "1",
    "",
    3,
    0,
    True,
    False,
    {},
    {"1": 1},
    [None],
    [[1]],
    [True, 1],
    [1, False],
]
BAD_LISTS += [[True], [True] * 3, [True] * 5, [10**30]]


@pytest.mark.parametrize("value", BAD_LISTS, ids=str)
@pytest.mark.parametrize("key", ["drop_attn_list", "drop_mlp_list"])
def test_lists_that_are_not_clear_are_refused(read: Read, key: str, value: Any) -> None:
    assert key in refused(lambda: read(**{key: value}), "DROP")


def test_both_dialects_at_once_drop_what_either_drops(read: Read) -> None:
    skip = {"1": {"skip": ["attention"]}, "02": {"skip": ["attention", "mlp"]}, "3": {"skip": []}, "0": {"skip": None}}
    differ = read(per_layer_config=skip, drop_attn_list=[3, 2])
    assert (differ.spec.dropped("attention"), differ.spec.dropped("mlp")) == ((1, 2, 3), (2,))
    assert any("per_layer_config" in note and "differ" in note for note in differ.notes)
    agree = read(per_layer_config=skip, drop_attn_list=[2, 1], drop_mlp_list=[2])
    assert (agree.spec.dropped("attention"), agree.spec.dropped("mlp")) == ((1, 2), (2,))
    assert agree.notes == ()


BAD_TABLES: dict[str, Any] = {
    "a list": [{"skip": ["mlp"]}],
    "a layer too many": {"4": {"skip": ["mlp"]}},
    "a negative layer": {"-1": {"skip": ["mlp"]}},
    "a name": {"first": {"skip": ["mlp"]}},
    "no name": {"": {"skip": ["mlp"]}},
    "other digits": {"٣": {"skip": ["mlp"]}},
    "superscript": {"²": {"skip": ["mlp"]}},
    "a layer twice": {"1": {"skip": ["mlp"]}, "01": {"skip": ["attention"]}},
    "an entry null": {"1": None},
    "an entry a list": {"1": ["mlp"]},
    "skip a text": {"1": {"skip": "mlp"}},
    "skip an empty text": {"1": {"skip": ""}},
    "skip false": {"1": {"skip": False}},
    "skip zero": {"1": {"skip": 0}},
    "skip an object": {"1": {"skip": {}}},
    "skip something else": {"1": {"skip": ["norm"]}},
    "skip a number": {"1": {"skip": [1]}},
    "skip a list in a list": {"1": {"skip": [["mlp"]]}},
    "another key": {"1": {"rms_norm_eps": 1e-4}},
    "an unknown activation": {"1": {"hidden_act": "mish"}},
    "a size of text": {"1": {"intermediate_size": "24"}},
    "a size of zero": {"1": {"intermediate_size": 0}},
    "heads no multiple": {"1": {"num_key_value_heads": 3}},
}


@pytest.mark.parametrize("case", BAD_TABLES)
def test_overrides_that_are_not_clear_are_refused(read: Read, case: str) -> None:
    refused(lambda: read(per_layer_config=BAD_TABLES[case]))


def test_an_override_of_a_skipped_sublayer_needs_no_weights(read: Read) -> None:
    model = read(per_layer_config={"1": {"skip": ["mlp"], "intermediate_size": 24}})
    assert model.spec.dropped("mlp") == (1,)


# C13 and the file itself
FILES: dict[str, bytes] = {
    "above 1 MiB": b'{"model_type": "llama"}'.ljust((1 << 20) + 1),
    "deep": b'{"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "deep with brackets in texts": b'{"]]]]": ' + b'{"\\"]}": ' * 80 + b"1" + b"}" * 81,
    "NaN": b'{"rms_norm_eps": NaN}',
    "Infinity": b'{"rms_norm_eps": Infinity}',
    "minus Infinity": b'{"rms_norm_eps": -Infinity}',
    "a list": b"[]",
    "empty": b"",
    "two objects": b"{}{}",
    "not UTF-8": b'{"\xff": 1}',
    "UTF-16": '{"model_type": "llama"}'.encode("utf-16"),
    "byte order mark": b'\xef\xbb\xbf{"model_type": "llama"}',
    "half a surrogate pair": b'{"a\\ud800": 1}',
    "a comment": b'{"model_type": "llama"} // fine',
    "a comma too many": b'{"model_type": "llama",}',
}


@pytest.mark.parametrize("case", FILES)
def test_a_file_that_is_no_configuration_is_refused(tmp_path: Path, case: str) -> None:
    (tmp_path / "config.json").write_bytes(FILES[case])
    with pytest.raises(CheckpointError, match=r"config\.json") as caught:
        read_model(tmp_path)
    assert (caught.value.code, caught.value.exit_code) == ("CONFIG", 3)
    assert len(caught.value.one_line()) < 500


def test_a_configuration_just_below_the_cap_is_read(make_llama: Make, tmp_path: Path) -> None:
    folder = edited(make_llama()[0], tmp_path / "m")
    text = (folder / "config.json").read_bytes()
    (folder / "config.json").write_bytes(text.ljust(1 << 20))
    assert read_model(folder).config == json.loads(text)


def test_a_key_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama", "a": {"hidden_size": 8, "hidden_size": 16}}')
    with pytest.raises(CheckpointError, match="hidden_size") as caught:
        read_model(tmp_path)
    assert caught.value.code == "DUPLICATE_NAME"


@pytest.mark.parametrize("number", ["1e400", "-1e400"])
def test_a_number_beyond_all_floats_is_refused(make_llama: Make, tmp_path: Path, number: str) -> None:
    folder = edited(make_llama()[0], tmp_path / "m", {"rms_norm_eps": "HERE"})
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace('"HERE"', number))
    assert "rms_norm_eps" in refused(lambda: read_model(folder))


def test_a_missing_configuration_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        read_model(tmp_path)
    with pytest.raises(PyruntimeError):
        read_model(tmp_path / "nowhere")


def test_a_fifo_for_a_configuration_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(CheckpointError, match="no regular file"):
        read_model(tmp_path)
