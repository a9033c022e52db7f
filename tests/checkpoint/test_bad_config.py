"""Every lie of a config.json, C01 to C13, through the command: its error, its exit code, and nothing read before."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pyruntime import LLM, UsageError
from pyruntime.checkpoint import ReadOptions, read_model
from pyruntime.checkpoint.manifest import MANIFEST, make_manifest
from pyruntime.cli.main import run
from tests.checkpoint.craft import SINGLE, Bad, check_refusal, pack, reconfigure, reheader, rewrite
from tests.checkpoint.harm import Harm, bad, check_rows

Make = Callable[..., tuple[Path, Any]]
LARGE = {"hidden_size": 1 << 16, "intermediate_size": 1 << 20, "num_hidden_layers": 4, "num_attention_heads": 64}
LARGE["num_key_value_heads"] = 2


def says(**config: Any) -> Harm:
    return lambda folder, _: reconfigure(folder, **config)


def writes(key: str, number: str, within: str | None = None) -> Harm:
    """The number stands in config.json as it is written here."""

    def harm(folder: Path, _: pytest.MonkeyPatch) -> None:
        reconfigure(folder, **({key: "HERE"} if within is None else {within: {key: "HERE"}}))
        text = (folder / "config.json").read_text()
        (folder / "config.json").write_text(text.replace('"HERE"', number))

    return harm


def small_table(folder: Path, _: pytest.MonkeyPatch) -> None:
    """A model of 200 tokens beside a tokenizer of more."""
    tables = ("model.embed_tokens.weight", "lm_head.weight")
    rewrite(folder, lambda tensors: tensors.update({name: tensors[name][:200].clone() for name in tables}))
    reconfigure(folder, vocab_size=200)


def large_shapes() -> dict[str, list[int]]:
    """Shapes of a model of terabytes, as transformers makes it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(vocab_size=300, **LARGE))
    return {name: list(tensor.shape) for name, tensor in model.state_dict().items()}


def large(folder: Path, _: pytest.MonkeyPatch) -> None:
    """A weight file with true shapes, of which the disk holds the header alone."""
    header, end = {}, 0
    for name, shape in large_shapes().items():
        size = torch.Size(shape).numel() * 4
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    with (folder / SINGLE).open("wb") as file:
        file.write(pack(header))
        file.truncate(file.tell() + end)
    reconfigure(folder, head_dim=..., **LARGE)


def lose(part: str) -> Harm:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if part in name]:
            del tensors[name]

    return lambda folder, _: rewrite(folder, change)


def lose_beside_drops(folder: Path, patch: pytest.MonkeyPatch) -> None:
    reconfigure(folder, drop_attn_list=[1])
    lose("layers.2.self_attn")(folder, patch)


def vouched(change: Callable[[Path], object]) -> Harm:
    """A change after a manifest was written."""

    def harm(folder: Path, _: pytest.MonkeyPatch) -> None:
        (folder / MANIFEST).write_text(json.dumps(make_manifest(folder, {})))
        change(folder)

    return harm


def grow(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes() + b"\n")


def swap(folder: Path) -> None:
    """Two tensors of equal shape change names: file and header keep their sizes."""
    one, two = b"layers.1.mlp.up_proj", b"layers.2.mlp.up_proj"
    reheader(folder, lambda text: text.replace(one, b"%").replace(two, one).replace(b"%", two))


def text(content: bytes) -> Harm:
    return lambda folder, _: (folder / "config.json").write_bytes(content)


NUMBERS = {
    "intermediate_size": ("0", "-56"),
    "max_position_embeddings": ("0", "-1", "16777217"),
    "rms_norm_eps": ("0", "-1e-5", "0.0"),
}
NO_NUMBERS = ("NaN", "Infinity", "-Infinity")

