"""`pyruntime eval`: what a model is worth on a text and on tasks, alone or beside the dense one."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from pyruntime.bench import machine
from pyruntime.checkpoint.atomic import check_output, check_writable, write_text
from pyruntime.cli import options as o
from pyruntime.cli.evaluate_options import (
    LmEval,
    TextOptions,
    bars,
    byte_bar,
    command_line,
    reading_facts,
    refuse_unused,
    split_tasks,
)
from pyruntime.cli.evaluate_table import print_report
from pyruntime.engine.load import DropOptions, Loaded, load, read_pruned
from pyruntime.engine.tokenizer import Tokenizer
from pyruntime.errors import UsageError
from pyruntime.evaluate import (
    Findings,
    LogitsCache,
    Measures,
    TokenizedText,
    compared,
    measure,
    model_sha256,
    read_items,
)
from pyruntime.plan import Plan
from pyruntime.plan.likelihood import LogitRows, logit_rows

Dense = Annotated[
    str | None, typer.Option("--dense", help="Compare with this model: folder or Hub id, perhaps MODEL itself.")
]
IncludePath = Annotated[
    Path | None, typer.Option("--include-path", help="Folder with more lm-eval tasks.", file_okay=False)
]
Cache = Annotated[
    Path | None, typer.Option("--cache", help="Keep the dense model's logits in this folder.", file_okay=False)
]
Output = Annotated[
    Path | None, typer.Option("-o", "--output", help="Also write the JSON to this file.", dir_okay=False)
]

# what both models are compared with
_REFERENCE: Final = {"dtype": "float32", "target": "reference"}


def evaluate(
    model: o.Model,
    text: o.EvalText = None,
    tasks: o.Tasks = None,
    dense: Dense = None,
    long_context: Annotated[bool, typer.Option("--long-context", help="Also probe copying from far back.")] = False,
    window: o.Window = None,
    stride: o.Stride = None,
    bos: o.Bos = None,
    max_chars: o.MaxChars = None,
    limit: o.Limit = None,
    num_fewshot: Annotated[int | None, typer.Option("--num-fewshot", min=0, help="For tasks of lm-eval.")] = None,
    include_path: IncludePath = None,
    cache: Cache = None,
    drop_attn: o.DropAttn = None,
    drop_mlp: o.DropMlp = None,
    drop_block: o.DropBlock = None,
    drop_plan: o.DropPlanFile = None,
    dtype: o.Dtype = "auto",
    target: o.Target = "auto",
    device: o.Device = "cpu",
    revision: o.Revision = None,
    prefer: o.Prefer = None,
    ignore_config_keys: o.IgnoreConfigKeys = None,
    check_weights: o.CheckWeights = None,
    as_json: o.Json = False,
    output: Output = None,
) -> None:
    """Perplexity, divergence from the dense model, multiple choice, long contexts: what dropping costs."""
    files, names = split_tasks(tasks)
    refuse_unused("--dense", dense is not None, cache=cache)
    refuse_unused("--text", text is not None, cache=cache, stride=stride, max_chars=max_chars)
    refuse_unused("--text or --long-context", text is not None or long_context, window=window, bos=bos)
    refuse_unused("--tasks", tasks is not None, limit=limit)
    refuse_unused("a task of lm-eval in --tasks", bool(names), num_fewshot=num_fewshot, include_path=include_path)
    drops = o.drop_options(drop_attn, drop_mlp, drop_block, drop_plan)
    how: dict[str, Any] = {"dtype": dtype, "target": target, "device": device}
    how |= o.reading(revision, prefer, ignore_config_keys, check_weights)
    # reads headers only: what is wrong with the model is said before anything runs
    pruned = read_pruned(model, drops, revision, how["options"], warn=False)
    _check_outputs(output, cache, (pruned.path, dense, text, drop_plan, *files.values()))
    lm_eval = LmEval(names, limit, num_fewshot, include_path)
    lm_eval.check()
    cut = TextOptions(window=window, stride=stride, bos=bos, max_chars=max_chars)
    tokenizer = Tokenizer(pruned.path or model)
    measures = Measures(
        text=None if text is None else cut.read(text, tokenizer, pruned.spec.max_position),
        tasks={name: read_items(path, limit) for name, path in files.items()},
        copies=cut.probe(tokenizer, pruned.spec) if long_context else None,
    )
    if measures == Measures() and not names:
        raise UsageError("EVAL", "nothing is to be measured; give --text, --tasks or --long-context")
    runner = _Runner(measures, lm_eval, as_json)
    report: dict[str, Any] = {"command": command_line(), "machine": machine(), **_about(measures)}
    own = how if dense == model else how | {"revision": None}
    reference = None if dense is None else _Reference(dense, own, measures.text, cache, as_json)
    report |= _measured(runner, model, how | {"drops": drops}, reference)
    print(json.dumps(report)) if as_json else print_report(report)
    if output is not None:
        write_text(output, json.dumps(report, indent=1) + "\n")


def _measured(runner: _Runner, model: str, how: dict[str, Any], reference: _Reference | None) -> dict[str, Any]:
    """The figures of the model, alone or behind those of the dense one."""
    if reference is None:
        return {"model": runner.run(load(model, **how), "model")[1]}
    base, dense = runner.run(load(reference.name, **reference.how), "dense", reference)
    found, own = runner.run(load(model, **how), "model", reference)
    return {"dense": dense, "model": own, "change": compared(base, found)}


def _check_outputs(report: Path | None, cache: Path | None, inputs: Sequence[Path | str | None]) -> None:
    """Say now what would be lost, or fail, at the end."""
    read = [Path(each).expanduser() for each in inputs if each is not None]
    for each in (report, cache):
        if each is not None:
            check_output(each, read)
    if report is not None:
        check_writable(report)


class _Reference:
    """The dense model's logits in float32 by PyTorch, from the cache where they are there."""

    def __init__(
        self, name: str, how: dict[str, Any], text: TokenizedText | None, cache: Path | None, quiet: bool
    ) -> None:
        self.how = how
        self.name = name
        self._text = text
        self._folder = cache
        self._quiet = quiet
        self._plan: Plan | None = None
        self._cache: LogitsCache | None = None

    def rows(self) -> Iterator[LogitRows] | None:
        """The rows for the text, None without one."""
        if self._text is None:
            return None
        if self._folder is None:
            return logit_rows(self._loaded_plan(), self._text.windows)
        if self._cache is None:
            read = self.how["options"]
            dense = read_pruned(self.name, DropOptions(), self.how["revision"], read, warn=False)
            with byte_bar("Hashing", self._quiet) as advance:
                sha256 = model_sha256(dense, advance)
            key = {"model_sha256": sha256, "text_sha256": self._text.corpus.sha256, **_REFERENCE, **reading_facts(read)}
            self._cache = LogitsCache(self._folder, key, self._text.windows)
        return self._cache.rows(None if self._cache.is_complete else self._loaded_plan())

    def _loaded_plan(self) -> Plan:
        if self._plan is None:
            self._plan = load(self.name, **(self.how | _REFERENCE), skip_tokenizer_init=True).plan
        return self._plan


