"""Every op of the C++ target alone, at odd sizes, in every dtype and on every CPU path, against float64."""

from __future__ import annotations

import functools
import math
from dataclasses import replace

import pytest
import torch

from pyruntime.graph import build, fuse
from pyruntime.ops import _native
from pyruntime.ops.table import OPS
from pyruntime.plan import lower
from pyruntime.spec import Attention, Embedding, Head, ModelSpec, Norm, NormKind, Replacement
from tests.specs import PLAIN_MLP, attention_of, lin, mlp_of, model_of, random_model, rms
from tests.stepwise import Error, advancing, errors

ISAS = _native.load().module.isa_available()
DTYPES = (torch.float32, torch.bfloat16)
# below a panel of 16, around four of them, no multiple of one, and many
SIZES = (1, 63, 100, 1000)
# a prompt of more than one block of 64 positions and two that end in it, then a chunk and a single token
RUNS = advancing((75, 17, 1), (70, 4, 1))


def odd_attention(size: int, num_heads: int, num_kv_heads: int, **changes: object) -> Attention:
    """An attention over `size` values whose heads have up to 100, an odd number too."""
    head_dim = min(size, 100)
    return attention_of(size, num_heads, num_kv_heads, head_dim, scale=1 / math.sqrt(head_dim), **changes)


def specs(size: int) -> list[ModelSpec]:
    """Models whose graphs hold every op: the first with a table of its own, the second with one shared by the head."""
    vocab = size + 36
    layer_norm = Norm(kind=NormKind.LAYER, size=size, eps=1e-5, bias=True)
    plain = replace(PLAIN_MLP, gate=None, up=lin(size, size, True), down=lin(size, size, True), pre=rms(size))
    gated = mlp_of(size, size)
    replacement = Replacement(linear=lin(size, size, bias=True), pre=rms(size), post=rms(size))
    first, second = odd_attention(size, 3, 1, softcap=5.0), odd_attention(size, 4, 2, window=66)
    serial = [(first, gated, False), (None, plain, False), (None, gated, False), (second, replacement, False)]
    parallel = [(second, replace(gated, sub=rms(size), post=rms(size)), True), (first, plain, True)]
    embedding = Embedding(vocab_size=vocab, size=size, scale=1.7)
    ends = {"embedding": embedding, "final_norm": rms(size) if size == 1 else layer_norm}
    return [
        model_of(serial, head=Head(linear=lin(size, vocab, bias=True), tied=False, softcap=3.0), **ends),
        model_of(parallel, head=Head(linear=lin(size, vocab), tied=True), **ends),
    ]


@functools.cache
def all_errors(isa: str, dtype: torch.dtype, size: int) -> list[Error]:
    """Every step's error, of fused and unfused plans of all models; PYRUNTIME_CPU_ISA is `isa` already."""
    found = []
    for spec in specs(size):
        model = random_model(spec, dtype, seed=size)
        for graph in (build(spec), fuse(build(spec))):
            plan = lower(graph, model, target="cpu")
            assert plan.dtype is dtype
            found.extend(errors(lower(graph, model, dtype="float64"), plan, RUNS))
    return found


@pytest.mark.parametrize("op", [op for op, found in OPS.items() if len(found) > 1])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", ISAS)
def test_an_op_alone_equals_its_reference(
    isa: str, dtype: torch.dtype, size: int, op: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYRUNTIME_CPU_ISA", isa)
    found = [each for each in all_errors(isa, dtype, size) if each.op == op]
    assert found
    assert [each for each in found if each.wrong] == []
