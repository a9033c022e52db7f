"""What the tests of the training script share: a text, small sizes, and the script's modules."""

from __future__ import annotations

import importlib
import random
import sys
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
SIZES = [
    "--layers=2", "--hidden=16", "--heads=2", "--kv-heads=1", "--ffn=24", "--vocab=300", "--context=32", "--batch=2",
    "--eval-every=5", "--save-every=5", "--threads=1", "--precision=float32",
]  # fmt: skip


def write_text(path: Path) -> None:
    """A quarter of a megabyte of made-up words."""
    rng = random.Random(0)
    words = ["".join(rng.choice("aeioudnrst") for _ in range(rng.randint(1, 7))) for _ in range(200)]
    paragraphs = [" ".join(rng.choice(words) for _ in range(60)) + "." for _ in range(900)]
    path.write_text("\n\n".join(paragraphs), encoding="utf-8")


def command(text: Path, out: Path, *more: str) -> list[str]:
    """The command line of a tiny run."""
    return [sys.executable, str(EXAMPLES / "train.py"), str(text), "-o", str(out), *SIZES, *more]


def script(monkeypatch: pytest.MonkeyPatch, name: str) -> Any:
    """A module of the training script; they find each other as scripts do, by their folder."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module(name)
