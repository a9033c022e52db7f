"""The training script: a run that was killed goes on, and what it exports is an ordinary Llama."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

from pyruntime.checkpoint import read_model
from pyruntime.engine.tokenizer import Tokenizer
from pyruntime.spec import DropPlan
from tests.examples.training import command, write_text
from tests.helpers import all_logits, hf_logits, make_plan, relative_error

pytestmark = pytest.mark.slow


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
