"""The optimizers of train.py and the learning rate that they follow."""

from __future__ import annotations

import math

import torch
from torch import nn
from train_model import Config


def learning_rate(step: int, progress: float, cfg: Config) -> float:
    """Linear warm-up by steps, then a cosine over `progress` (0 to 1), from cfg.lr to a fiftieth of it."""
    cosine = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    return cfg.lr * min(1.0, (step + 1) / cfg.warmup_steps) * cosine


def make_optimizers(model: nn.Module, cfg: Config) -> list[torch.optim.Optimizer]:
    """AdamW that decays matrices and leaves vectors alone; with "muon", Muon for the matrices inside the layers.

    Muon (Jordan et al. 2024) makes each update orthogonal, so that all directions of a matrix learn alike; scaled to
    the size of an AdamW update (Liu et al. 2025, "Muon is Scalable for LLM Training"), it shares cfg.lr.
    """
    inner, matrices, vectors = [], [], []
    for name, weight in model.named_parameters():
        if weight.dim() < 2:
            vectors.append(weight)
        elif cfg.optimizer == "muon" and "layers." in name:
            inner.append(weight)
        else:
            matrices.append(weight)
    groups = [{"params": matrices, "weight_decay": cfg.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, lr=cfg.lr, betas=(0.9, 0.95), fused=True)]
    if inner:
        muon = torch.optim.Muon(inner, lr=cfg.lr, weight_decay=cfg.weight_decay, adjust_lr_fn="match_rms_adamw")
        optimizers.append(muon)
    return optimizers
