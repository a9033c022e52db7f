"""What `inspect` says of pruned checkpoints: which key says what is gone, what differs, what looks wrong."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pyruntime.bench import describe, summary
from pyruntime.checkpoint import Model, read_model
from pyruntime.cli.inspect import inspect
from pyruntime.engine.load import DropOptions, read_pruned
from pyruntime.passes import drop
from pyruntime.spec import Cached, DropPlan
from tests import specs
from tests.checkpoint.dialects.tiny import LINEAR, attention, config_of, hf_name, mlp, spec_of, write


def facts_of(model: Model) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads(json.dumps(summary(model, 4, 1, 10)))
    return facts


def lines_of(model: Model) -> list[str]:
    lines = describe(model, summary(model, 4, 1, 10))
    assert all(line.isprintable() for line in lines)
    return lines


def starting(model: Model, start: str) -> list[str]:
    return [line.removeprefix(start).strip() for line in lines_of(model) if line.startswith(start)]


def test_each_key_that_says_something_has_a_line(tmp_path: Path) -> None:
    config = config_of(
        4,
        drop_attn_list=[3, 1],
        drop_mlp_list=[2],
        per_layer_config={"0": {"skip": ["mlp"]}, "2": {"intermediate_size": 24}},
        num_key_value_heads=[4, 2, 4, 4],
    )
    spec = spec_of((attention(4), None), (None, mlp(256)), (attention(4), None), (None, mlp(256)))
    model = drop(read_model(write(tmp_path / "m", config, spec)), DropPlan((2,), (1,), "asked for"))
    said = [
        "per_layer_config: MLP 0; intermediate_size by layer",
        "drop_attn_list: attention 1, 3",
        "drop_mlp_list: MLP 2",
        "num_key_value_heads: num_key_value_heads by layer",
        "drop (asked for): attention 2; MLP 1",
    ]
    assert starting(model, "said by ") == facts_of(model)["declared"] == said


def test_a_dense_model_has_nothing_to_explain(tmp_path: Path) -> None:
    spec = spec_of((attention(4), mlp(256)), (attention(4), mlp(256)))
    model = read_model(write(tmp_path / "m", config_of(2), spec))
    facts = facts_of(model)
    assert (facts["declared"], facts["sizes_by_layer"], facts["unread_bytes"], facts["linear"]) == ([], {}, 0, [])
    assert not any(starting(model, start) for start in ("said by", "differ by layer", "note", "pass"))
    assert starting(model, "gone") == ["nothing"]
    # blocks that all say the same are no difference either
    even = nas(*[({"n_heads_in_group": 2}, {"intermediate_size": 256})] * 2)
    assert facts_of(read_model(write(tmp_path / "n", even, spec)))["declared"] == []


def nas(*blocks: tuple[dict[str, Any], dict[str, Any]]) -> dict[str, Any]:
    entries = [{"attention": attn, "ffn": ffn} for attn, ffn in blocks]
    sizes = {"num_key_value_heads": None, "intermediate_size": None}
    return config_of(len(blocks), model_type="nemotron-nas", block_configs=entries, **sizes)


def test_sizes_that_differ_are_counted(tmp_path: Path) -> None:
    # heads of eight queries: groups of 2 and 8 leave 4 and 1 for keys and values
    config = nas(
        ({"n_heads_in_group": 2}, {"intermediate_size": 24}),
        ({"n_heads_in_group": 8}, {"intermediate_size": 24}),
        ({"n_heads_in_group": 2}, {"intermediate_size": 40}),
        ({"no_op": True}, {"intermediate_size": 24}),
    )
    spec = spec_of((attention(4), mlp(24)), (attention(1), mlp(24)), (attention(4), mlp(40)), (None, mlp(24)))
    model = read_model(write(tmp_path / "m", config, spec))
    assert facts_of(model)["sizes_by_layer"] == {"KV heads": [[4, 2], [1, 1]], "MLP widths": [[24, 3], [40, 1]]}
    assert starting(model, "differ by layer") == ["KV heads: 4 (x2), 1 (x1)", "MLP widths: 24 (x3), 40 (x1)"]
    assert "8 query / 1 to 4 key-value heads of 8" in lines_of(model)[0]
    assert "block_configs: no-op attention 3; intermediate_size, num_key_value_heads by layer" in model.declared


def test_no_saving_is_claimed_against_a_parent_of_unknown_shape(tmp_path: Path) -> None:
    config = nas(
        ({"replace_with_linear": True}, {"intermediate_size": 24}), ({"n_heads_in_group": 2}, {"intermediate_size": 24})
    )
    spec = spec_of((LINEAR, mlp(24)), (attention(4), mlp(24)))
    model = read_model(write(tmp_path / "m", config, spec))
    for found in (model, drop(model, DropPlan((0,), (), "asked for"))):
        facts = facts_of(found)
        against_dense = [key for key in facts if key.startswith(("dense_", "predicted_"))]
        assert len(against_dense) == 6
        assert all(facts[key] is None for key in against_dense)
        assert not any("saved)" in line or "dense" in line for line in lines_of(found) if not line.startswith("note"))
        assert any("parent" in note and "unknown" in note for note in starting(found, "note"))
    assert facts_of(model)["linear"] == ["attention 0"]
    assert "1 attention, 2 MLPs and 1 linear map of 2 layers" in starting(model, "kept")[0]
    # what was asked for is counted all the same: a map of 64 x 64 and a norm
    (report,) = facts_of(drop(model, DropPlan((0,))))["reports"]
    assert report["num_weights"] == 64 * 64 + 64


def test_weights_of_dropped_sublayers_in_the_files_are_counted(tmp_path: Path) -> None:
    whole = spec_of((attention(4), mlp(24)), (attention(4), mlp(24)))
    config = config_of(2, intermediate_size=24, drop_mlp_list=[1], tie_word_embeddings=True)
    stale = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    model = read_model(write(tmp_path / "m", config, whole, **stale))
    # three matrices of 24 x 64 and a norm, in four bytes
    assert facts_of(model)["unread_bytes"] == (3 * 24 * 64 + 64) * 4 == 18688
    assert "the files also hold 0.02 MB of dropped sublayers, which are not read" in starting(model, "note")
    # and what is dropped on top of that: two queries' and outputs' matrices, keys and values, a norm
    more = drop(model, DropPlan((0,), (), "asked for"))
    assert facts_of(more)["unread_bytes"] == 18688 + (2 * 64 * 64 + 2 * 32 * 64 + 64) * 4
    compact = spec_of((attention(4), mlp(24)), (attention(4), None))
    assert facts_of(read_model(write(tmp_path / "n", config, compact)))["unread_bytes"] == 0


def test_what_looks_wrong_is_a_note(tmp_path: Path) -> None:
    spec = spec_of((attention(4), mlp(256)), (None, mlp(256)))
    config = config_of(2, drop_attn_list=[1], per_layer_config={"0": {"skip": ["mlp"]}})
    folder = write(tmp_path / "Model-Drop2Attn", config, spec)
    notes = [note for note in starting(read_model(folder), "note") if note.startswith("looks wrong:")]
    assert len(notes) == 2
    both = "per_layer_config: MLP 0; drop_attn_list and drop_mlp_list: attention 1"
    assert any(f"differs ({both})" in note for note in notes)
    assert any("2 attentions" in note and "1 of attention and 1 of MLP" in note for note in notes)


def test_what_one_key_drops_and_another_never_built_may_complement_each_other(tmp_path: Path) -> None:
    spec = spec_of((attention(4), None), (None, mlp(256)))
    config = config_of(2, drop_attn_list=[1], layer_inter_size=[0, 256])
    assert read_model(write(tmp_path / "m", config, spec)).notes == ()


def test_nothing_is_predicted_of_a_model_without_sublayers(tmp_path: Path) -> None:
    spec = spec_of((attention(4), mlp(256)), (attention(4), mlp(256)))
    model = drop(read_model(write(tmp_path / "m", config_of(2), spec)), DropPlan((0, 1), (0, 1), "asked for"))
    facts = facts_of(model)
    assert facts["predicted_decode_speedup"] is facts["predicted_prefill_speedup"] is None
    (line,) = starting(model, "predicted")
    assert "no sublayer is left" in line
    assert "saved)" in starting(model, "weights")[0]


def test_inspect_says_each_note_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    spec = spec_of((attention(4), None), (attention(4), mlp(256)))
    config = config_of(2, drop_mlp_list=[0, 0, 0])
    folder = write(tmp_path / "m", config, spec)
    inspect(str(folder))
    out = capsys.readouterr()
    assert out.out.count("names a layer twice") == 1
    assert "names a layer twice" not in out.err + caplog.text
    # an engine shows no notes, so there they are logged
    read_pruned(folder, DropOptions())
    assert "names a layer twice" in caplog.text


def test_a_fused_tensor_of_a_dropped_sublayer_counts_once(tmp_path: Path) -> None:
    """Phi-3 keeps q, k and v in one tensor, and gate and up in another."""
    whole = spec_of((attention(4), mlp(24)), (attention(4), mlp(24)))
    keys = {"model_type": "phi3", "intermediate_size": 24, "drop_attn_list": [0], "pad_token_id": 0}
    folder = write(tmp_path / "m", config_of(2, **keys), whole)
    tensors = load_file(folder / "model.safetensors")
    for index in range(2):
        for parts, name in (("qkv", "self_attn.qkv_proj"), (("gate", "up"), "mlp.gate_up_proj")):
            kind = name.split(".")[0].replace("self_attn", "attention")
            names = [hf_name(f"layers.{index}.{kind}.{part}.weight") for part in parts]
            tensors[f"model.layers.{index}.{name}.weight"] = torch.cat([tensors.pop(each) for each in names])
    save_file(tensors, folder / "model.safetensors")
    # queries of 64, keys and values of 32 each, an output map and a norm
    assert read_model(folder).unread_bytes == (128 * 64 + 64 * 64 + 64) * 4


def test_rewritten_parts_have_a_line_each() -> None:
    merged = replace(specs.ATTENTION, q=None, o=None)
    spec = specs.model_of(
        [
            (replace(specs.ATTENTION, q=None, k=None, v=None, pre=None, table=True), specs.PLAIN_MLP, False),
            (merged, specs.PLAIN_MLP, False),
            (replace(merged, o=specs.tri(specs.D)), specs.PLAIN_MLP, False),
            (specs.pivoted(specs.ATTENTION), specs.PLAIN_MLP, False),
            (replace(specs.ATTENTION, cached=Cached.INPUTS), specs.PLAIN_MLP, False),
        ]
    )
    model = specs.random_model(spec)
    assert facts_of(model)["forms"] == {
        "merged away": "q of 2 attentions, o of 1 attention",
        "column map": "1 attention with columns of the input as q, k, v",
        "triangular": "1 map",
        "table": "attention 0: a row of q, k, v for each token",
        "slim cache": "inputs only, 1 attention",
    }
    assert starting(model, "merged away") == ["q of 2 attentions, o of 1 attention"]
    assert facts_of(specs.random_model(specs.model_of([(specs.ATTENTION, specs.PLAIN_MLP, False)])))["forms"] == {}
