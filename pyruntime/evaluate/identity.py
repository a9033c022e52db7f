"""Which model, plan and text a figure belongs to, as hashes: what an earlier run may lend, and what not."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from pyruntime.checkpoint import Model
from pyruntime.checkpoint.manifest import Progress, make_manifest
from pyruntime.plan import Plan


def model_sha256(model: Model, progress: Progress | None = None) -> str:
    """Hash of every byte of the files of `model`, and of which of its sublayers are dropped.

    `progress` is called with (bytes read, bytes in all).
    """
    assert model.path is not None
    files = make_manifest(model.path, {}, progress)["files"]
    return digest(files, list(model.spec.dropped("attention")), list(model.spec.dropped("mlp")))


def plan_settings(plan: Plan) -> dict[str, str]:
    """What decides the last digits of a plan's figures."""
    return {"dtype": str(plan.dtype).removeprefix("torch."), "target": plan.target, "device": plan.device.type}


def digest(*parts: Any) -> str:
    """Hash of JSON-ready values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
