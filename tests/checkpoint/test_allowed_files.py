"""What of a checkpoint's files is allowed where the user or the operator says so, and what does not matter."""

from __future__ import annotations

import importlib
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pyruntime import LLM, CheckpointError, SamplingParams, UsageError, env
from pyruntime.checkpoint import header, read_model
from pyruntime.cli.main import run
from pyruntime.engine import load
from tests.checkpoint.craft import (
    SINGLE,
    pack,
    reconfigure,
    reheader,
    rewrite,
    split,
    watched_opens,
)
from tests.checkpoint.harm import UP, Q, append, many_tensors, overwrite


def test_too_many_tensors_are_refused_before_the_header_is_parsed(
    text_model: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """L02."""
    folder = shutil.copytree(text_model[0], tmp_path / "m")
    (folder / SINGLE).write_bytes(many_tensors())
    monkeypatch.setattr(header, "parse", lambda *_: pytest.fail("the header was parsed"))
    with pytest.raises(CheckpointError, match="100001 tensors"):
        read_model(folder)


@pytest.mark.parametrize("mark, text", [("{", "{}"), ("[", "[]"), (":", '"x":1'), (",", "1")])
def test_headers_of_more_values_than_tensors_need_are_refused_unparsed(
    text_model: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mark: str, text: str
) -> None:
    """L02: megabytes of brackets or numbers would take seconds and hundreds of megabytes to parse."""
    folder = shutil.copytree(text_model[0], tmp_path / "m")
    (folder / SINGLE).write_bytes(pack(('{"x":[' + ",".join([text] * 1_400_100) + "]}").encode()))
    monkeypatch.setattr(header, "parse", lambda *_: pytest.fail("the header was parsed"))
    with pytest.raises(CheckpointError, match=f"times '{re.escape(mark)}'") as caught:
        read_model(folder)
    assert caught.value.code == "HEADER_TOO_LARGE"


def test_the_operator_may_raise_the_cap_of_headers(
    text_model: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """L02."""
    folder = shutil.copytree(text_model[0], tmp_path / "m")
    reheader(folder, lambda text: text.ljust((16 << 20) + 1))
    with pytest.raises(CheckpointError, match="PYRUNTIME_MAX_HEADER_BYTES"):
        read_model(folder)
    monkeypatch.setenv("PYRUNTIME_MAX_HEADER_BYTES", str((16 << 20) + 1))
    assert read_model(folder).spec == read_model(text_model[0]).spec
    monkeypatch.setenv("PYRUNTIME_MAX_HEADER_BYTES", "100")
    with pytest.raises(CheckpointError, match="at most 100 are read"):
        read_model(text_model[0])


@pytest.mark.parametrize("ask", [env.max_header_bytes, env.num_threads])
@pytest.mark.parametrize("value", ["", "0", "-1", "100000001", "1e6", "16 MiB", "٣", "9" * 5000])
def test_a_variable_that_is_no_count_is_refused(
    monkeypatch: pytest.MonkeyPatch, ask: Callable[[], int | None], value: str
) -> None:
    for name in ("PYRUNTIME_MAX_HEADER_BYTES", "PYRUNTIME_NUM_THREADS"):
        monkeypatch.setenv(name, value)
    with pytest.raises(
        UsageError, match=f"PYRUNTIME_{ask.__name__.upper()} is .*; expected an integer from 1 to"
    ) as caught:
        ask()
    assert caught.value.code == "ENV" and len(str(caught.value)) < 200


def test_a_conversion_that_is_asked_for_is_done(text_model: tuple[Path, Any], tmp_path: Path) -> None:
    """L07: the dtype that the user names is the flag."""
    folder = shutil.copytree(text_model[0], tmp_path / "m")
    rewrite(folder, lambda each: each.update({Q: each[Q].bfloat16()}))
    reconfigure(folder, dtype="float16")
    assert any("float16" in note and "bfloat16" in note for note in read_model(folder).notes)
    assert run(["inspect", str(folder)]) == 0
    for dtype in ("float32", "bfloat16"):
        assert LLM(folder, dtype=dtype).plan.dtype is getattr(torch, dtype)
    # where the one tensor of another dtype is dropped, the others and config.json must agree
    reconfigure(folder, dtype="float32")
    llm = LLM(folder, drop_attn=[1])
    assert (llm.plan.dtype, llm.model.notes) == (torch.float32, ())
    (note,) = load.read_pruned(folder, load.DropOptions(drop_mlp=[1])).notes
    assert "bfloat16 (1, such as" in note
    reconfigure(folder, dtype=...)
    assert LLM(folder, drop_attn=[1]).plan.dtype is torch.float32


def test_a_hard_link_is_a_file_like_any_other(text_model: tuple[Path, Any], tmp_path: Path) -> None:
    """L12: nothing tells it from its original."""
    folder = shutil.copytree(text_model[0], tmp_path / "m")
    (folder / SINGLE).unlink()
    os.link(shutil.copy(text_model[0] / SINGLE, tmp_path / "original"), folder / SINGLE)
    assert read_model(folder).weight_bytes == read_model(text_model[0]).weight_bytes


def test_the_operator_may_allow_a_folder_for_links(
    text_model: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """L12."""
    folder = shutil.copytree(text_model[0], tmp_path / "m")
    (tmp_path / "store").mkdir()
    (folder / SINGLE).rename(tmp_path / "store" / "blob")
    (folder / SINGLE).symlink_to("../store/blob")
    for root in (None, tmp_path / "stor", tmp_path / "m"):
        monkeypatch.setenv("PYRUNTIME_LINK_ROOT", str(root or ""))
        with pytest.raises(CheckpointError, match="PYRUNTIME_LINK_ROOT"):
            read_model(folder)
    monkeypatch.setenv("PYRUNTIME_LINK_ROOT", str(tmp_path / "store"))
    assert read_model(folder).weight_bytes == read_model(text_model[0]).weight_bytes
    monkeypatch.setenv("PYRUNTIME_LINK_ROOT", "store")
    with pytest.raises(UsageError, match="absolute"):
        read_model(folder)


def test_weights_that_are_not_part_of_the_model_are_said(text_model: tuple[Path, Any], tmp_path: Path) -> None:
    """L13: what is called otherwise than a shard may lie beside them, and is not opened."""
    folder = shutil.copytree(text_model[0], tmp_path / "m")
    split(folder)
    (folder / "consolidated.safetensors").write_bytes(b"?")
    (folder / "adapter_model.safetensors").write_bytes(b"?")
    with watched_opens() as opened:
        (note,) = read_model(folder).notes
    assert "adapter_model.safetensors, consolidated.safetensors" in note
    assert not {"consolidated.safetensors", "adapter_model.safetensors"} & set(opened)


@pytest.mark.parametrize("prefer", ["single", "index"])
def test_one_of_two_is_read_when_the_user_says_which(
    text_model: tuple[Path, Any], tmp_path: Path, prefer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """L14."""
    folder = shutil.copytree(text_model[0], tmp_path / "m")
    split(folder, keep_single=True)
    rewrite(folder, lambda each: each[UP].fill_(0.5))
    value = 0.5 if prefer == "single" else load_file(text_model[0] / SINGLE)[UP][0, 0]
    llm = LLM(folder, prefer=prefer)
    assert llm.model.weights["layers.2.mlp.up.weight"].read()[0, 0] == value
    assert run(["generate", str(folder), "the cat", "--prefer", prefer]) == 0
    capsys.readouterr()
    assert run(["generate", str(folder), "the cat", "--prefer", "both"]) == 2
    assert "error[CONFIG]: prefer is 'both'" in capsys.readouterr().err


def test_weights_are_looked_through_once_and_only_where_asked(
    make_llama: Callable[..., tuple[Path, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """L15: the default is models of up to 4 GB; dropped weights are not read."""
    folder = shutil.copytree(make_llama(tie_word_embeddings=True)[0], tmp_path / "m")
    rewrite(folder, lambda each: each[UP].fill_(torch.nan))
    seen: list[str] = []
    # the package's own `lower` is the function
    lowering = importlib.import_module("pyruntime.plan.lower")
    honest = lowering.check_finite

    def spy(name: str, tensor: torch.Tensor) -> None:
        seen.append(name)
        honest(name, tensor)

    monkeypatch.setattr(lowering, "check_finite", spy)
    load.load(folder, drops=load.DropOptions(drop_mlp=[2]), skip_tokenizer_init=True)
    gone = ("model.layers.2.mlp", "model.layers.2.post_attention")
    assert sorted(seen) == sorted(name for name in load_file(folder / SINGLE) if not name.startswith(gone))
    seen.clear()
    load.load(folder, skip_tokenizer_init=True, check_weights=False)
    monkeypatch.setattr(load, "_CHECKED_BYTES", 1)
    load.load(folder, skip_tokenizer_init=True)
    assert seen == []
    with pytest.raises(CheckpointError, match="NaN"):
        load.load(folder, skip_tokenizer_init=True, check_weights=True)
    with pytest.raises(UsageError, match="check_weights is 'yes'"):
        load.load(folder, check_weights="yes")  # type: ignore[arg-type]


def truncate(path: Path) -> None:
    os.truncate(path, 0)


@pytest.mark.parametrize("harm", [overwrite, append, truncate, os.unlink], ids=lambda harm: harm.__name__)
def test_a_file_that_changes_after_loading_has_no_effect(
    text_model: tuple[Path, Any], tmp_path: Path, harm: Callable[[Path], object]
) -> None:
    """L16: nothing is mapped; a process that had mapped the file would die or compute something else."""
    folder = shutil.copytree(text_model[0], tmp_path / "m")
    params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, logprobs=5)
    llm = LLM(folder)
    before = llm.generate([5, 6, 7], params, use_tqdm=False)[0].outputs
    harm(folder / SINGLE)
    assert not (folder / SINGLE).exists() or (folder / SINGLE).read_bytes() != (text_model[0] / SINGLE).read_bytes()
    after = llm.generate([5, 6, 7], params, use_tqdm=False)[0].outputs
    assert after == before


def test_weights_that_are_not_looked_through_run_until_the_numbers_show(
    text_model: tuple[Path, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """L15."""
    folder = shutil.copytree(text_model[0], tmp_path / "m")
    rewrite(folder, lambda each: each["lm_head.weight"].fill_(torch.nan))
    assert run(["generate", str(folder), "the cat", "--no-check-weights"]) == 4
    assert "error[NUMERICS]" in capsys.readouterr().err
    assert run(["generate", str(folder), "the cat", "--check-weights"]) == 3
    assert "error[NOT_FINITE]" in capsys.readouterr().err
