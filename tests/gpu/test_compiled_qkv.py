"""Queries, keys and values of the CUDA kernels against float64, in a cache whose other places stay as they are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pyruntime.ops.cache import KvShape
from pyruntime.ops.gpu import compiled
from pyruntime.spec import Attention, Linear, Rope, RopeKind
from tests.gpu.helpers import DEVICE, Guarded, cache_of, frame_of, guarded, nmse, random, view_of
from tests.gpu.twin import kernels

IN_SIZE = 96
PAGE_SIZE = 4
EXACT = 1e-4  # stored in 16 bit


@pytest.fixture
def module() -> Any:
    """The kernels that run here."""
    return kernels()


def attention(num_heads: int, num_kv_heads: int, head_dim: int, rope_dim: int) -> Attention:
    def to(outputs: int) -> Linear:
        return Linear(in_features=IN_SIZE, out_features=outputs)

    return Attention(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        scale=1.0,
        q=to(num_heads * head_dim),
        k=to(num_kv_heads * head_dim),
        v=to(num_kv_heads * head_dim),
        o=Linear(in_features=num_heads * head_dim, out_features=IN_SIZE),
        rope=Rope(kind=RopeKind.DEFAULT, dim=rope_dim, theta=100.0) if rope_dim else None,
    )


def rotated(heads: Tensor, positions: list[int], rope_dim: int) -> Tensor:
    """`heads` [rows, heads, head_dim] in float64, value by value: i pairs with i + rope_dim / 2."""
    out = heads.clone()
    half = rope_dim // 2
    for row, position in enumerate(positions):
        for i in range(half):
            angle = torch.tensor(position * 100.0 ** (-2 * i / rope_dim), dtype=torch.float64)
            first, second = heads[row, :, i], heads[row, :, i + half]
            out[row, :, i] = first * angle.cos() - second * angle.sin()
            out[row, :, i + half] = second * angle.cos() + first * angle.sin()
    return out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lengths", [[1], [1, 1, 1], [4, 1], [7, 1, 5], [20, 13]])
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim", "rope_dim"), [(2, 2, 16, 16), (4, 1, 8, 4), (3, 1, 6, 0), (7, 1, 32, 32)]
)
def test_queries_keys_and_values_stand_rotated_where_they_belong(
    module: Any, num_heads: int, num_kv_heads: int, head_dim: int, rope_dim: int, lengths: list[int], dtype: torch.dtype
) -> None:
    made = attention(num_heads, num_kv_heads, head_dim, rope_dim)
    rows, q_size, kv_size = sum(lengths), num_heads * head_dim, num_kv_heads * head_dim
    contexts = [length + 2 + i for i, length in enumerate(lengths)]
    pages = [[(7 * i + 3 * j) % 37 for j in range(-(-context // PAGE_SIZE))] for i, context in enumerate(contexts)]
    view = view_of(lengths, contexts, pages)
    cache = cache_of((KvShape(num_kv_heads, head_dim),), 37, PAGE_SIZE, dtype)
    for pool in cache.pools(0):
        pool.fill_(torch.nan)
    x = random(rows, IN_SIZE, dtype=dtype, seed=1)
    weight = random(q_size + 2 * kv_size, IN_SIZE, dtype=dtype, seed=2, scale=IN_SIZE**-0.5)
    bias = random(q_size + 2 * kv_size, seed=3)
    query = Guarded((rows, q_size), dtype)
    frame = frame_of(view, (x,), (query.inside,), cache)
    compiled.qkv(frame, module, x, weight, made, 0, bias=bias)

    positions = view.positions.tolist()
    y = (x.double() @ weight.double().T + bias.double()).unflatten(1, (-1, head_dim)).cpu()
    parts = y.split([num_heads, num_kv_heads, num_kv_heads], dim=1)
    q, k = (rotated(part, positions, rope_dim) for part in parts[:2])
    assert query.intact and nmse(query.inside, q.flatten(1)) < EXACT
    for pool, expected in zip(cache.pools(0), (k, parts[2]), strict=True):
        found, rest = pool.cpu().clone(), []
        for row, position in enumerate(positions):
            page = pages[int(view.sequences[row])][position // PAGE_SIZE]
            rest.append(found[page, position % PAGE_SIZE].clone())
            found[page, position % PAGE_SIZE] = torch.nan
        assert nmse(torch.stack(rest), expected) < EXACT
        assert found.isnan().all()


@pytest.mark.parametrize("rows", [1, 6])
def test_keys_and_values_alone_and_queries_alone_make_the_whole(module: Any, rows: int) -> None:
    made = attention(4, 2, 16, 16)
    view = view_of([rows], [rows], [list(range(4))])
    x = random(rows, IN_SIZE, dtype=torch.float32, seed=1)
    weight = random(8 * 16, IN_SIZE, dtype=torch.bfloat16, seed=2)
    gain = guarded(random(IN_SIZE, seed=5).abs() + 0.5)
    found = []
    for parts in ([(True, True, weight)], [(True, False, weight[:64]), (False, True, weight[64:])]):
        cache = cache_of((KvShape(2, 16),), 4, PAGE_SIZE, torch.bfloat16)
        out = torch.full((rows, 64), torch.nan, dtype=torch.bfloat16, device=DEVICE)
        for query, keys, matrix in parts:
            frame = frame_of(view, (x,), (out,) if query else (), cache)
            compiled.qkv(frame, module, x, matrix, made, 0, query=query, cache=keys, gain=gain, eps=1e-5)
        found.append((out, *(pool[: -(-rows // PAGE_SIZE)].flatten(0, 1)[:rows] for pool in cache.pools(0))))
    assert all(torch.equal(whole, part) and not whole.isnan().any() for whole, part in zip(*found, strict=True))
