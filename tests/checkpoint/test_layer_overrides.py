"""Layers that differ: what an override changes, and what it leaves as the model has it."""

from __future__ import annotations

from pyruntime.checkpoint.families.llama import LLAMA
from pyruntime.checkpoint.fields import Fields
from tests.conftest import TINY


def test_a_layer_that_lost_heads_keeps_the_size_of_the_others() -> None:
    """Pruning heads shortens the projections; it never widens the heads that stay."""
    spec = LLAMA.spec(Fields(TINY).with_layer_overrides({1: {"num_attention_heads": 2, "num_key_value_heads": 1}}))
    sizes = [(a.num_heads, a.num_kv_heads, a.head_dim, a.q_size, a.kv_size) for _, a in spec.attentions()]
    assert sizes[0] == (4, 2, 8, 32, 16)
    assert sizes[1] == (2, 1, 8, 16, 8)
    assert [a.scale for _, a in spec.attentions()] == [8**-0.5] * 4
