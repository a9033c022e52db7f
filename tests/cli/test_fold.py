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
from pyruntime.checkpoint import Model, read_model
from pyruntime.checkpoint.writer import write_native
from pyruntime.cli import folding
from pyruntime.cli.main import run
from pyruntime.engine import memory
from pyruntime.passes.fold import fold_norms
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


def test_inspect_says_what_was_rewritten_and_who_reads_it(
    capsys: Capture, make_llama: MakeLlama, tmp_path: Path
) -> None:
    folder, _ = make_llama(num_key_value_heads=4)
    fold(capsys, folder, tmp_path / "out", "--slim", "keys", "--first-layer")
    assert run(["inspect", str(tmp_path / "out")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "table               attention 0: a row of q, k, v for each token" in lines
    assert "slim cache          keys only, 3 attentions" in lines
    assert any(line.startswith("written as pyruntime") for line in lines)
    assert any(line.startswith("exact in: pyruntime") for line in lines)
    assert run(["inspect", str(folder)]) == 0
    out = capsys.readouterr().out
    assert not any(text in out for text in ("written as", "exact in", "slim cache", "table  "))


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
    (forced,) = _find(manifest, "fold")["forced"]
    assert forced.startswith("logits: NMSE ") and forced.endswith("at most 1e-12")


def test_force_that_forced_nothing_is_not_recorded(capsys: Capture, make_llama: MakeLlama, tmp_path: Path) -> None:
    facts = fold(capsys, make_llama()[0], tmp_path / "out", "--norms", "--force")
    assert facts["forced"] == [] and [each["forced"] for each in facts["passes"]] == [[], []]


def ill_conditioned(folder: Path, condition: float) -> Path:
    """A multi-head model whose first W_K has this condition number."""
    model = random_model(model_of([(folds.MULTI_HEAD, folds.MLP_, False)] * 2), torch.float32)

    def change(name: str, each: torch.Tensor) -> torch.Tensor:
        if not name.endswith("k.weight"):
            return each
        u, _, v = torch.linalg.svd(each.double())
        top = condition if name.startswith("layers.0.") else 1.0
        values = torch.logspace(0, -math.log10(top), len(u), dtype=torch.float64)
        found: torch.Tensor = (u * values) @ v
        return found.float()

    write_native(folds.changed(model, change), folder)
    return folder


def test_what_was_forced_is_recorded_for_each_pass(capsys: Capture, tmp_path: Path) -> None:
    model = ill_conditioned(tmp_path / "model", 3e6)
    facts = fold(capsys, model, tmp_path / "out", "--slim", "keys", "--force")
    (slimmed,) = facts["passes"]
    assert slimmed["forced"] == ["attention 0"] and len(slimmed["rewritten"]) == 2
    assert facts["forced"][0] == "slim attention (keys): attention 0"
    manifest = json.loads((tmp_path / "out" / "pyruntime_manifest.json").read_text())
    assert _find(manifest, "fold")["forced"] == facts["forced"]


def test_forced_inverse_is_held_to_the_limit_of_the_gate(capsys: Capture, tmp_path: Path) -> None:
    """Float64 loses what the inverse multiplies: more than 1e-16, which nothing that is exact may lose."""
    model = ill_conditioned(tmp_path / "model", 1e9)
    options = ("--slim", "keys", "--force")
    facts = fold(capsys, model, tmp_path / "out", *options, "--gate", "1e-3")
    assert 1e-16 < facts["nmse_float64"] < 1e-3
    error = refuse(capsys, model, tmp_path / "other", *options, "--gate", "1e-16")
    assert "in float64, at most 1e-16; leave out --force" in error


def test_defect_of_a_rewrite_is_found_below_the_gate(
    capsys: Capture, make_llama: MakeLlama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(model: Model) -> Model:
        return folds.changed(fold_norms(model), lambda name, each: each * (1 + 1e-6 * name.endswith("o.weight")))

    monkeypatch.setattr(folding, "fold_norms", wrong)
    error = refuse(capsys, make_llama()[0], tmp_path / "out", "--norms")
    assert "error[NUMERICS]" in error and "in float64, at most 1e-16; rewrite less" in error


@pytest.mark.parametrize("options", [("--zero", "--mlp-prefix"), ("--slim", "keys"), ("--slim", "keys", "--dry-run")])
def test_copy_is_no_rewrite(capsys: Capture, make_llama: MakeLlama, tmp_path: Path, options: tuple[str, ...]) -> None:
    error = refuse(capsys, make_llama()[0], tmp_path / "out", *options)
    assert error.startswith("error[FOLD]: nothing is rewritten (")
    # two key-value heads of eight, read from 32
    assert ("W_K is 16x32" if "--slim" in options else "the prefix ends before attention 0") in error
    assert list(tmp_path.iterdir()) == []
    # another dtype is no copy
    narrow = fold(capsys, make_llama()[0], tmp_path / "out", *options, "--dtype", "bfloat16")
    # rounding to eight bits: a relative error up to 2^-9 of each weight
    assert narrow["nmse_stored"] == 0.0 and 1e-7 < narrow["nmse_dtype"] < 1e-3


def test_narrowing_is_no_fault_of_the_rewrite(capsys: Capture, make_llama: MakeLlama, tmp_path: Path) -> None:
    """The gate lets an exact rewrite pass that is far below what the dtype alone does."""
    narrow = ("--slim", "inputs", "--dtype", "bfloat16", "--gate", "1e-20")
    facts = fold(capsys, make_llama(num_key_value_heads=4)[0], tmp_path / "out", *narrow)
    assert facts["nmse_stored"] < 1e-20 < 1e-7 < facts["nmse_dtype"]


def test_target_is_judged_before_the_work(
    capsys: Capture, make_llama: MakeLlama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = make_llama()
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(folding, "rewrite", None)
    assert "error[OUTPUT]" in refuse(capsys, folder, tmp_path / "out", "--norms")
    assert "error[OUTPUT]" in refuse(capsys, folder, folder / "out", "--norms")


def test_every_rewrite_is_made_once(
    capsys: Capture, make_llama: MakeLlama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def counted(model: Model) -> Model:
        calls.append(model)
        return fold_norms(model)

    monkeypatch.setattr(folding, "fold_norms", counted)
    fold(capsys, make_llama()[0], tmp_path / "out", "--norms")
    assert len(calls) == 1


def test_without_room_nothing_is_begun(
    capsys: Capture, make_llama: MakeLlama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = make_llama()
    model = read_model(folder)
    # the weights fit as they are stored; a table in float64, with what it is made of, does not
    most = max(each.num_bytes for each in model.weights.values())
    for module in (folding, memory):
        monkeypatch.setattr(module, "available_memory", lambda: model.weight_bytes + most)
    monkeypatch.setattr(folding, "_logits", None)
    error = refuse(capsys, folder, tmp_path / "out", "--first-layer")
    assert error.startswith("error[MEMORY]: the check of the rewrites in float32 needs ")
    # what runs the model to see what its attentions read needs room before
    for module in (folding, memory):
        monkeypatch.setattr(module, "available_memory", lambda: model.weight_bytes - 1)
    monkeypatch.setattr(folding, "attention_streams", None)
    assert refuse(capsys, folder, tmp_path / "out", "--cancel-norms").startswith("error[MEMORY]")


def test_large_models_are_checked_in_float32_where_that_fits(
    capsys: Capture, make_llama: MakeLlama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folding, "_SMALL", 1)
    facts = fold(capsys, make_llama()[0], tmp_path / "out", "--norms", "--dtype", "bfloat16")
    assert (facts["nmse_float64"], facts["checked_in"]) == (None, "float32")
    assert 1e-9 < facts["nmse_stored"] < 5e-4
    monkeypatch.setattr(folding, "available_memory", lambda: 1)
    facts = fold(capsys, make_llama()[0], tmp_path / "other", "--norms", "--dtype", "bfloat16")
    assert (facts["nmse_dtype"], facts["checked_in"]) == (None, "bfloat16")


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
    facts = fold(capsys, model, tmp_path / "out", "--cancel-norms", "--norms", "--dtype", dtype)
    assert len(facts["passes"][0]["rewritten"]) == (2 if cancelled else 0)
    pres = [each.pre for _, each in read_model(tmp_path / "out").spec.attentions()]
    assert (pres == [None, None]) is cancelled
    assert any("eps would change normed values by" in note for note in facts["passes"][0]["notes"]) is not cancelled
    # what eps changes shows in float64, and is far below what the dtype rounds
    assert facts["nmse_float64"] < 1e-8 and facts["nmse_stored"] < 5e-4
