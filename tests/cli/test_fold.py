"""`pyruntime fold`: what it writes gives the same logits, what it prints is what it did, what it refuses it names."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pyruntime import LLM
from pyruntime.checkpoint import read_model
from pyruntime.checkpoint.writer import write_native
from pyruntime.cli.main import run
from pyruntime.spec import Attention, Cached
from tests.families import VARIANTS, make
from tests.helpers import all_logits, hf_logits, make_plan, nmse, relative_error
from tests.passes import folds
from tests.specs import model_of, random_model

Capture = pytest.CaptureFixture[str]
MakeLlama = Callable[..., tuple[Path, Any]]
IDS = [(7 * i * i + 3 * i) % 61 for i in range(30)]


def fold(capsys: Capture, model: Path, out: Path, *options: object) -> dict[str, Any]:
    """The facts that the command prints; it must succeed and say nothing else."""
    # transformers says that it wrote the model
    capsys.readouterr()
    code = run(["fold", str(model), str(out), "--json", *map(str, options)])
    out_text, err = capsys.readouterr()
    assert (code, err) == (0, "")
    facts: dict[str, Any] = json.loads(out_text)
    return facts


def refuse(capsys: Capture, *arguments: object) -> str:
    """The one line that a refused command prints."""
    capsys.readouterr()
    assert run(["fold", *map(str, arguments)]) != 0
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    return err


def logits(folder: Path) -> torch.Tensor:
    return all_logits(make_plan(folder), [IDS], 7)[0]


@pytest.mark.parametrize(
    "options",
    [
        ("--all-exact",),
        ("--norms",),
        ("--first-layer", "--norms", "--biases"),
        ("--slim", "keys"),
        ("--slim", "inputs", "--norms"),
        ("--matshrink",),
        ("--zero", "--mlp-prefix"),
    ],
)
def test_what_is_written_gives_the_logits_of_transformers(
    capsys: Capture, make_llama: MakeLlama, tmp_path: Path, options: tuple[str, ...]
) -> None:
    folder, hf_model = make_llama(num_key_value_heads=4, attention_bias=True)
    facts = fold(capsys, folder, tmp_path / "out", *options)
    assert facts["nmse_float64"] < 1e-16 and facts["nmse_stored"] < 1e-9
    assert relative_error(logits(tmp_path / "out"), hf_logits(hf_model.double(), IDS)) < 1e-4


def test_report_says_what_files_hold(capsys: Capture, make_llama: MakeLlama, tmp_path: Path) -> None:
    folder, _ = make_llama()
    facts = fold(capsys, folder, tmp_path / "out", "--all-exact")
    stored = [load_file(path) for path in (tmp_path / "out").glob("*.safetensors")]
    values = sum(tensor.numel() for tensors in stored for tensor in tensors.values())
    before = sum(tensor.numel() for tensor in load_file(folder / "model.safetensors").values())
    assert (facts["num_weights"], facts["num_weights_before"]) == (values, before)
    assert sum(each["weight_bytes"] for each in facts["passes"]) == 4 * (before - values)
    # nine norms of 32
    assert before - values == 9 * 32
    manifest = json.loads((tmp_path / "out" / "pyruntime_manifest.json").read_text())
    assert [each["name"] for each in _find(manifest, "fold")["passes"]] == [each["name"] for each in facts["passes"]]


def _find(data: Any, key: str) -> Any:
    """The value under `key`, wherever it lies."""
    if isinstance(data, dict):
        return data[key] if key in data else next((f for each in data.values() if (f := _find(each, key))), None)
    return None


def test_gpt_neox_loses_its_layer_norms(capsys: Capture, tmp_path: Path) -> None:
    hf_model = make(VARIANTS["gpt_neox"], tmp_path / "model")
    fold(capsys, tmp_path / "model", tmp_path / "out", "--all-exact")
    spec = read_model(tmp_path / "out").spec
    norms = [each.pre for layer in spec.layers for _, each in layer.sublayers()] + [spec.final_norm]
    assert all(norm is not None and norm.kind == "rms" and not norm.weight and not norm.bias for norm in norms)
    assert relative_error(logits(tmp_path / "out"), hf_logits(hf_model.double(), IDS)) < 1e-4


def test_cache_of_a_token_halves(capsys: Capture, make_llama: MakeLlama, tmp_path: Path) -> None:
    folder, _ = make_llama(num_key_value_heads=4)
    facts = fold(capsys, folder, tmp_path / "out", "--slim", "inputs")
    # four layers, of 64 values each 32
    assert facts["passes"][0]["kv_bytes_per_token"] == 4 * 32 * 4
    attentions = [each for _, each in read_model(tmp_path / "out").spec.attentions()]
    assert all(isinstance(each, Attention) and each.cached is Cached.INPUTS for each in attentions)


def test_zero_sublayers_of_a_scaled_merge_go(capsys: Capture, make_llama: MakeLlama, tmp_path: Path) -> None:
    folder, _ = make_llama()
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    for name in ("model.layers.1.self_attn.o_proj.weight", "model.layers.3.mlp.down_proj.weight"):
        tensors[name] = torch.zeros_like(tensors[name])
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    facts = fold(capsys, model, tmp_path / "out", "--zero")
    assert facts["passes"][0]["removed"] == ["attention 1", "mlp 3"]
    assert relative_error(logits(tmp_path / "out"), logits(model)) < 1e-5


def test_dtype_is_what_is_stored_and_rounded_to(capsys: Capture, make_llama: MakeLlama, tmp_path: Path) -> None:
    folder, hf_model = make_llama()
    facts = fold(capsys, folder, tmp_path / "out", "--norms", "--dtype", "bfloat16")
    (tensors,) = (load_file(path) for path in (tmp_path / "out").glob("*.safetensors"))
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    gain = hf_model.model.layers[0].input_layernorm.weight.double()
    expected = hf_model.model.layers[0].self_attn.q_proj.weight.double() * gain
    assert torch.equal(tensors["layers.0.attention.q.weight"], expected.to(torch.bfloat16))
    assert 1e-9 < facts["nmse_stored"] < 5e-4 and facts["nmse_float64"] < 1e-16


def test_dry_run_writes_nothing(capsys: Capture, make_llama: MakeLlama, tmp_path: Path) -> None:
    facts = fold(capsys, make_llama()[0], tmp_path / "out", "--norms", "--dry-run")
    assert "path" not in facts and list(tmp_path.iterdir()) == []


def test_table_for_people_names_every_rewrite_and_note(capsys: Capture, make_llama: MakeLlama, tmp_path: Path) -> None:
    folder, _ = make_llama()
    capsys.readouterr()
    assert run(["fold", str(folder), str(tmp_path / "out"), "--all-exact"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    for text in ("fold norms", "288", "1,152", "the stream has no LayerNorm", "in float64", "wrote "):
        assert text in out


@pytest.mark.parametrize(
    "options, text",
    [
        ((), "error[FOLD]: no rewrite is named"),
        (("--slim", "values"), "error[FOLD]: --slim is 'values'; expected keys or inputs"),
        (("--norms", "--dtype", "float64"), "error[DTYPE]: dtype 'float64' cannot be stored"),
        (("--norms", "--dtype", "bfloat16", "--gate", "1e-12"), "error[NUMERICS]: with weights in bfloat16"),
    ],
)
def test_refusals_are_one_line(
    capsys: Capture, make_llama: MakeLlama, tmp_path: Path, options: tuple[str, ...], text: str
) -> None:
    assert text in refuse(capsys, make_llama()[0], tmp_path / "out", *options)
    assert list(tmp_path.iterdir()) == []


def test_force_passes_the_gate_and_the_manifest_says_so(capsys: Capture, make_llama: MakeLlama, tmp_path: Path) -> None:
    options = ("--norms", "--dtype", "bfloat16", "--gate", "1e-12", "--force")
    fold(capsys, make_llama()[0], tmp_path / "out", *options)
    manifest = json.loads((tmp_path / "out" / "pyruntime_manifest.json").read_text())
    assert _find(manifest, "fold")["forced"] is True


def test_folded_model_with_its_tokenizer_generates_the_same_text(
    capsys: Capture, text_model: tuple[Path, Any], tmp_path: Path
) -> None:
    fold(capsys, text_model[0], tmp_path / "out", "--all-exact", "--first-layer")
    texts = []
    for folder in (text_model[0], tmp_path / "out"):
        texts.append(LLM(str(folder)).generate("the cat")[0].outputs[0].text)
    assert texts[0] == texts[1]


def test_half_precision_of_a_real_shape_stays_within_a_rounding(
    capsys: Capture, make_llama: MakeLlama, tmp_path: Path
) -> None:
    folder, hf_model = make_llama(num_key_value_heads=4)
    fold(capsys, folder, tmp_path / "out", "--all-exact", "--slim", "inputs", "--dtype", "bfloat16")
    found = all_logits(make_plan(tmp_path / "out", dtype="bfloat16"), [IDS], 7)[0]
    assert nmse(found, hf_logits(hf_model.double(), IDS)) < 5e-4
    assert math.isfinite(float(found.sum()))


def normed_model(folder: Path) -> Path:
    """A model whose queries, keys and values are normed: no family of a checkpoint has them all."""
    spec = model_of([(folds.NORMED, folds.MLP_, False)] * 2)
    write_native(random_model(spec, torch.float32), folder)
    return folder


@pytest.mark.parametrize("dtype, cancelled", [("bfloat16", True), ("float32", False)])
def test_norms_are_cancelled_where_the_dtype_hides_eps(
    capsys: Capture, tmp_path: Path, dtype: str, cancelled: bool
) -> None:
    model = normed_model(tmp_path / "model")
    facts = fold(capsys, model, tmp_path / "out", "--cancel-norms", "--dtype", dtype)
    assert len(facts["passes"][0]["rewritten"]) == (2 if cancelled else 0)
    pres = [each.pre for _, each in read_model(tmp_path / "out").spec.attentions()]
    assert (pres == [None, None]) is cancelled
    assert any("eps would change normed values by" in note for note in facts["passes"][0]["notes"]) is not cancelled
    # what eps changes shows in float64, and is far below what the dtype rounds
    assert facts["nmse_float64"] < 1e-8 and facts["nmse_stored"] < 5e-4
