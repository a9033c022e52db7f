"""What `pyruntime eval` and `pyruntime tradeoff` have in common: texts, tasks and progress bars."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from pyruntime.checkpoint.folder import ReadOptions
from pyruntime.engine.load import Loaded
from pyruntime.engine.tokenizer import Tokenizer
from pyruntime.errors import UsageError
from pyruntime.evaluate import Bars, CopyProbe, TokenizedText, copy_probe, opening_token, read_corpus, tokenize
from pyruntime.plan.likelihood import Progress
from pyruntime.spec import ModelSpec

# a probe of more would take minutes on a CPU
_LONGEST_PROBE = 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class TextOptions:
    """How a text is read and cut; None is the default of `tokenize`."""

    window: int | None
    stride: int | None
    bos: bool | None
    max_chars: int | None

    def read(self, path: Path, tokenizer: Tokenizer, max_position: int) -> TokenizedText:
        """The text of the file in windows."""
        corpus = read_corpus(path, self.max_chars)
        opening = self._opening(tokenizer)
        return tokenize(corpus, tokenizer, max_position, length=self.window, stride=self.stride, bos=opening)

    def probe(self, tokenizer: Tokenizer, spec: ModelSpec) -> CopyProbe:
        """The copying probe over as much context as a window has."""
        length = min(spec.max_position, _LONGEST_PROBE) if self.window is None else self.window
        vocab_size = min(spec.vocab_size, tokenizer.vocab_size)
        return copy_probe(vocab_size, length, bos=self._opening(tokenizer), avoid=tokenizer.special_ids)

    def _opening(self, tokenizer: Tokenizer) -> int | None:
        if self.bos is None:
            return opening_token(tokenizer)
        if self.bos and tokenizer.bos_id is None:
            raise UsageError("TEXT", "--bos was given, and the tokenizer has no such token; leave it out")
        return tokenizer.bos_id if self.bos else None


@dataclass(frozen=True, slots=True)
class LmEval:
    """Tasks of lm-eval by name."""

    names: tuple[str, ...]
    limit: int | None
    num_fewshot: int | None
    include_path: Path | None

    def check(self) -> None:
        """Raise UsageError LM_EVAL where lm-eval is not installed, or has no such task."""
        if not self.names:
            return
        try:
            # an optional extra, and many seconds to import
            from pyruntime.integrations.lm_eval import check_tasks
        except ModuleNotFoundError as error:
            raise UsageError(
                "LM_EVAL",
                f"tasks {', '.join(self.names)} need lm-eval, and {error.name} is not installed: pip install "
                "'pyruntime-llm[lm-eval]'; or name a .jsonl file",
            ) from None
        check_tasks(self.names, self.include_path)

    def run(self, loaded: Loaded) -> dict[str, Any]:
        """The results, task by task, behind `check`. Raises RunError IO for data that cannot be had."""
        # an optional extra, and many seconds to import
        from pyruntime.integrations.lm_eval import run_tasks

        return run_tasks(
            loaded, self.names, limit=self.limit, num_fewshot=self.num_fewshot, include_path=self.include_path
        )


def command_line() -> list[str]:
    """The command for a report; a path from the root is called by its last name: where it lies is nobody's business."""
    return ["pyruntime", *map(_nameless, sys.argv[1:])]


def _nameless(word: str) -> str:
    # --option=a,b or -oa, else the value alone
    found = re.fullmatch(r"(--[^=/]*=|-\w(?=/)|)(.*)", word, re.DOTALL)
    assert found is not None
    return found[1] + ",".join(Path(each).name if each.startswith("/") else each for each in found[2].split(","))


def refuse_unused(needs: str, there: bool, **options: object) -> None:
    """Raise UsageError EVAL for one of `options` that was given where what it `needs` is not `there`."""
    for name, value in options.items():
        if value is not None and not there:
            option = f"--{name.replace('_', '-')}"
            raise UsageError("EVAL", f"{option} was given without {needs}, and would change nothing; leave it out")


@contextmanager
def byte_bar(what: str, quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """A function to call with (bytes done, bytes in all), which moves a bar on a terminal."""
    # None: shown on a terminal only
    off = True if quiet else None
    with tqdm(desc=what, unit="B", unit_scale=True, disable=off, delay=1.0, leave=False) as bar:

        def advance(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield advance


def reading_facts(options: ReadOptions) -> dict[str, Any]:
    """What was said about how to read a model's folder: figures belong to it as to the files."""
    return {"prefer": options.prefer, "ignore_config_keys": sorted(options.ignore_config_keys)}


def split_tasks(tasks: str | None) -> tuple[dict[str, Path], tuple[str, ...]]:
    """Files by the name of their task, and names for lm-eval."""
    parts = [part.strip() for part in (tasks or "").split(",") if part.strip()]
    files: dict[str, Path] = {}
    for part in parts:
        if part.endswith(".jsonl"):
            name = Path(part).stem
            if name in files:
                raise UsageError("TASK", f"two tasks are called {name!r}; rename one of the files")
            files[name] = Path(part)
    return files, tuple(part for part in parts if not part.endswith(".jsonl"))


def bars(quiet: bool) -> Bars:
    """Progress bars on standard error, none where it is no terminal."""

    @contextmanager
    def bar(what: str, num_tokens: int) -> Iterator[Progress]:
        off = quiet or not sys.stderr.isatty()
        with tqdm(
            total=num_tokens, desc=what, unit="tok", unit_scale=True, leave=False, disable=off, dynamic_ncols=True
        ) as shown:
            yield shown.update

    return bar
