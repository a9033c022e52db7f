"""Trains a small Llama with grouped-query attention on a text file and exports it as a Hugging Face folder.

    python examples/train.py TEXT -o OUT --minutes 72
    python examples/train.py TEXT -o OUT --minutes 72 --resume

Every tenth block of the text (about 16 KB, cut at a paragraph) is held out: neither the tokenizer nor the model sees
it. Training skips whole sublayers at random ("LayerDrop", Fan et al. 2019), attention more often than MLP and deep
layers more often than shallow ones, so that the exported model bears the loss of sublayers. The learning rate follows
elapsed time: a run ends when asked to, with a decayed rate, on a machine of any speed. OUT/state keeps what a resumed
run needs until the export.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import shutil
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from train_export import export_model, export_tokenizer, write_json
from train_model import Config, Llama
from train_text import Data, encode, train_batch

# settings that a resumed run may change
FREE_ON_RESUME = {"minutes", "threads", "precision", "compile", "eval_every", "save_every"}


def skipped_sublayers(step: int, cfg: Config) -> frozenset[tuple[str, int]]:
    """Draws the sublayers to leave out of a step; the probability rises linearly with depth."""
    rng = random.Random(cfg.seed * 1_000_003 + step)
    rates = {"attn": cfg.skip_attn, "mlp": cfg.skip_mlp}
    return frozenset(
        (kind, i)
        for i in range(cfg.layers)
        for kind, rate in rates.items()
        if rng.random() < rate * (i + 1) / cfg.layers
    )


def learning_rate(step: int, progress: float, cfg: Config) -> float:
    """Linear warm-up by steps, then a cosine by elapsed time, from cfg.lr to a fiftieth of it."""
    cosine = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    return cfg.lr * min(1.0, (step + 1) / cfg.warmup_steps) * cosine


@torch.no_grad()
def evaluate(model: Llama, windows: tuple[Tensor, Tensor], stride: int = 1) -> tuple[float, int]:
    """Mean negative log likelihood per token in nats, and the number of tokens, over every stride-th window."""
    model.eval()
    inputs, targets = windows[0][::stride], windows[1][::stride]
    total = 0.0
    for i in range(0, len(inputs), 16):
        total += float(model(inputs[i : i + 16], targets[i : i + 16]).double().sum())
    model.train()
    num_tokens = int((targets != -100).sum())
    return total / num_tokens, num_tokens


@dataclass(slots=True)
class Progress:
    """What a resumed run has to know besides the weights; saved as JSON."""

    step: int
    seconds: float
    curve: list[dict[str, float]]


def save_state(folder: Path, model: Llama, optimizer: torch.optim.AdamW, progress: Progress) -> None:
    """Writes weights, optimizer moments and progress; the old state stays whole until the new one is."""
    tensors = {}
    for name, weight in model.named_parameters():
        tensors[f"weight/{name}"] = weight.detach()
        for key, value in optimizer.state.get(weight, {}).items():
            tensors[f"{key}/{name}"] = value
    metadata = {"progress": json.dumps(asdict(progress)), "config": json.dumps(asdict(model.cfg))}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "next.safetensors", metadata=metadata)
    os.replace(folder / "next.safetensors", folder / "state.safetensors")


def load_state(folder: Path, model: Llama, optimizer: torch.optim.AdamW) -> Progress:
    """Restores what save_state wrote."""
    path = folder / "state.safetensors"
    if not path.exists():
        raise FileNotFoundError(f"--resume: no {path}; start without --resume")
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    settings = asdict(model.cfg)
    for name, saved in json.loads(metadata["config"]).items():
        if name not in FREE_ON_RESUME and settings[name] != saved:
            raise ValueError(f"--resume: {name} is {settings[name]}, the run had {saved}; give the options of the run")
    tensors, weights = load_file(path), dict(model.named_parameters())
    with torch.no_grad():
        for full_name, value in tensors.items():
            key, name = full_name.split("/", 1)
            if key == "weight":
                weights[name].copy_(value)
            else:
                optimizer.state[weights[name]][key] = value
    return Progress(**json.loads(metadata["progress"]))


def make_optimizer(model: Llama, cfg: Config) -> torch.optim.AdamW:
    """AdamW that decays matrices and leaves norms alone."""
    matrices = [w for w in model.parameters() if w.dim() == 2]
    vectors = [w for w in model.parameters() if w.dim() < 2]
    groups = [{"params": matrices, "weight_decay": cfg.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=cfg.lr, betas=(0.9, 0.95), fused=True)


def train_step(model: Llama, optimizer: torch.optim.AdamW, batch: tuple[Tensor, Tensor], step: int) -> float:
    """One update; returns the mean loss in nats per token."""
    cfg = model.cfg
    torch.manual_seed(cfg.seed * 1_000_003 + step)
    autocast = torch.autocast("cpu", torch.bfloat16) if cfg.precision == "bfloat16" else nullcontext()
    with autocast:
        loss = model(*batch, skipped_sublayers(step, cfg)).mean()
    if not math.isfinite(float(loss.detach())):
        raise RuntimeError(f"step {step}: loss is {float(loss.detach())}; resume with a lower --lr")
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), cfg.clip)
    optimizer.step()
    return float(loss.detach())


def curve_point(model: Llama, data: Data, progress: Progress, losses: list[float]) -> dict[str, float]:
    """A row of the learning curve; held-out bits per byte are those of every eighth window."""
    nats, _ = evaluate(model, data.windows, stride=8)
    return {
        "step": progress.step,
        "minutes": round(progress.seconds / 60, 2),
        "train_loss": round(sum(losses) / len(losses), 4),
        "held_out_bits_per_byte": round(nats / math.log(2) * data.held_out_tokens / data.held_out_bytes, 4),
    }


def train(model: Llama, data: Data, state: Path, resume: bool) -> Progress:
    """Trains until cfg.minutes have passed, counting the time of earlier runs when resumed."""
    cfg, losses = model.cfg, []
    optimizer = make_optimizer(model, cfg)
    progress = load_state(state, model, optimizer) if resume else Progress(0, 0.0, [])
    last, mark = time.monotonic(), progress.seconds
    while progress.seconds < 60 * cfg.minutes:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(progress.step, progress.seconds / (60 * cfg.minutes), cfg)
        losses.append(train_step(model, optimizer, train_batch(data.stream, progress.step, cfg), progress.step))
        progress.step += 1
        progress.seconds, last = progress.seconds + time.monotonic() - last, time.monotonic()
        if progress.step % cfg.eval_every == 0:
            progress.curve.append(curve_point(model, data, progress, losses))
            rate = len(losses) * cfg.batch * cfg.context / (progress.seconds - mark)
            eta = cfg.minutes - progress.seconds / 60
            row = (f"{k} {v}" for k, v in progress.curve[-1].items())
            print(*row, f"tokens/s {rate:.0f} eta {eta:.1f} min", flush=True)
            losses, mark = [], progress.seconds
        if progress.step % cfg.save_every == 0:
            save_state(state, model, optimizer, progress)
    save_state(state, model, optimizer, progress)
    return progress


def measure(model: Llama, weights: dict[str, Tensor], data: Data, progress: Progress) -> dict[str, float | None]:
    """Figures of the exported weights, computed in float32 over the whole held-out part."""
    model.load_state_dict({name: w.float() for name, w in weights.items()})
    nats, num_tokens = evaluate(model, data.windows)
    return {
        "parameters": sum(w.numel() for w in weights.values()),
        "steps": progress.step,
        "minutes": round(progress.seconds / 60, 1),
        "train_bytes": data.train_bytes,
        "train_tokens": len(data.stream),
        "epochs": round(progress.step * model.cfg.batch * model.cfg.context / len(data.stream), 2),
        "train_loss_last": progress.curve[-1]["train_loss"] if progress.curve else None,
        "held_out_bytes": data.held_out_bytes,
        "held_out_tokens": num_tokens,
        "held_out_bits_per_byte": round(nats * num_tokens / math.log(2) / data.held_out_bytes, 4),
        "held_out_perplexity": round(math.exp(nats), 3),
    }


def parse_arguments() -> tuple[Path, Path, bool, Config]:
    """Text, output folder, whether to resume, and the Config of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, help="UTF-8 text file")
    parser.add_argument("-o", "--out", type=Path, required=True, help="folder of the exported model")
    parser.add_argument("--resume", action="store_true", help="go on from OUT/state; give the same options again")
    for field in fields(Config):
        option = "--" + field.name.replace("_", "-")
        if isinstance(field.default, bool):
            parser.add_argument(option, action="store_true")
        else:
            parser.add_argument(option, type=type(field.default), default=field.default, help=f"{field.default}")
    args = vars(parser.parse_args())
    text, out, resume = args.pop("text"), args.pop("out"), args.pop("resume")
    return text, out, resume, Config(**args)


def main() -> None:
    """Trains, exports, measures and logs."""
    text_path, out, resume, cfg = parse_arguments()
    torch.set_num_threads(cfg.threads)
    tokenizer = Tokenizer.from_file(str(out / "tokenizer.json")) if resume else None
    tokenizer, data = encode(text_path.read_text(encoding="utf-8"), cfg, tokenizer)
    out.mkdir(parents=True, exist_ok=True)
    export_tokenizer(tokenizer, out, cfg)
    torch.manual_seed(cfg.seed)
    model = Llama(cfg).train()
    num_parameters = sum(w.numel() for w in model.parameters())
    print(f"{num_parameters} parameters, {len(data.stream)} training tokens, {data.held_out_tokens} held-out tokens")
    progress = train(model, data, out / "state", resume)
    figures = measure(model, export_model(model, out), data, progress)
    write_json(out / "training_log.json", {"config": asdict(cfg), "figures": figures, "curve": progress.curve})
    shutil.rmtree(out / "state")
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
