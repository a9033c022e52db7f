"""What merged, pivoted, triangular, table and slim attention must read and keep, against arithmetic done by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from pyruntime.graph import SequenceWork, build, fuse
from pyruntime.plan import Plan, lower
from pyruntime.spec import Attention, Cached, Embedding, Head, ModelSpec
from tests.helpers import PAGE_SIZE, all_logits, relative_error
from tests.specs import SLIM_ATTENTIONS, VOCAB, D, attention_of, lin, mlp_of, model_of, random_model, rms, tri

SIZE, HEADS, KV_HEADS, HEAD_DIM = 64, 4, 2, 16
Q, KV = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
CONTEXT, BATCH = 9, 3
FLOAT32 = 4


def model(attention: Attention, size: int = SIZE) -> ModelSpec:
    """The attention between two ordinary layers, so that its own nodes have the tail's form nowhere."""
    plain = attention_of(size, 1, 1, 8)
    layers = [(plain, None, False), (attention, mlp_of(size, 40), False), (plain, None, False)]
    embedding = Embedding(vocab_size=VOCAB, size=size)
    return model_of(layers, embedding=embedding, final_norm=rms(size), head=Head(linear=lin(size, VOCAB), tied=False))


def plan_of(spec: ModelSpec, target: str = "reference", dtype: str = "float32") -> Plan:
    return lower(fuse(build(spec)), random_model(spec, torch.float32), target=target, dtype=dtype)


def attention_cost(plan: Plan, layer: int = 1) -> tuple[int, int, int]:
    """Bytes of weights, bytes of cache and operations of one layer's attention, to decode a token of each sequence."""
    found = plan.cost([SequenceWork(CONTEXT, 1)] * BATCH)
    own = [cost for name, cost in found.items() if name.startswith(f"layers.{layer}.attention")]
    return sum(c.weight_bytes for c in own), sum(c.kv_bytes for c in own), sum(c.flops for c in own)


def skipless(**changes: object) -> Attention:
    fields = {"q": None, "o": None, "pre": None, "residual": False, **changes}
    return attention_of(SIZE, HEADS, KV_HEADS, HEAD_DIM, **fields)


def test_a_merged_query_and_output_are_not_read() -> None:
    weights, cache, flops = attention_cost(plan_of(model(skipless())))
    assert weights == FLOAT32 * 2 * KV * SIZE
    assert cache == FLOAT32 * BATCH * (CONTEXT + 1 + 1) * 2 * KV
    assert flops == BATCH * (2 * 2 * KV * SIZE + 4 * Q * (CONTEXT + 1))


