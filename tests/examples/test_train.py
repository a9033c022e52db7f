"""The training script: a run that was killed goes on, and what it exports is an ordinary Llama."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from pyruntime.checkpoint import read_model
from pyruntime.engine.tokenizer import Tokenizer
from pyruntime.spec import DropPlan
from tests.helpers import all_logits, hf_logits, make_plan, relative_error

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parent.parent.parent / "examples" / "train.py"
SIZES = [
    "--layers=2", "--hidden=16", "--heads=2", "--kv-heads=1", "--ffn=24", "--vocab=300", "--context=32", "--batch=2",
    "--eval-every=5", "--save-every=5", "--threads=1", "--precision=float32",
]  # fmt: skip


def write_text(path: Path) -> None:
    rng = random.Random(0)
    words = ["".join(rng.choice("aeioudnrst") for _ in range(rng.randint(1, 7))) for _ in range(200)]
    paragraphs = [" ".join(rng.choice(words) for _ in range(60)) + "." for _ in range(900)]
    path.write_text("\n\n".join(paragraphs), encoding="utf-8")


def command(text: Path, out: Path, *more: str) -> list[str]:
    return [sys.executable, str(SCRIPT), str(text), "-o", str(out), *SIZES, *more]


def test_a_killed_run_goes_on_and_exports_a_llama(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    text, out = tmp_path / "text.txt", tmp_path / "out"
    write_text(text)
    first = subprocess.Popen(command(text, out, "--minutes=5"), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not list((out / "state").glob("*")) and first.poll() is None:
        assert time.monotonic() < deadline, "no state was saved in two minutes"
        time.sleep(0.2)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert not (out / "model.safetensors").exists()

    done = subprocess.run(
        command(text, out, "--minutes=0.2", "--resume"), capture_output=True, text=True, env={**os.environ}, check=False
    )
    assert done.returncode == 0, done.stderr
    log = json.loads((out / "training_log.json").read_text())
    assert log, "the log is empty"

    model = read_model(out)
    assert model.dtype == "bfloat16"
    hf_model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    ids = Tokenizer(out).encode("the dunes, at noon")
    assert ids == AutoTokenizer.from_pretrained(out)("the dunes, at noon")["input_ids"]
    (found,) = all_logits(make_plan(out, DropPlan()), [ids], 64)
    assert relative_error(found, hf_logits(hf_model, ids)) < 1e-5
