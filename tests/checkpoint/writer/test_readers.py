"""Who reads a written folder as the pruned model: what its manifest says, and an imitation of LLM-Drop's classes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from pyruntime.checkpoint.manifest import MANIFEST
from pyruntime.checkpoint.writer import about, write_native, write_pruned
from pyruntime.checkpoint.writer.dialects import WriteDialect, exact_in
from pyruntime.cli.main import run
from pyruntime.spec import DropPlan
from tests import families
from tests.checkpoint.craft import reconfigure
from tests.families import VARIANTS, Variant
from tests.helpers import all_logits, make_plan, relative_error
from tests.specs import ATTENTION, PLAIN_MLP, model_of, random_model

PLAN = DropPlan(attention=(1, 2), mlp=(0, 2))
PROMPT = [(7 * i * i + 3 * i) % 61 for i in range(23)]
LLAMA = Variant("Llama", {"num_key_value_heads": 2, "rope_parameters": {"rope_type": "default", "rope_theta": 777.0}})


class NoAttention(torch.nn.Module):
    """An attention that is not there: the layer's residual alone goes on."""

    def forward(self, hidden_states: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None]:
        return torch.zeros_like(hidden_states), None


class NoMlp(torch.nn.Module):
    """An MLP that is not there."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(hidden_states)


def as_llm_drop_reads(folder: Path) -> Any:
    """A Llama as LLM-Drop's class builds it: keys of releases before `rope_parameters`, dropped modules not built.

    Its configuration turns lists of bools into ids; all weights must be there, and no others.
    """
    config = json.loads((folder / "config.json").read_text())
    lists = {}
    for key in ("drop_attn_list", "drop_mlp_list"):
        said = config[key]
        lists[key] = [i for i, gone in enumerate(said) if gone] if said and type(said[0]) is bool else said
    sizes = {
        key: config[key]
        for key in (
            "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings",
        )
    }  # fmt: skip
    rope = {"rope_type": "default", "rope_theta": config.get("rope_theta", 10000.0)}
    model: Any = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, rope_parameters=rope))
    model.eval()
    for index, layer in enumerate(model.model.layers):
        if index in lists["drop_attn_list"]:
            layer.self_attn, layer.input_layernorm = NoAttention(), torch.nn.Identity()
        if index in lists["drop_mlp_list"]:
            layer.mlp, layer.post_attention_layernorm = NoMlp(), torch.nn.Identity()
    model.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
    return model


def test_llm_drop_reads_the_lists_the_kept_tensors_and_the_rope(tmp_path: Path) -> None:
    hf_model = families.make(LLAMA, tmp_path / "source")
    write_pruned(tmp_path / "source", PLAN, tmp_path / "out", dialect="llm-drop")
    (ours,) = all_logits(make_plan(tmp_path / "out"), [PROMPT], 64)
    model = as_llm_drop_reads(tmp_path / "out")
    with torch.no_grad():
        found = model(torch.tensor([PROMPT]), use_cache=False).logits[0]
        expected = families.without(LLAMA, hf_model, PLAN)(torch.tensor([PROMPT]), use_cache=False).logits[0]
    assert relative_error(found, expected) < 1e-5
    assert relative_error(ours, expected) < 1e-5


def said(folder: Path) -> Mapping[str, Any]:
    made: Mapping[str, Any] = json.loads((folder / MANIFEST).read_text())["made"]
    return made


BOTH, OURS = ["pyruntime", "LLM-Drop"], ["pyruntime"]
LINEAR_ROPE = {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}
MLPS = DropPlan(mlp=(0, 2))


@pytest.mark.parametrize(
    "name, keys, plan, dialect, exact",
    [
        ("mistral", {}, PLAN, "llm-drop", BOTH),
        ("mistral, old keys", {}, PLAN, "llm-drop", BOTH),
        ("mistral, old keys", {"rope_scaling": {"type": "linear", "factor": 2.0}}, PLAN, "llm-drop", BOTH),
        # Llama 3.1's rope, and layers that differ, are not known to its classes
        ("mistral", {"rope_parameters": LINEAR_ROPE}, PLAN, "llm-drop", OURS),
        ("mistral", {"per_layer_config": {"3": {"sliding_window": 7}}}, PLAN, "llm-drop", OURS),
        ("phi3", {}, PLAN, "llm-drop", OURS),
        # nobody counts the tokens without a cache
        ("mistral", {}, DropPlan(attention=(0, 1, 2, 3)), "llm-drop", OURS),
        ("mistral", {}, DropPlan(attention=(0, 1, 2)), "llm-drop", BOTH),
        ("mistral", {"drop_attn_list": [0, 3]}, PLAN, "llm-drop", OURS),
        # its Gemma 2 chooses windows by the place in the cache
        ("gemma2", {}, PLAN, "llm-drop", OURS),
        ("gemma2", {}, MLPS, "llm-drop", BOTH),
        ("gemma2", {"drop_attn_list": [0]}, MLPS, "llm-drop", OURS),
        # the lists are there, and so must be the rope where it looks for it
        ("mistral", {}, PLAN, "hf", OURS),
        ("mistral, old keys", {}, PLAN, "hf", BOTH),
        ("mistral", {"rope_theta": 10000.0, "rope_parameters": ...}, PLAN, "hf", BOTH),
        ("phi3", {}, PLAN, "hf", OURS),
        ("gemma2", {}, PLAN, "zeros", ["every reader of the unpruned model"]),
    ],
)
def test_the_manifest_says_whether_llm_drop_is_exact(
    name: str, keys: dict[str, Any], plan: DropPlan, dialect: str, exact: list[str], tmp_path: Path
) -> None:
    families.make(VARIANTS[name], tmp_path / "source")
    reconfigure(tmp_path / "source", **keys)
    write_pruned(tmp_path / "source", plan, tmp_path / "out", dialect=dialect)
    assert said(tmp_path / "out")["exact_in"] == exact


@pytest.mark.parametrize("model_type", ["baichuan", "deepseek"])
def test_llm_drop_cannot_generate_where_it_forgets_a_variable(model_type: str) -> None:
    config = {"model_type": model_type, "num_hidden_layers": 4}
    assert exact_in(WriteDialect.LLM_DROP, config, MLPS) == tuple(BOTH)
    assert exact_in(WriteDialect.LLM_DROP, config, DropPlan(attention=(1,))) == tuple(OURS)


def test_verify_says_what_a_folder_is_and_for_whom(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = random_model(model_of([(ATTENTION, PLAIN_MLP, False)]))
    write_native(model, tmp_path / "native", dtype="float32")
    write_pruned(tmp_path / "native", DropPlan(mlp=(0,)), tmp_path / "hf")
    write_pruned(tmp_path / "native", DropPlan(mlp=(0,)), tmp_path / "zeros", dialect="zeros")
    words = {
        "native": ["written as pyruntime", "exact in: pyruntime (docs"],
        "hf": ["written as hf from native", "exact in: pyruntime (docs"],
        "zeros": ["written as zeros from native", "exact in: every reader of the unpruned model (docs"],
    }
    for name, lines in words.items():
        assert run(["verify", str(tmp_path / name)]) == 0
        out = capsys.readouterr().out
        assert all(line in out for line in lines), out


def test_a_manifest_of_somebody_else_says_nothing_or_one_line(tmp_path: Path) -> None:
    assert about(tmp_path) == ()
    bad: list[Any] = [None, [], {}, {"format": 5, "exact_in": "x"}, {"format": "", "exact_in": [1]}, {"from": []}]
    for made in bad:
        (tmp_path / MANIFEST).write_text(json.dumps({"made": made}))
        assert about(tmp_path) == ()
    (tmp_path / MANIFEST).write_text(json.dumps({"made": {"format": "\x1b[2J" * 99, "from": {"name": "a\nb"}}}))
    (line,) = about(tmp_path)
    assert line.isprintable() and len(line) < 400