BAD: list[Bad] = [
    *bad(
        "C01",
        "CONFIG",
        2,
        {str(n): says(num_hidden_layers=n) for n in (0, -1, 1025, 4.0, True, "4", "four", 10**9, 1e9, [4])},
        "num_hidden_layers",
    ),
    *bad(
        "C02",
        "CONFIG",
        2,
        {"hidden": says(num_attention_heads=5, head_dim=...)},
        "hidden_size 32",
        "num_attention_heads 5",
    ),
    *bad("C02", "CONFIG", 2, {"heads": says(num_key_value_heads=3)}, "num_heads 4", "num_kv_heads 3"),
    *bad("C02", "CONFIG", 2, {"more key heads": says(num_key_value_heads=8)}, "num_kv_heads is 8", "from 1 to 4"),
    *bad("C02", "CONFIG", 2, {"odd head": says(head_dim=7)}, "rope dim is 7", "even"),
    # Gemma 4 has heads of 512
    *bad("C02", "CONFIG", 2, {"wide head": says(head_dim=1026)}, "head_dim is 1026", "1024"),
    *bad("C03", "CONFIG", 2, {str(n): says(vocab_size=n) for n in (0, -1, (1 << 20) + 1, True, 300.0)}, "vocab_size"),
    *bad("C03", "SHAPE", 3, {"rows": says(vocab_size=301)}, "model.embed_tokens.weight", "[300, 32]", "[301, 32]"),
    *bad("C03", "TOKENIZER", 3, {"smaller than the tokenizer": small_table}, "ids 0 to 199", "another model"),
    *[
        each
        for key, numbers in NUMBERS.items()
        for each in bad("C04", "CONFIG", 2, {f"{key} {n}": writes(key, n) for n in (*numbers, "1e400", "-1e400")}, key)
    ],
    *bad(
        "C04",
        "CONFIG",
        2,
        {f"rope {n}": writes("rope_theta", n, "rope_parameters") for n in ("0", "-1", "0.0", "1e400")},
        "rope_theta",
    ),
    # what is no JSON is a bad file
    *[
        each
        for key in (*NUMBERS, "rope_theta")
        for each in bad("C04", "CONFIG", 3, {f"{key} {n}": writes(key, n) for n in NO_NUMBERS}, "no JSON number")
    ],
    *bad("C05", "MEMORY", 7, {"more than there is": large}, "needs 3", "GiB are available"),
    *bad(
        "C06",
        "DROP",
        2,
        {
            str(drops): says(drop_attn_list=drops)
            for drops in (
                [-1],
                [4],
                [0, 10**9],
                [True, 1],
                [0, False],
                ["1"],
                "1",
                "[1]",
                1,
                True,
                {"1": 1},
                [1.0],
                [None],
            )
        },
        "drop_attn_list",
    ),
    *bad("C06", "DROP", 2, {f"{n} bools": says(drop_mlp_list=[True] * n) for n in (3, 5)}, "drop_mlp_list", "4 layers"),
    *bad(
        "C08", "MISSING_TENSOR", 3, {"a kept layer": lose_beside_drops}, "4 tensors", "model.layers.2.self_attn.q_proj"
    ),
    *bad(
        "C09",
        "CONFIG",
        2,
        {"skipless": says(skipless=True), "merged": says(merged=["q", "p"])},
        "attention of layer 0",
        "a skip",
        "model.layers.0.input_layernorm",
    ),
    *bad("C09", "CONFIG", 2, {"in one layer": says(per_layer_config={"1": {"merged": ["q", "p"]}})}, "merged"),
    *bad(
        "C10",
        "CONFIG",
        2,
        {"unknown": says(sparkle=3, twist="x")},
        "2 unknown keys: sparkle, twist",
        "--ignore-config-keys",
    ),
    *bad("C10", "CONFIG", 2, {"zero": says(sparkle=0), "text": says(sparkle="")}, "sparkle"),
    *bad("C10", "CONFIG", 2, {"twelve": says(**{f"key{i:02}": 1 for i in range(12)})}, "12 unknown keys", "key09, ..."),
    *bad(
        "C10",
        "CONFIG",
        2,
        {"another": says(sparkle=3, twist=1)},
        "twist",
        arguments=("--ignore-config-keys", "sparkle"),
    ),
    *bad("C10", "CONFIG", 2, {"obeyed": says()}, "hidden_size", arguments=("--ignore-config-keys", "x,hidden_size")),
    *bad("C10", "CONFIG", 2, {"quantised": says(quantization_config={"quant_method": "awq"})}, "quantization_config"),
    *bad(
        "C11", "CONFIG", 2, {str(m): says(model_type=m) for m in ("mamba", None, 3, ["llama"])}, "model_type", "llama"
    ),
    *bad(
        "C11",
        "CONFIG",
        2,
        {"rope": says(rope_parameters={"rope_type": "spiral", "rope_theta": 1e4, "factor": 2.0})},
        "rope_type is 'spiral'",
        "llama3",
    ),
    *bad("C11", "MISSING_TENSOR", 3, {"untied without a head": lose("lm_head")}, "lm_head.weight"),
    *bad(
        "C12",
        "MANIFEST_MISMATCH",
        3,
        {
            "size": vouched(grow("config.json")),
            "size of weights": vouched(grow(SINGLE)),
            "header": vouched(swap),
            "a file less": vouched(lambda folder: (folder / "tokenizer.json").unlink()),
            "a weight file more": vouched(
                lambda folder: shutil.copy(folder / SINGLE, folder / "model-extra.safetensors")
            ),
        },
        MANIFEST,
        "get the file again",
    ),
    *bad("C13", "CONFIG", 3, {"above 1 MiB": text(b'{"model_type": "llama"}'.ljust((1 << 20) + 1))}, "1048577"),
    *bad("C13", "CONFIG", 3, {"1000 deep": text(b'{"x":' + b"[" * 1000 + b"]" * 1000 + b"}")}, "deeper than 64"),
    *bad("C13", "CONFIG", 3, {"deep": text(b'{"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}")}, "100001 brackets"),
    *bad("C13", "CONFIG", 3, {"wide": text(b'{"x":[' + b"[]," * 120_000 + b"1]}")}, "120002 brackets"),
]


@pytest.mark.parametrize("each", BAD, ids=str)
def test_a_bad_configuration_is_refused_in_one_line(
    each: Bad,
    text_model: tuple[Path, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    check_refusal(each, shutil.copytree(text_model[0], tmp_path / "m"), monkeypatch, capsys)


def test_every_row_has_its_cases() -> None:
    """C07 is what is legal, below."""
    check_rows(BAD, "C", 13, legal="C07")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_needed_is_said_in_the_dtype_of_the_plan(
    text_model: tuple[Path, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    dtype: str,
) -> None:
    """C05."""
    num_values = sum(torch.Size(shape).numel() for shape in large_shapes().values())
    needed = num_values * getattr(torch, dtype).itemsize / 2**30
    each = Bad("C05", dtype, large, "MEMORY", 7, (f"needs {needed:.2f} GiB; ",), ("--dtype", dtype))
    check_refusal(each, shutil.copytree(text_model[0], tmp_path / "m"), monkeypatch, capsys)


ALL = [0, 1, 2, 3]
LEGAL: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "every attention": ({"drop_attn_list": ALL}, {}, "every attention is dropped"),
    "every MLP": ({}, {"drop_mlp": "0-3"}, "every MLP is dropped"),
    "everything": ({"drop_attn_list": ALL}, {"drop_mlp": ALL}, "every layer is dropped whole"),
    "blocks": ({}, {"drop_block": "0-3"}, "every layer is dropped whole"),
    "twice": ({}, {"drop_block": [1, 2], "drop_attn": [2, 3]}, "dropped once: attention 2"),
    "both twice": ({}, {"drop_block": [1], "drop_attn": [1], "drop_mlp": [1]}, "dropped once: attention 1, mlp 1"),
    "bools": ({"drop_attn_list": [True, False, False, False]}, {}, "drop_attn_list"),
    "a layer twice": ({"drop_attn_list": [1, 1]}, {}, "drop_attn_list"),
}


@pytest.mark.parametrize("case", LEGAL)
def test_odd_drops_are_legal_and_said_once(
    text_model: tuple[Path, Any], tmp_path: Path, case: str, caplog: pytest.LogCaptureFixture
) -> None:
    """C06 and C07."""
    config, drops, word = LEGAL[case]
    folder = shutil.copytree(text_model[0], tmp_path / "m")
    reconfigure(folder, **config)
    llm = LLM(folder, **drops)
    assert sum(word in note for note in llm.model.notes) == 1
    assert sum(word in record.getMessage() for record in caplog.records) == 1
    assert llm.generate([5, 6], use_tqdm=False)[0].finished


@pytest.mark.parametrize("drops", [{}, {"drop_attn": "1-3", "drop_mlp": "0-2"}, {"drop_block": [1], "drop_attn": [2]}])
def test_ordinary_drops_need_no_word(text_model: tuple[Path, Any], drops: dict[str, Any]) -> None:
    assert LLM(text_model[0], **drops).model.notes == ()


def test_every_key_of_any_model_is_known(text_model: tuple[Path, Any], tmp_path: Path) -> None:
    """C10: what transformers' base class and its generation settings may leave in a config.json."""
    from transformers import GenerationConfig, PreTrainedConfig

    general = {**GenerationConfig().to_dict(), **PreTrainedConfig().to_dict()}
    # another architecture, if it is true
    assert general.pop("is_encoder_decoder") is False
    model = read_model(text_model[0])
    for key in general.keys() - model.config.keys():
        folder = shutil.copytree(text_model[0], tmp_path / "m", dirs_exist_ok=True)
        reconfigure(folder, **{key: "x"})
        assert read_model(folder).notes == (), key


def test_a_key_that_is_switched_off_is_noted(text_model: tuple[Path, Any], tmp_path: Path) -> None:
    folder = shutil.copytree(text_model[0], tmp_path / "m")
    off: dict[str, Any] = {"sparkle": False, "twist": [], "bend": {}, "is_encoder_decoder": False}
    reconfigure(folder, **off, fold=None)
    (note,) = read_model(folder).notes
    assert all(key in note for key in off) and "fold" not in note


def test_a_key_that_the_user_answers_for_is_noted(
    text_model: tuple[Path, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(text_model[0], tmp_path / "m")
    reconfigure(folder, sparkle=3, twist="x")
    (note,) = LLM(folder, ignore_config_keys=["twist", "sparkle"]).model.notes
    assert "sparkle, twist" in note
    absent, ignored = sorted(LLM(folder, ignore_config_keys=("sparkle", "twist", "absent")).model.notes)
    assert "absent" in absent and "sparkle, twist" in ignored
    assert run(["generate", str(folder), "the cat", "--ignore-config-keys", "twist, sparkle"]) == 0
    capsys.readouterr()
    for wrong in ("sparkle", None, [3]):
        with pytest.raises(UsageError, match="ignore_config_keys"):
            ReadOptions(ignore_config_keys=wrong)  # type: ignore[arg-type]


def test_a_stored_head_beside_a_tied_one_is_noted(text_model: tuple[Path, Any], tmp_path: Path) -> None:
    """C11: transformers reads the stored head, and so does pyruntime (test_tied.py compares the logits)."""
    folder = shutil.copytree(text_model[0], tmp_path / "m")
    reconfigure(folder, tie_word_embeddings=True)
    assert "lm_head.weight" in load_file(folder / SINGLE)
    (note,) = read_model(folder).notes
    assert "ties the head" in note
