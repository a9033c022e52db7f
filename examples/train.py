"""Trains a small Llama with grouped-query attention on a text file and exports it as a Hugging Face folder.

    python examples/train.py TEXT -o OUT --minutes 72
    python examples/train.py TEXT -o OUT --minutes 72 --resume

Every tenth block of the text (about 16 KB, cut at a paragraph) is held out: neither the tokenizer nor the model sees
it. Training skips whole sublayers at random ("LayerDrop", Fan et al. 2019), attention more often than MLP and deep
layers more often than shallow ones, so that the exported model bears the loss of sublayers. The learning rate follows
elapsed time: a run ends when asked to, with a decayed rate, on a machine of any speed; with --steps it follows steps.
OUT/state keeps what a resumed run needs until the export.

    python examples/train.py TEXT -o OUT --steps 1500 --skipless --norm none --optimizer muon

trains a model without residual connections, whose format is pyruntime's own (train_skipless.py, train_export.py).
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
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from train_export import export_model, export_tokenizer, write_json
from train_model import Config, Llama
from train_optimizer import learning_rate, make_optimizers
from train_skipless import Skipless
from train_text import Data, encode, train_batch

Model = Llama | Skipless

# settings that a resumed run may change
FREE_ON_RESUME = {"minutes", "threads", "precision", "compile", "eval_every", "save_every"}


def skipped_sublayers(step: int, cfg: Config) -> frozenset[tuple[str, int]]:
    """Draws the sublayers to leave out of a step; the probability rises linearly with depth.

    None is left out of a model without residual connections: it would leave nothing of the stream.
    """
    if cfg.skipless:
        return frozenset()
    rng = random.Random(cfg.seed * 1_000_003 + step)
    rates = {"attn": cfg.skip_attn, "mlp": cfg.skip_mlp}
    return frozenset(
        (kind, i)
        for i in range(cfg.layers)
        for kind, rate in rates.items()
        if rng.random() < rate * (i + 1) / cfg.layers
    )


@torch.no_grad()
def evaluate(model: Model, windows: tuple[Tensor, Tensor], stride: int = 1) -> tuple[float, int]:
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


def optimizer_state(weight: Tensor, optimizers: list[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """The moments of a weight, kept by the one optimizer that has it."""
    owner = next(
        each for each in optimizers for group in each.param_groups if any(w is weight for w in group["params"])
    )
    state: dict[str, Tensor] = owner.state[weight]
    return state


def save_state(folder: Path, model: Model, optimizers: list[torch.optim.Optimizer], progress: Progress) -> None:
    """Writes weights, optimizer moments and progress; the old state stays whole until the new one is."""
    tensors = {}
    for name, weight in model.named_parameters():
        tensors[f"weight/{name}"] = weight.detach()
        for key, value in optimizer_state(weight, optimizers).items():
            tensors[f"{key}/{name}"] = value
    metadata = {"progress": json.dumps(asdict(progress)), "config": json.dumps(asdict(model.cfg))}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "next.safetensors", metadata=metadata)
    os.replace(folder / "next.safetensors", folder / "state.safetensors")


def load_state(folder: Path, model: Model, optimizers: list[torch.optim.Optimizer]) -> Progress:
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
                optimizer_state(weights[name], optimizers)[key] = value
    return Progress(**json.loads(metadata["progress"]))


def train_step(model: Model, optimizers: list[torch.optim.Optimizer], batch: tuple[Tensor, Tensor], step: int) -> float:
    """One update; returns the mean loss in nats per token."""
    cfg = model.cfg
    torch.manual_seed(cfg.seed * 1_000_003 + step)
    autocast = torch.autocast("cpu", torch.bfloat16) if cfg.precision == "bfloat16" else nullcontext()
    with autocast:
        loss = model(*batch, skipped_sublayers(step, cfg)).mean()
    if not math.isfinite(float(loss.detach())):
        raise RuntimeError(f"step {step}: loss is {float(loss.detach())}; resume with a lower --lr")
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), cfg.clip)
    for optimizer in optimizers:
        optimizer.step()
    return float(loss.detach())


def curve_point(model: Model, data: Data, progress: Progress, losses: list[float]) -> dict[str, float]:
    """A row of the learning curve; held-out bits per byte are those of every eighth window."""
    nats, _ = evaluate(model, data.windows, stride=8)
    return {
        "step": progress.step,
        "minutes": round(progress.seconds / 60, 2),
        "train_loss": round(sum(losses) / len(losses), 4),
        "held_out_bits_per_byte": round(nats / math.log(2) * data.held_out_tokens / data.held_out_bytes, 4),
    }


def share_done(progress: Progress, cfg: Config) -> float:
    """How much of the run lies behind, 1 at its end."""
    done, whole = (progress.step, cfg.steps) if cfg.steps else (progress.seconds, 60 * cfg.minutes)
    return done / whole if whole else 1.0


def train(model: Model, data: Data, state: Path, resume: bool) -> Progress:
    """Trains for cfg.steps, or where they are 0 until cfg.minutes have passed, earlier runs counted when resumed."""
    cfg, losses = model.cfg, []
    optimizers = make_optimizers(model, cfg)
    progress = load_state(state, model, optimizers) if resume else Progress(0, 0.0, [])
    last, mark = time.monotonic(), progress.seconds
    while (done := share_done(progress, cfg)) < 1:
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = learning_rate(progress.step, done, cfg)
        losses.append(train_step(model, optimizers, train_batch(data.stream, progress.step, cfg), progress.step))
        progress.step += 1
        progress.seconds, last = progress.seconds + time.monotonic() - last, time.monotonic()
        if progress.step % cfg.eval_every == 0:
            progress.curve.append(curve_point(model, data, progress, losses))
            rate = len(losses) * cfg.batch * cfg.context / (progress.seconds - mark)
            eta = progress.seconds / 60 * (1 / share_done(progress, cfg) - 1)
            row = (f"{k} {v}" for k, v in progress.curve[-1].items())
            print(*row, f"tokens/s {rate:.0f} eta {eta:.1f} min", flush=True)
            losses, mark = [], progress.seconds
        if progress.step % cfg.save_every == 0:
            save_state(state, model, optimizers, progress)
    save_state(state, model, optimizers, progress)
    return progress


def measure(model: Model, weights: dict[str, Tensor], data: Data, progress: Progress) -> dict[str, float | None]:
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


def condition_numbers(model: Skipless) -> list[dict[str, float]]:
    """Of the query and output projection of each layer: what a merge multiplies rounding by, that of q inverted."""
    return [
        {
            name: round(float(torch.linalg.cond(getattr(layer.attention, name).weight.detach().double())), 2)
            for name in ("q", "o")
        }
        for layer in model.layers
    ]


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
    model: Model = (Skipless(cfg) if cfg.skipless else Llama(cfg)).train()
    num_parameters = sum(w.numel() for w in model.parameters())
    print(f"{num_parameters} parameters, {len(data.stream)} training tokens, {data.held_out_tokens} held-out tokens")
    progress = train(model, data, out / "state", resume)
    figures = measure(model, export_model(model, out), data, progress)
    log: dict[str, Any] = {"config": asdict(cfg), "figures": figures, "curve": progress.curve}
    if isinstance(model, Skipless):
        log["condition_numbers"] = condition_numbers(model)
    write_json(out / "training_log.json", log)
    shutil.rmtree(out / "state")
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
