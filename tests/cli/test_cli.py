"""Every command through `run`, its output against independent sums, its errors as one line and an exit code."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

import pyruntime
from pyruntime import DropPlan, env
from pyruntime.cli.main import run
from pyruntime.passes.drop import save_drop_plan
from tests.generation import byte_level_bpe, greedy
from tests.helpers import without

TextModel = tuple[Path, Any]
Capture = pytest.CaptureFixture[str]
DENSE = DropPlan()


def succeed(capsys: Capture, *arguments: object) -> str:
    """Standard output of a command that must succeed and say nothing on standard error."""
    code = run([str(each) for each in arguments])
    out, err = capsys.readouterr()
    assert (code, err) == (0, "")
    return out


def ids_and_text(model: TextModel, text: str, count: int, pattern: DropPlan = DENSE) -> tuple[list[int], str]:
    """Ids of `text`, and the text of the `count` tokens that transformers takes greedily, ended by </s>."""
    backend = byte_level_bpe(300)
    ids = backend.encode(text).ids
    new = greedy(without(model[1], pattern), ids, count)
    new = new[: new.index(1)] if 1 in new else new
    return ids, backend.decode([*ids, *new])[len(text) :]


# generate


def test_generate_prints_the_prompt_and_its_completion(capsys: Capture, text_model: TextModel) -> None:
    out = succeed(capsys, "generate", text_model[0], "the cat", "--max-tokens", 12, "--temperature", 0)
    assert out == f"the cat{ids_and_text(text_model, 'the cat', 12)[1]}\n"


def test_generate_reads_standard_input(capsys: Capture, text_model: TextModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("once upon\n"))
    # greedy and seven tokens are the model's own defaults
    out = succeed(capsys, "generate", text_model[0], "-")
    assert out == f"once upon{ids_and_text(text_model, 'once upon', 7)[1]}\n"


def test_generate_prints_several_prompts_in_order(capsys: Capture, text_model: TextModel) -> None:
    texts = ["the cat", "once", "a tab"]
    out = succeed(capsys, "generate", text_model[0], *texts, "--max-tokens", 5)
    assert out == "".join(f"{text}{ids_and_text(text_model, text, 5)[1]}\n\n" for text in texts)


def test_generate_prints_n_completions(capsys: Capture, text_model: TextModel) -> None:
    out = succeed(capsys, "generate", text_model[0], "the cat", "-n", 3, "--max-tokens", 5)
    # greedy: all three are the same
    assert out == f"the cat{ids_and_text(text_model, 'the cat', 5)[1]}\n\n" * 3


def test_generate_json_has_the_fields_of_vllm(capsys: Capture, text_model: TextModel) -> None:
    out = succeed(capsys, "generate", text_model[0], "the cat", "--json", "--logprobs", 2, "--max-tokens", 4)
    (found,) = json.loads(out)
    ids, text = ids_and_text(text_model, "the cat", 4)
    assert (found["prompt"], found["prompt_token_ids"], found["finished"]) == ("the cat", ids, True)
    (completion,) = found["outputs"]
    assert completion["text"] == text
    assert [len(each) for each in completion["logprobs"]] == [2] * len(completion["token_ids"])
    for token_id, logprobs in zip(completion["token_ids"], completion["logprobs"], strict=True):
        assert logprobs[str(token_id)]["rank"] == 1


def test_sampling_options_reach_the_engine(capsys: Capture, text_model: TextModel) -> None:
    hot = ["generate", text_model[0], "the cat", "--temperature", 2, "--max-tokens", 8, "--json"]

    def drawn(*more: object) -> list[int]:
        ids: list[int] = json.loads(succeed(capsys, *hot, *more))[0]["outputs"][0]["token_ids"]
        return ids

    assert drawn("--seed", 1) == drawn("--seed", 1) != drawn("--seed", 2)
    coldest = drawn("--temperature", 0)
    assert drawn("--seed", 1, "--top-k", 1) == drawn("--seed", 1, "--top-p", 0.000001) == coldest
    full = json.loads(succeed(capsys, *hot, "--temperature", 0))[0]["outputs"][0]["text"]
    stop = full[3]
    stopped = json.loads(succeed(capsys, *hot, "--temperature", 0, "--stop", stop))[0]["outputs"][0]
    assert stopped["text"] == full[: full.index(stop)]
    assert stopped["stop_reason"] == stop


@pytest.mark.parametrize("form", ["lists", "ranges", "file"])
def test_drop_flags_drop(capsys: Capture, text_model: TextModel, tmp_path: Path, form: str) -> None:
    pattern = DropPlan(attention=(0, 2, 3), mlp=(3,))
    save_drop_plan(pattern, tmp_path / "plan.json")
    flags: dict[str, Sequence[object]] = {
        "lists": ["--drop-attn", "0,2,3", "--drop-mlp", "last:1"],
        "ranges": ["--drop-attn", "0-2+2", "--drop-block", "3"],
        "file": ["--drop-plan", tmp_path / "plan.json"],
    }
    out = succeed(capsys, "generate", text_model[0], "the cat", "--max-tokens", 6, *flags[form])
    assert out == f"the cat{ids_and_text(text_model, 'the cat', 6, pattern)[1]}\n"


# inspect


def stored_sizes(folder: Path) -> dict[str, int]:
    """Number of values of every tensor, as the safetensors library reads the file."""
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name).numel() for name in file.keys()}  # noqa: SIM118 - no mapping


def test_inspect_json_equals_sums_over_the_file(capsys: Capture, text_model: TextModel) -> None:
    sizes = stored_sizes(text_model[0])
    gone = [f"layers.{index}.{part}" for index in (0, 2) for part in ("self_attn", "input_layernorm")]
    gone += ["layers.1.mlp", "layers.1.post_attention_layernorm"]
    kept = {name: size for name, size in sizes.items() if not any(part in name for part in gone)}
    found = json.loads(
        succeed(
            capsys, "inspect", text_model[0], "--drop-attn", "0,2", "--drop-mlp", "1", "--dtype", "bfloat16", "--json"
        )
    )
    assert (found["model_type"], found["n_layer"], found["max_position"]) == ("llama", 4, 64)
    assert (found["drop_attn_list"], found["drop_mlp_list"]) == ([0, 2], [1])
    assert (found["num_weights"], found["dense_num_weights"]) == (sum(kept.values()), sum(sizes.values()))
    assert (found["weight_bytes"], found["dense_weight_bytes"]) == (sum(kept.values()) * 2, sum(sizes.values()) * 2)
    # two key-value heads of eight, keys and values, two bytes
    assert (found["kv_bytes_per_token"], found["dense_kv_bytes_per_token"]) == (2 * 64, 4 * 64)
    assert found["plan_steps"] < found["dense_plan_steps"]
    assert found["predicted_decode_speedup"] > 1
    assert found["predicted_prefill_speedup"] > 1


def test_inspect_of_a_dense_model_predicts_nothing(capsys: Capture, text_model: TextModel) -> None:
    found = json.loads(succeed(capsys, "inspect", text_model[0], "--json"))
    assert found["predicted_decode_speedup"] == found["predicted_prefill_speedup"] == 1.0
    assert found["weight_bytes"] == sum(stored_sizes(text_model[0]).values()) * 4


def test_inspect_shows_what_is_gone(capsys: Capture, text_model: TextModel) -> None:
    out = succeed(capsys, "inspect", text_model[0], "--drop-attn", "last:2", "--drop-mlp", "0", "--graph")
    assert "attention   ##.." in out
    assert "mlp         .###" in out
    assert "attention 2, 3; MLP 0" in out
    assert "(50.0% saved)" in out


def test_inspect_reports_what_each_pass_did(capsys: Capture, text_model: TextModel, tmp_path: Path) -> None:
    folder = shutil.copytree(text_model[0], tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    # as LLM-Drop writes it: the second attention is gone before any pass
    (folder / "config.json").write_text(json.dumps({**config, "drop_attn_list": [2]}))
    command = ["inspect", folder, "--drop-attn", "2,3", "--drop-mlp", "0", "--dtype", "bfloat16"]
    (report,) = json.loads(succeed(capsys, *command, "--json"))["reports"]
    sizes = stored_sizes(folder)
    gone = ("layers.3.self_attn", "layers.3.input_layernorm", "layers.0.mlp", "layers.0.post_attention_layernorm")
    num_weights = sum(size for name, size in sizes.items() if any(part in name for part in gone))
    assert (report["name"], report["removed"]) == ("drop (asked for)", ["attention 3", "mlp 0"])
    assert (report["num_weights"], report["weight_bytes"]) == (num_weights, 2 * num_weights)
    assert (report["kv_bytes_per_token"], report["notes"]) == (64, ["attention 2 was gone already"])
    (line,) = (line for line in succeed(capsys, *command).splitlines() if line.startswith("pass "))
    assert "drop (asked for) removed 2 sublayers; saved " in line
    assert line.endswith("64 B of KV cache per token; attention 2 was gone already")
    assert json.loads(succeed(capsys, "inspect", folder, "--json"))["reports"] == []


# the rest


def test_version(capsys: Capture) -> None:
    assert succeed(capsys, "--version") == f"{pyruntime.__version__}\n"


def test_collect_env(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYRUNTIME_NUM_THREADS", "3")
    found = json.loads(succeed(capsys, "collect-env", "--json"))
    assert set(found["environment"]) == set(env.VARIABLES)
    assert found["environment"]["PYRUNTIME_NUM_THREADS"] == "3"
    assert found["machine"]["num_cores"] == len(os.sched_getaffinity(0))
    assert set(found["extensions"]) == {"_C", "_C_cuda"}
    assert "PYRUNTIME_NUM_THREADS" in succeed(capsys, "collect-env")


def test_help_names_every_command(capsys: Capture) -> None:
    out = succeed(capsys, "--help")
    for name in ("generate", "chat", "inspect", "bench", "collect-env"):
        assert f" {name} " in out


def test_chat_answers_and_remembers(capsys: Capture, text_model: TextModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("the\n\n/reset\nthe\na\n"))
    out = succeed(capsys, "chat", text_model[0], "--max-tokens", 4, "--temperature", 0)
    backend = byte_level_bpe(300)

    def answer(text: str) -> str:
        ids = backend.encode(text).ids
        new = greedy(text_model[1], ids, 4)
        whole = [*ids, *(new[: new.index(1)] if 1 in new else new)]
        return backend.decode(whole)[len(backend.decode(ids)) :]

    opening = "<s>user: the</s>assistant:"
    first = answer(opening)
    second = answer(f"<s>user: the</s><s>assistant: {first}</s><s>user: a</s>assistant:")
    assert out == f"> {first}\n> > > {first}\n> {second}\n> \n"


def test_a_real_process_prints_exits_and_fails_like_run(text_model: TextModel) -> None:
    def call(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "pyruntime", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)

    good = call("generate", text_model[0], "the cat", "--max-tokens", 4)
    assert (good.returncode, good.stderr) == (0, "")
    assert good.stdout == f"the cat{ids_and_text(text_model, 'the cat', 4)[1]}\n"
    bad = call("generate", text_model[0], "the cat", "--temperature", -1)
    assert (bad.returncode, bad.stdout) == (2, "")
    assert bad.stderr == "error[PARAMS]: temperature is -1.0; expected a number from 0 to 100\n"
