"""What a user sees when something is wrong: one line on standard error, nothing else, and the right exit code."""

from __future__ import annotations

import io
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pyruntime.bench import ceilings
from pyruntime.cli.main import run
from pyruntime.engine.engine import Engine

TextModel = tuple[Path, Any]
Capture = pytest.CaptureFixture[str]


def fail(capsys: Capture, *arguments: object) -> tuple[int, str]:
    """Exit code and the one line of a command that must fail, printing nothing but that line."""
    code = run([str(each) for each in arguments])
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error[")
    assert err.count("\n") == 1
    return code, err


USAGE: dict[str, tuple[list[object], str]] = {
    "no prompt": (["generate", "MODEL"], "PROMPT]: no prompt was given"),
    "empty prompt": (["generate", "MODEL", ""], "PROMPT]: the prompt is empty"),
    "too long": (["generate", "MODEL", "the cat " * 64], "PROMPT]: the prompt has"),
    "parameter": (["generate", "MODEL", "a", "--top-p", 2], "PARAMS]: top_p is 2.0; expected"),
    "dtype": (["generate", "MODEL", "a", "--dtype", "int4"], "DTYPE]: dtype 'int4'"),
    "target": (["generate", "MODEL", "a", "--target", "tpu"], "TARGET]: target 'tpu'"),
    "device": (["generate", "MODEL", "a", "--device", "abacus"], "DEVICE]: device 'abacus' cannot be used here"),
    "device of chat": (["chat", "MODEL", "--device", "abacus"], "DEVICE]: device 'abacus'"),
    "device of bench": (["bench", "latency", "MODEL", "--device", "abacus"], "DEVICE]: device 'abacus'"),
    "context": (["generate", "MODEL", "a", "--max-model-len", 65], "CONFIG]: max_model_len is 65"),
    "layer": (["inspect", "MODEL", "--drop-attn", "4"], "DROP]: layer 4 does not exist"),
    "layer text": (["bench", "latency", "MODEL", "--drop-mlp", "x"], "DROP]: 'x' names no layers"),
    "plan file": (["inspect", "MODEL", "--drop-plan", "no-such.json"], "DROP_PLAN]: no-such.json"),
    "inspect dtype": (["inspect", "MODEL", "--dtype", "x"], "DTYPE]: dtype 'x'"),
    "no folder": (["inspect", "/no/such/folder"], "MODEL]: '/no/such/folder' is no folder"),
    "unknown option": (["inspect", "MODEL", "--nonsense"], "USAGE]: No such option: --nonsense"),
    "unknown command": (["nonsense"], "USAGE]: No such command 'nonsense'"),
    "no model": (["inspect"], "USAGE]: Missing"),
    "not a number": (["generate", "MODEL", "a", "--max-tokens", "many"], "USAGE]: Invalid value for '--max-tokens'"),
    "bench too long": (["bench", "latency", "MODEL", "--input-len", 60, "--output-len", 5], "60 and output_len 5"),
    "prefill backwards": (["bench", "forward", "MODEL", "-p", -3], "prompt_len is -3; expected 0 to 64"),
    "prefill too long": (["bench", "forward", "MODEL", "-p", "4,65"], "prompt_len is 65; expected 0 to 64; the model"),
    "prefill of text": (["bench", "forward", "MODEL", "-p", "4,x"], "--prompt-len has 'x'; expected whole numbers"),
    "prefill of no text": (["bench", "forward", "MODEL", "-p", "4,"], "--prompt-len has ''"),
    "nothing to measure": (["bench", "forward", "MODEL", "-p", 0, "-n", 0], "nothing is left to measure"),
    "depth too long": (["bench", "forward", "MODEL", "-n", 2, "-d", 63, "-p", 4], "depth + n_gen is 65"),
    "depth backwards": (["bench", "forward", "MODEL", "-d", -1, "-p", 4], "depth is -1"),
    "new tokens backwards": (["bench", "forward", "MODEL", "-n", -1, "-p", 4], "n_gen is -1"),
    "batch of nothing": (["bench", "forward", "MODEL", "-b", "8,0", "-p", 4], "batch_size is 0; expected 1 to 4096"),
    "batch of text": (["bench", "forward", "MODEL", "-b", "1;8"], "--batch-size has '1;8'"),
    "bench of nothing": (["bench", "forward"], "MODEL]: neither MODEL nor --shape was given"),
    "bench of two": (["bench", "forward", "MODEL", "--shape", "x"], "MODEL]: both MODEL and --shape were given"),
    "shape": (["bench", "forward", "--shape", "x"], "SHAPE]: shape 'x' does not exist; expected one of llama-2-13b"),
    "shape dtype": (["bench", "forward", "--shape", "smollm2-135m", "--dtype", "int4"], "DTYPE]: dtype 'int4'"),
    "shape layer": (["bench", "forward", "--shape", "smollm2-135m", "--drop-attn", "30"], "DROP]: layer 30 does not"),
    "output": (["bench", "forward", "MODEL", "-o", "xml"], "USAGE]: Invalid value for '-o'"),
}


@pytest.mark.parametrize("what", USAGE)
def test_wrong_usage_exits_with_2(capsys: Capture, text_model: TextModel, what: str) -> None:
    arguments, said = USAGE[what]
    code, line = fail(capsys, *(text_model[0] if each == "MODEL" else each for each in arguments))
    assert code == 2
    assert said in line


@pytest.mark.parametrize("arguments", [["bench"], []])
def test_a_command_without_its_sub_command_shows_help(capsys: Capture, arguments: list[str]) -> None:
    assert run(arguments) == 2
    out, err = capsys.readouterr()
    assert "Usage: " in out + err
    assert "error[" not in err


def test_text_that_is_no_unicode_exits_with_2(
    capsys: Capture, text_model: TextModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    # as Python decodes an argument that is not UTF-8
    code, line = fail(capsys, "generate", text_model[0], "a\udcff")
    assert (code, "TEXT]" in line) == (2, True)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a\xff"), encoding="utf-8"))
    code, line = fail(capsys, "generate", text_model[0], "-")
    assert (code, "TEXT]" in line) == (2, True)


def test_chat_without_a_template_exits_with_2(capsys: Capture, text_model: TextModel, tmp_path: Path) -> None:
    folder = shutil.copytree(text_model[0], tmp_path / "m")
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    code, line = fail(capsys, "chat", folder)
    assert code == 2
    assert "no chat template" in line


def cut_weights(folder: Path) -> None:
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(5000)


def garble_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def garble_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")


def lose_a_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.2.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("harm", [cut_weights, garble_config, garble_tokenizer, lose_a_weight])
def test_a_bad_checkpoint_exits_with_3(
    capsys: Capture, text_model: TextModel, tmp_path: Path, harm: Callable[[Path], None]
) -> None:
    folder = shutil.copytree(text_model[0], tmp_path / "m")
    harm(folder)
    code, line = fail(capsys, "generate", folder, "the cat")
    assert code == 3, line


def poison(folder: Path, target: Path) -> Path:
    """A copy of finite weights whose logits are NaN for whatever prompt: infinities of both signs meet."""
    shutil.copytree(folder, target)
    weights = load_file(target / "model.safetensors")
    for name in ("up", "down"):
        weights[f"model.layers.1.mlp.{name}_proj.weight"].mul_(torch.finfo(torch.float32).max / 4)
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.mark.parametrize("texts", [["the cat"], ["the cat", "once"]])
def test_numbers_that_are_none_exit_with_4(
    capsys: Capture, text_model: TextModel, tmp_path: Path, texts: list[str]
) -> None:
    folder = poison(text_model[0], tmp_path / "m")
    assert run(["generate", str(folder), *texts]) == 4
    err = capsys.readouterr().err
    assert err.count("error[NUMERICS]") == err.count("\n") == len(texts)
    assert "NaN" in err


@pytest.mark.parametrize("command", ["latency", "throughput", "forward"])
def test_no_time_is_printed_for_wrong_numbers(
    capsys: Capture, text_model: TextModel, tmp_path: Path, command: str
) -> None:
    folder = poison(text_model[0], tmp_path / "m")
    sizes = ["-p", 4, "-d", 4] if command == "forward" else ["--input-len", 4, "--output-len", 3]
    for flags in ([], ["--json"]):
        code, line = fail(capsys, "bench", command, folder, *sizes, *flags, "--output-json", tmp_path / "out.json")
        assert code == 4
        assert "NUMERICS" in line
    assert not (tmp_path / "out.json").exists()


@pytest.mark.parametrize("command", ["latency", "throughput", "forward"])
@pytest.mark.parametrize("place", ["no/out.json", "file/out.json", "/proc/out.json", "/dev/null"])
def test_a_file_that_cannot_be_written_exits_with_5_before_anything_is_read(
    capsys: Capture, tmp_path: Path, command: str, place: str
) -> None:
    (tmp_path / "file").write_text("")
    # no such model either: the path is looked at first
    code, line = fail(capsys, "bench", command, tmp_path / "no-model", "--output-json", tmp_path / place)
    assert code == 5
    assert line.startswith(f"error[IO]: cannot write {tmp_path / place}: ")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


@pytest.mark.parametrize("texts", [["the cat"], ["the cat", "once"]])
def test_ctrl_c_exits_with_130(
    capsys: Capture, text_model: TextModel, monkeypatch: pytest.MonkeyPatch, texts: list[str]
) -> None:
    honest, calls = Engine.step, 0

    def step(engine: Engine) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return honest(engine)

    monkeypatch.setattr(Engine, "step", step)
    assert run(["generate", str(text_model[0]), *texts]) == 130
    out, err = capsys.readouterr()
    # what was there is shown
    assert all(text in out for text in texts)
    assert "Traceback" not in err


def test_a_defect_is_called_one_and_exits_with_70(
    capsys: Capture, text_model: TextModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(engine: Engine) -> Any:
        raise ZeroDivisionError("so it goes")

    monkeypatch.setattr(Engine, "step", broken)
    code, line = fail(capsys, "generate", text_model[0], "the cat")
    assert code == 70
    assert "error[BUG]: ZeroDivisionError: so it goes" in line


def test_no_memory_exits_with_7(capsys: Capture, text_model: TextModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyruntime.engine.memory.available_memory", lambda: 10_000)
    code, line = fail(capsys, "generate", text_model[0], "the cat")
    assert code == 7
    assert "error[MEMORY]: loading" in line


@pytest.mark.parametrize(
    "what", [["--shape", "llama-2-7b"], ["MODEL", "-b", 4096, "-n", 60, "-p", 0]], ids=["shape", "cache"]
)
def test_a_benchmark_that_does_not_fit_exits_with_7(
    capsys: Capture, text_model: TextModel, monkeypatch: pytest.MonkeyPatch, what: list[object]
) -> None:
    # four attentions keep 512 bytes a token, so 4096 sequences of 64 need 128 MiB
    monkeypatch.setattr("pyruntime.engine.memory.available_memory", lambda: 127 << 20)
    monkeypatch.setattr(ceilings, "_BUFFER_BYTES", 1 << 21)
    code, line = fail(capsys, "bench", "forward", *(text_model[0] if each == "MODEL" else each for each in what))
    assert code == 7
    assert "error[MEMORY]: a " in line


def test_a_bad_variable_exits_with_2(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYRUNTIME_LOGGING_LEVEL", "loud")
    code, line = fail(capsys, "collect-env")
    assert code == 2
    assert "PYRUNTIME_LOGGING_LEVEL is 'loud'" in line
