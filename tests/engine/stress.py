"""What the stress tests share: plans that take a millisecond a step, words, requests, and outputs as plain values."""

from __future__ import annotations

import functools
import itertools
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

import tokenizers
import torch

from pyruntime.engine.engine import Engine
from pyruntime.engine.request import CompletionOutput, Logprob, Logprobs, RequestOutput
from pyruntime.engine.tokenizer import Tokenizer
from pyruntime.graph import build, fuse
from pyruntime.plan import Plan, lower
from pyruntime.spec import Activation
from tests.generation import small_engine
from tests.helpers import page_size_of
from tests.specs import ATTENTION, ATTENTIONS, MLPS, ODD_MODELS, PLAIN_MLP, model_of, random_model

MODELS = {
    "small": model_of([(ATTENTIONS["window wider than a page"], PLAIN_MLP, False), (ATTENTION, None, False)]),
    "relu without residual": model_of(
        [
            (ATTENTION, replace(PLAIN_MLP, gate=None, activation=Activation.RELU, residual=False, pre=None), False),
            (ATTENTIONS["no residual"], MLPS["gated relu2"], False),
        ]
    ),
    **ODD_MODELS,
}


@dataclass(frozen=True)
class Kind:
    """A way to run a plan. `exact` says that other rows of a step do not change one bit of a row."""

    target: str
    dtype: str
    exact: bool

    def plan(self, model: str) -> Plan:
        """The plan of one of MODELS."""
        return _plan(model, self.target, self.dtype)

    def __str__(self) -> str:
        return f"{self.target} {self.dtype}"


# torch's products take another order of sums for another number of rows: in float64 no token sees it
KINDS = (Kind("reference", "float64", False), Kind("cpu", "float32", True), Kind("cpu", "bfloat16", True))


@functools.cache
def _plan(model: str, target: str, dtype: str) -> Plan:
    spec = MODELS[model]
    # one thread does the work of all sequences in the same scratch memory; more of them cost time on a busy machine
    with mock.patch.dict(os.environ, PYRUNTIME_NUM_THREADS="1"):
        return lower(fuse(build(spec)), random_model(spec, torch.float32), target=target, dtype=dtype)


def prompt_of(length: int, variant: int) -> tuple[int, ...]:
    """A prompt within the vocabulary of every one of MODELS."""
    return tuple((7 * i * i + 5 * variant + 3) % 37 for i in range(length))


@functools.cache
def words() -> Tokenizer:
    """A text for every token of `prompt_of`: whole words, spaces, and bytes that make characters together."""
    # few letters, so that stop strings come up
    letters = ("".join(each) for length in (1, 2, 3) for each in itertools.product("abc", repeat=length))
    pieces = ("<unk>", *(f"<0x{byte:02X}>" for byte in "é中".encode()), "▁", "▁a", *letters)[:37]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>"))
    dec = tokenizers.decoders
    backend.decoder = dec.Sequence([dec.Replace("▁", " "), dec.ByteFallback(), dec.Fuse(), dec.Strip(" ", 1, 0)])
    with tempfile.TemporaryDirectory() as folder:
        backend.save(str(Path(folder) / "tokenizer.json"))
        return Tokenizer(folder)


def roomy_engine(
    plan: Plan, *, max_model_len: int = 128, tokenizer: Tokenizer | None = None, eos: tuple[int, ...] = ()
) -> Engine:
    """An engine in which nobody waits."""
    sizes = {"page_size": page_size_of(plan), "max_model_len": max_model_len, "budget": 4096}
    return small_engine(plan, **sizes, tokenizer=tokenizer, eos=eos)


Score = tuple[int, float, int | None, str | None]
Scores = tuple[tuple[Score, ...] | None, ...]


def scores(logprobs: Sequence[Logprobs | None] | None) -> Scores:
    """Ids, log-probabilities, ranks and texts, by position."""
    return tuple(None if each is None else tuple(map(_score, each.items())) for each in logprobs or ())


def _score(item: tuple[int, Logprob]) -> Score:
    return item[0], item[1].logprob, item[1].rank, item[1].decoded_token


def values_of(output: RequestOutput) -> tuple[object, ...]:
    """Everything but times and counts, for a comparison of every bit."""
    return (scores(output.prompt_logprobs), *(_values(each) for each in output.outputs))


def _values(found: CompletionOutput) -> tuple[object, ...]:
    how = (found.finish_reason, found.stop_reason)
    return (found.token_ids, found.text, *how, found.cumulative_logprob, scores(found.logprobs))


def all_values(outputs: Mapping[str, RequestOutput]) -> dict[str, tuple[object, ...]]:
    """`values_of` each output."""
    return {name: values_of(output) for name, output in outputs.items()}
