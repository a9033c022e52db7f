"""Law 2: absence costs nothing. Every pattern over three layers, from nothing to everything dropped."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from pyruntime.graph import build, fuse
from pyruntime.plan import lower
from pyruntime.spec import DropPlan
from tests.helpers import pruned_model

NUM_LAYERS = 3
KV_BYTES_PER_ATTENTION = 2 * 2 * 8 * 4  # keys and values, 2 heads of 8 values, float32
SUBSETS = [tuple(i for i in range(NUM_LAYERS) if mask >> i & 1) for mask in range(2**NUM_LAYERS)]
PATTERNS = [DropPlan(attention, mlp) for attention, mlp in itertools.product(SUBSETS, SUBSETS)]
SUBLAYER_TENSORS = {"attention": ("self_attn", "input_layernorm"), "mlp": ("mlp", "post_attention_layernorm")}


def stored_bytes(folder: Path, plan: DropPlan) -> int:
    """Bytes of the kept tensors, as the safetensors library sees them."""
    gone = [
        f"model.layers.{index}.{part}."
        for kind, parts in SUBLAYER_TENSORS.items()
        for index in getattr(plan, kind)
        for part in parts
    ]
    total = 0
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - a safetensors file is no mapping
            if not name.startswith(tuple(gone)):
                total += file.get_tensor(name).nbytes
    return total


def expected_steps(plan: DropPlan) -> int:
    """Embedding and head; three steps an attention, two more for the split at the tail; one step a run of MLPs."""
    order = [kind for i in range(NUM_LAYERS) for kind in ("attention", "mlp") if i not in getattr(plan, kind)]
    attentions = order.count("attention")
    runs = sum(1 for kind, _ in itertools.groupby(order) if kind == "mlp")
    return 2 + 3 * attentions + (2 if attentions else 0) + runs


@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda p: f"attn{p.attention}-mlp{p.mlp}")
def test_dropping_saves_exactly_its_share(make_llama: Callable[..., tuple[Path, Any]], pattern: DropPlan) -> None:
    folder, _ = make_llama(num_hidden_layers=NUM_LAYERS)
    model = pruned_model(folder, pattern)
    plan = lower(fuse(build(model.spec)), model)
    kept_attentions = NUM_LAYERS - len(pattern.attention)
    kept_mlps = NUM_LAYERS - len(pattern.mlp)
    kept = stored_bytes(folder, pattern)
    assert model.bytes_read == plan.weight_bytes == model.weight_bytes == kept
    assert plan.kv_bytes_per_token == kept_attentions * KV_BYTES_PER_ATTENTION
    cache = plan.new_cache(num_pages=5, page_size=4)
    assert cache.num_slots == kept_attentions
    assert cache.num_bytes == 20 * kept_attentions * KV_BYTES_PER_ATTENTION
    assert len(plan.steps) == expected_steps(pattern)
    # before fusion: norm, qkv, attend, o, add of an attention; norm, mlp, add of an MLP; embed, gather, norm, head
    assert len(build(model.spec).nodes) == 4 + 5 * kept_attentions + 3 * kept_mlps


def test_a_dropped_tensor_may_be_unreadable(make_llama: Callable[..., tuple[Path, Any]], tmp_path: Path) -> None:
    """Nothing between the header and the kept tensors is ever looked at: spoil every dropped byte and compare."""
    folder, _ = make_llama(num_hidden_layers=NUM_LAYERS)
    pattern = DropPlan(attention=(0, 2), mlp=(1,))
    honest = pruned_model(folder, pattern)
    keep = {(w.start, w.start + w.num_bytes) for weight in honest.weights.values() for w in weight.refs()}  # type: ignore[attr-defined]
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    data = bytearray((folder / "model.safetensors").read_bytes())
    header_end = 8 + int.from_bytes(data[:8], "little")
    spoilt = bytearray(data[:header_end]) + b"\xff" * (len(data) - header_end)
    for start, end in keep:
        spoilt[start:end] = data[start:end]
    assert spoilt != data
    (tmp_path / "model.safetensors").write_bytes(spoilt)
    for name, weight in pruned_model(tmp_path, pattern).weights.items():
        assert torch.equal(weight.read(), honest.weights[name].read()), name