def scattered() -> Attention:
    """Every second value of queries, keys and values comes from the input, the others from `rest`."""
    order = [i // 2 + (SIZE if i % 2 else 0) for i in range(2 * SIZE)]
    return skipless(k=None, v=None, columns=tuple(order[: Q + 2 * KV]), rest=lin(SIZE, 2 * KV, bias=True))


def test_pivoted_columns_cost_what_the_merged_query_does() -> None:
    merged, pivoted = (attention_cost(plan_of(model(each))) for each in (skipless(), scattered()))
    assert pivoted == (merged[0] + FLOAT32 * 2 * KV, *merged[1:])


@pytest.mark.parametrize("target", ["reference", "cpu"])
def test_the_tail_reads_no_row_of_rest_twice(target: str) -> None:
    last = model_of(
        [(scattered(), None, False)],
        embedding=Embedding(vocab_size=VOCAB, size=SIZE),
        final_norm=None,
        head=Head(linear=lin(SIZE, VOCAB), tied=False),
    )
    plan = plan_of(last, target)
    names = {step.node.name for step in plan.steps}
    assert {"layers.0.attention.kv", "layers.0.attention.q"} <= names
    assert attention_cost(plan, 0)[0] == FLOAT32 * 2 * KV * (SIZE + 1)
    tables = VOCAB * SIZE * (2 if target == "reference" else 1)
    head = 48 * SIZE if target == "cpu" else 0
    # both halves fill whole panels of 16 rows
    assert plan.weight_bytes == FLOAT32 * (tables + head + 2 * KV * (SIZE + 1))


def test_a_table_costs_a_row_for_each_token() -> None:
    spec = model(skipless(k=None, v=None, table=True))
    weights, _, flops = attention_cost(plan_of(spec))
    assert weights == FLOAT32 * BATCH * (Q + 2 * KV)
    assert flops == BATCH * 4 * Q * (CONTEXT + 1)


def test_learned_positions_cost_a_row_for_each_token() -> None:
    spec = model(skipless())
    spec = replace(spec, embedding=replace(spec.embedding, positions=256))
    assert plan_of(spec).cost([SequenceWork(CONTEXT, 1)])["embed"].weight_bytes == FLOAT32 * 2 * SIZE


def triangular(size: int) -> ModelSpec:
    attention = attention_of(size, 1, 1, 8, o=lin(8, size), q=lin(size, 8))
    return model(replace(attention, num_heads=size // 8, q=tri(size), o=tri(size)), size)


def test_a_triangular_map_costs_half_a_square_one() -> None:
    size = 128
    found = attention_cost(plan_of(triangular(size)))
    half = size * (size + 1) // 2
    assert found[0] == FLOAT32 * (size + 2 * half + 2 * 8 * size)
    assert found[2] == BATCH * (2 * 2 * half + 2 * 2 * 8 * size + 4 * size * (CONTEXT + 1))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_kernels_keep_of_a_triangular_map_what_groups_of_64_outputs_read(dtype: str) -> None:
    size = 1024
    plan = plan_of(triangular(size), "cpu", dtype)
    (o,) = (step.weights for step in plan.steps if step.node.name == "layers.1.attention.o")
    values = o["matrix"].numel() * (1 if dtype == "float32" else 2)
    # each of 16 groups has as many inputs as its last output
    assert values == sum(64 * 64 * group for group in range(1, 17))
    assert values < 0.54 * size * size


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_triangular_map_computes_what_a_square_one_with_zeros_does(dtype: str) -> None:
    """Bit by bit: the sums run in the same order, and zeros change none."""
    spec = triangular(200)
    made = random_model(spec, torch.float32)
    names = {f"layers.1.attention.{role}.weight" for role in ("q", "o")}
    square = lin(200, 200)
    layers = list(spec.layers)
    assert isinstance(layers[1].attention, Attention)
    layers[1] = replace(layers[1], attention=replace(layers[1].attention, q=square, o=square))
    weights = {name: Square(weight) if name in names else weight for name, weight in made.weights.items()}
    dense = replace(made, spec=replace(spec, layers=tuple(layers)), weights=weights)
    tokens = [[(5 * i * i + seed) % VOCAB for i in range(length)] for seed, length in enumerate((37, 1, 20))]
    plans = [lower(fuse(build(each.spec)), each, target="cpu", dtype=dtype) for each in (made, dense)]
    found = [torch.cat(all_logits(plan, tokens, 17)) for plan in plans]
    assert torch.equal(*found)


class Square:
    """A triangular weight as a whole matrix."""

    def __init__(self, packed: object) -> None:
        self._packed = packed

    def __getattr__(self, name: str) -> object:
        return getattr(self._packed, name)

    def read(self) -> torch.Tensor:
        packed = self._packed.read()  # type: ignore[attr-defined]
        size = int((2 * len(packed)) ** 0.5)
        matrix = torch.zeros(size, size, dtype=packed.dtype)
        for row in range(size):
            matrix[row, : row + 1] = packed[row * (row + 1) // 2 :][: row + 1]
        return matrix


def slim(cached: Cached) -> Attention:
    attention = attention_of(SIZE, HEADS, HEADS, HEAD_DIM)
    return replace(attention, cached=cached, v=lin(Q if cached is Cached.KEYS else SIZE, Q))


@pytest.mark.parametrize("cached", [Cached.KEYS, Cached.INPUTS])
def test_slim_attention_keeps_and_reads_half(cached: Cached) -> None:
    full = attention_of(SIZE, HEADS, HEADS, HEAD_DIM)
    plain, half = plan_of(model(full)), plan_of(model(slim(cached)))
    others = 2 * (2 * 8) * FLOAT32
    assert plain.kv_bytes_per_token - others == 2 * (half.kv_bytes_per_token - others) == 2 * FLOAT32 * Q
    caches = [plan.new_cache(3, PAGE_SIZE).num_bytes for plan in (plain, half)]
    assert caches == [plan.kv_bytes_per_token * 3 * PAGE_SIZE for plan in (plain, half)]
    costs = [attention_cost(plan) for plan in (plain, half)]
    assert costs[0][0] == costs[1][0]
    assert costs[0][1] == 2 * costs[1][1] == FLOAT32 * BATCH * (CONTEXT + 2) * 2 * Q


def test_slim_attention_mixes_all_keys_for_each_head() -> None:
    """Graef et al. 2025, option 2: scores of d, mixes of h d, and then the values of each head from its own mix."""
    seen = CONTEXT + 1
    query, keys, output, values = (2 * SIZE * Q,) * 4
    per_token = query + keys + output + values + 2 * Q * seen + 2 * HEADS * Q * seen
    assert attention_cost(plan_of(model(slim(Cached.KEYS))))[2] == BATCH * per_token
    # keys made anew for each position that is seen, and none as they come
    assert attention_cost(plan_of(model(slim(Cached.INPUTS))))[2] == BATCH * (per_token - keys + seen * keys)


@pytest.mark.parametrize("name", SLIM_ATTENTIONS)
def test_slim_attention_of_a_ragged_batch_is_that_of_each_sequence(name: str) -> None:
    spec = model_of([(SLIM_ATTENTIONS[name], None, False), (SLIM_ATTENTIONS[name], mlp_of(D, 40), False)])
    plan = lower(fuse(build(spec)), random_model(spec))
    tokens = [[(5 * i * i + seed) % VOCAB for i in range(length)] for seed, length in enumerate((13, 1, 7))]
    for chunk in (64, 7, 1):
        for sequence, found in zip(tokens, all_logits(plan, tokens, chunk), strict=True):
            assert relative_error(found, all_logits(plan, [sequence], 64)[0]) < 1e-12
