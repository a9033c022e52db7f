"""What tests of generation share: greedy decoding with transformers, small engines, and a model that has words."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
import torch

from pyruntime.engine.engine import Engine, EngineConfig
from pyruntime.engine.params import SamplingParams
from pyruntime.engine.request import RequestOutput
from pyruntime.engine.schedule import SchedulerConfig
from pyruntime.engine.tokenizer import Tokenizer
from pyruntime.plan import Plan
from tests.helpers import hf_logits

Adjust = Callable[[torch.Tensor, Sequence[int]], torch.Tensor]
Requests = Mapping[str, tuple[Sequence[int], SamplingParams]]

SENTENCES = ("the cat sat on the mat. the end", "once upon a time there was a llama", "two  spaces and a tab\t.")
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<s>' + m['role'] + ': ' + m['content'] + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)


def greedy(hf_model: Any, prompt: Sequence[int], count: int, adjust: Adjust = lambda row, output: row) -> list[int]:
    """`count` new tokens: each time the whole sequence goes through transformers, without a cache.

    `adjust` is given the last row of logits and the output so far.
    """
    output: list[int] = []
    for _ in range(count):
        row = hf_logits(hf_model, [*prompt, *output])[-1]
        output.append(int(adjust(row.clone(), output).argmax()))
    return output


def small_engine(
    plan: Plan,
    *,
    num_pages: int = 200,
    page_size: int = 4,
    max_model_len: int = 64,
    max_num_seqs: int = 16,
    budget: int = 256,
    seed: int = 0,
    tokenizer: Tokenizer | None = None,
    eos: tuple[int, ...] = (),
) -> Engine:
    """An engine with room for everything, unless told otherwise."""
    scheduler = SchedulerConfig(max_num_seqs, budget)
    config = EngineConfig(max_model_len, num_pages, page_size, seed, scheduler)
    return Engine(plan, config, tokenizer, eos)


def drain(engine: Engine) -> dict[str, RequestOutput]:
    """Step until nothing is left; the finished outputs by request."""
    finished: dict[str, RequestOutput] = {}
    for _ in range(2000):
        if not engine.has_unfinished:
            break
        finished.update({output.request_id: output for output in engine.step() if output.finished})
    assert not engine.has_unfinished, "the engine makes no progress"
    assert engine.num_free_pages == engine.config.num_pages
    return finished


def run_all(engine: Engine, requests: Requests) -> dict[str, RequestOutput]:
    """All `requests` at once."""
    for request_id, (ids, params) in requests.items():
        engine.add_request(request_id, ids, params)
    return drain(engine)


def run_one(engine: Engine, ids: Sequence[int], params: SamplingParams) -> RequestOutput:
    """One request alone."""
    return run_all(engine, {"only": (ids, params)})["only"]


def tokens(output: RequestOutput, index: int = 0) -> list[int]:
    """The new tokens of one of the request's sequences."""
    return list(output.outputs[index].token_ids)


def byte_level_bpe(vocab_size: int, sentences: Iterable[str] = SENTENCES) -> tokenizers.Tokenizer:
    """A byte-level tokenizer of at most `vocab_size` ids: <s> is 0, </s> is 1."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([*sentences] * 5, trainer)
    return backend


def save_text_model(folder: Path, target: Path, vocab_size: int, **generation: Any) -> Path:
    """A copy of the model in `folder` with a tokenizer, a chat template and a generation_config.json."""
    shutil.copytree(folder, target)
    byte_level_bpe(vocab_size).save(str(target / "tokenizer.json"))
    words = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": CHAT_TEMPLATE}
    (target / "tokenizer_config.json").write_text(json.dumps(words))
    (target / "generation_config.json").write_text(json.dumps({"eos_token_id": 1, **generation}))
    return target
