"""Options that several commands share, with the names users know from vLLM and LLM-Drop."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from pyruntime.checkpoint import ReadOptions
from pyruntime.engine.load import DropOptions
from pyruntime.engine.params import SamplingParams
from pyruntime.llm import LLM

Model = Annotated[str, typer.Argument(help="Folder of the model, or a Hub id.", show_default=False)]
DropAttn = Annotated[
    str | None,
    typer.Option("--drop-attn", help="Attentions to drop: 25,26 or 20-30 or 20-30+2 or last:8 or last:8:keep-last."),
]
DropMlp = Annotated[str | None, typer.Option("--drop-mlp", help="MLPs to drop, written likewise.")]
DropBlock = Annotated[str | None, typer.Option("--drop-block", help="Layers to drop whole, written likewise.")]
DropPlanFile = Annotated[
    Path | None,
    typer.Option("--drop-plan", help="File or folder, in any dialect, that says what to drop; FILE#n chooses in it."),
]
Dtype = Annotated[str, typer.Option("--dtype", help="auto, float32, bfloat16, float16 or float64.")]
Target = Annotated[str, typer.Option("--target", help="auto, cuda (GPU kernels), cpu (C++) or reference (PyTorch).")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, or one card of several: cuda:1.")]
Revision = Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit on the Hub.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
Prefer = Annotated[
    str | None, typer.Option("--prefer", help="single or index: what to read where a folder holds both.")
]
IgnoreConfigKeys = Annotated[
    str | None,
    typer.Option("--ignore-config-keys", help="Unknown keys of config.json that change no logits: a,b."),
]
CheckWeights = Annotated[
    bool | None,
    typer.Option("--check-weights/--no-check-weights", help="Look for NaN and infinity (default: up to 4 GB)."),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Take the place of a folder that is there.")]
Wait = Annotated[bool, typer.Option("--wait", help="Wait for another process that writes the same folder.")]
EvalText = Annotated[
    Path | None, typer.Option("--text", help="Held-out text: a file, or .jsonl with a text a line.", dir_okay=False)
]
Tasks = Annotated[
    str | None,
    typer.Option("--tasks", help="Multiple choice in .jsonl files, and tasks of lm-eval by name: a.jsonl,piqa."),
]
Window = Annotated[int | None, typer.Option("--window", help="Tokens of a window (default: the context, up to 2048).")]
Stride = Annotated[
    int | None, typer.Option("--stride", help="Tokens between windows (default: all but one; less: more context).")
]
Bos = Annotated[bool | None, typer.Option("--bos/--no-bos", help="Open each window (default: as the tokenizer does).")]
MaxChars = Annotated[int | None, typer.Option("--max-chars", min=1, help="Take this much of the text only.")]
Limit = Annotated[int | None, typer.Option("--limit", min=1, help="Take this many items of each task only.")]
MaxModelLen = Annotated[
    int | None, typer.Option("--max-model-len", help="Longest sequence in tokens (default: the model's context).")
]
MaxTokens = Annotated[
    int | None, typer.Option("--max-tokens", help="New tokens at most (default: the model's own, or 16).")
]
Temperature = Annotated[float | None, typer.Option("--temperature", help="0 takes the likeliest token.")]
TopP = Annotated[float | None, typer.Option("--top-p")]
TopK = Annotated[int | None, typer.Option("--top-k")]
Seed = Annotated[int | None, typer.Option("--seed", help="Makes sampling repeatable.")]


def drop_options(attn: str | None, mlp: str | None, block: str | None, plan: Path | None) -> DropOptions:
    """The four drop options as the engine takes them."""
    return DropOptions(drop_attn=attn, drop_mlp=mlp, drop_block=block, drop_plan=plan)


def read_options(prefer: str | None, ignore_config_keys: str | None) -> ReadOptions:
    """What was said about a folder that leaves a choice."""
    return ReadOptions(prefer, config_keys(ignore_config_keys))


def reading(
    revision: str | None, prefer: str | None, ignore_config_keys: str | None, check_weights: bool | None
) -> dict[str, Any]:
    """How to read the model, as `load` takes it."""
    options = read_options(prefer, ignore_config_keys)
    return {"revision": revision, "options": options, "check_weights": check_weights}


def config_keys(text: str | None) -> list[str]:
    """The names in "a,b"."""
    return [each.strip() for each in (text or "").split(",") if each.strip()]


def sampling_params(llm: LLM, **said: Any) -> SamplingParams:
    """The model's own defaults with what was said on the command line in their place; None says nothing."""
    default = llm.get_default_sampling_params()
    values = {name: value for name, value in said.items() if value is not None}
    if "max_tokens" in values:
        # the author's least length gives way to what the user said
        values["min_tokens"] = min(default.min_tokens, values["max_tokens"])
    return dataclasses.replace(default, **values)