class _Runner:
    """Measures models one after the other, each alike."""

    def __init__(self, measures: Measures, lm_eval: LmEval, quiet: bool) -> None:
        self._measures = measures
        self._lm_eval = lm_eval
        self._bars = bars(quiet)

    def run(self, loaded: Loaded, what: str, reference: _Reference | None = None) -> tuple[Findings, dict[str, Any]]:
        """The findings, and the same for JSON with the figures of lm-eval."""
        assert loaded.tokenizer is not None
        if (text := self._measures.text) is not None and not text.is_made_by(loaded.tokenizer):
            raise UsageError(
                "DENSE", "the two models cut the text into different tokens; --dense must be of one family"
            )
        rows = None if reference is None else reference.rows()
        found = measure(loaded, self._measures, self._bars, what, rows)
        figures = found.to_json()
        if self._lm_eval.names:
            figures["lm_eval"] = self._lm_eval.run(loaded)
        return found, figures


def _about(measures: Measures) -> dict[str, Any]:
    """What was measured on."""
    about: dict[str, Any] = {}
    if measures.text is not None:
        about["text"] = measures.text.about()
        about["reference"] = _REFERENCE
    if measures.copies is not None:
        about["copying"] = {"repeats": measures.copies.repeats, "seed": measures.copies.seed}
    return about
