"""The text that train.py trains on: split, tokenizer, training batches and held-out windows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from train_model import Config

BOS, EOS = "<|begin|>", "<|end|>"
# the trainer numbers special tokens first, in the order given
BOS_ID, EOS_ID = 0, 1
BLOCK_CHARS = 16384
HOLD_OUT_EVERY = 10


@dataclass(frozen=True, slots=True)
class Data:
    """The text as the run needs it: a training stream and held-out windows."""

    stream: Tensor  # [tokens]
    windows: tuple[Tensor, Tensor]  # each [windows, context]
    train_bytes: int
    held_out_bytes: int
    held_out_tokens: int


def split_text(text: str) -> tuple[list[str], list[str]]:
    """Cuts a text in blocks at paragraphs; returns the runs of training blocks and the held-out blocks.

    Block 9, 19, 29, ... are held out. A block ends at the first blank line after BLOCK_CHARS characters, or at the
    first line end where the next blank line is more than a quarter of a block away.
    """
    blocks, start = [], 0
    while start < len(text):
        wanted = start + BLOCK_CHARS
        end = text.find("\n\n", wanted, wanted + BLOCK_CHARS // 4)
        end = end + 2 if end >= 0 else text.find("\n", wanted) + 1
        end = end if wanted < end else len(text)
        blocks.append(text[start:end])
        start = end
    last = HOLD_OUT_EVERY - 1
    runs = ["".join(blocks[i : i + last]) for i in range(0, len(blocks), HOLD_OUT_EVERY)]
    return runs, blocks[last::HOLD_OUT_EVERY]


def train_tokenizer(runs: list[str], cfg: Config) -> Tokenizer:
    """Byte-level BPE that puts BOS in front of each text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=cfg.vocab,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(runs, trainer)
    if tokenizer.get_vocab_size() != cfg.vocab:
        raise ValueError(f"the text gives {tokenizer.get_vocab_size()} tokens, expected {cfg.vocab}; lower --vocab")
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, BOS_ID)]
    )
    return tokenizer


def encode_runs(tokenizer: Tokenizer, runs: list[str]) -> Tensor:
    """One stream of ids, [tokens]; EOS stands where a run of training blocks ends."""
    ids = [i for run in runs for i in [*tokenizer.encode(run, add_special_tokens=False).ids, EOS_ID]]
    return torch.tensor(ids, dtype=torch.int64)


def train_batch(stream: Tensor, step: int, cfg: Config) -> tuple[Tensor, Tensor]:
    """Inputs and targets of a step, each [batch, context]; each input starts with BOS.

    An epoch visits each window of the stream once, in an order and with an offset of its own, a function of the step
    alone: a resumed run goes on where it was.
    """
    num_windows = len(stream) // cfg.context - 1
    per_epoch = num_windows // cfg.batch
    if per_epoch < 1:
        raise ValueError(f"the text has {num_windows} windows of {cfg.context} tokens, a batch needs {cfg.batch}")
    epoch, batch_idx = divmod(step, per_epoch)
    rng = torch.Generator().manual_seed(cfg.seed * 100_003 + epoch)
    offset = int(torch.randint(cfg.context, (1,), generator=rng))
    order = torch.randperm(num_windows, generator=rng)[batch_idx * cfg.batch : (batch_idx + 1) * cfg.batch]
    targets = stream[(offset + order * cfg.context)[:, None] + torch.arange(cfg.context)]
    return torch.cat((torch.full((cfg.batch, 1), BOS_ID), targets[:, :-1]), dim=1), targets


def held_out_windows(tokenizer: Tokenizer, blocks: list[str], cfg: Config) -> tuple[Tensor, Tensor]:
    """Inputs [windows, context], each behind BOS, and targets; together they predict each held-out token once."""
    rows = []
    for block in blocks:
        ids = tokenizer.encode(block, add_special_tokens=False).ids
        rows += [ids[i : i + cfg.context] for i in range(0, len(ids), cfg.context)]
    inputs = torch.tensor([[BOS_ID, *row[:-1]] + [BOS_ID] * (cfg.context - len(row)) for row in rows])
    return inputs, torch.tensor([row + [-100] * (cfg.context - len(row)) for row in rows])


def encode(text: str, cfg: Config, tokenizer: Tokenizer | None) -> tuple[Tokenizer, Data]:
    """Splits a text and encodes both parts, with a tokenizer trained on the training part if none is given."""
    runs, blocks = split_text(text)
    if not blocks:
        raise ValueError(
            f"the text has {len(text)} characters, expected {HOLD_OUT_EVERY * BLOCK_CHARS} or more: none is left to "
            "hold out; give a longer text"
        )
    tokenizer = tokenizer or train_tokenizer(runs, cfg)
    windows = held_out_windows(tokenizer, blocks, cfg)
    data = Data(
        stream=encode_runs(tokenizer, runs),
        windows=windows,
        train_bytes=sum(len(run.encode()) for run in runs),
        held_out_bytes=sum(len(block.encode()) for block in blocks),
        held_out_tokens=int((windows[1] != -100).sum()),
    )
    return tokenizer, data
