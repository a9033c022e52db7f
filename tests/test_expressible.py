"""Everything that a specification can express runs, fused and unfused, as an independent float64 transformer says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from pyruntime.graph import build, fuse
from pyruntime.ops import _native
from pyruntime.plan import lower
from pyruntime.spec import Cached, DropPlan, Embedding, Head, ModelSpec, Replacement, drop_sublayers
from tests import naive
from tests.helpers import TARGETS, all_logits, nmse, relative_error
from tests.specs import (
    ATTENTION,
    ATTENTIONS,
    LAYER_NORM,
    MLPS,
    ODD_MODELS,
    PLAIN_MLP,
    REPLACEMENT,
    ROPE,
    SLIM_ATTENTIONS,
    VOCAB,
    D,
    as_arrays,
    attention_of,
    lin,
    mlp_of,
    model_of,
    pivoted,
    random_model,
    random_weights,
    rms,
    tri,
)

# several pages of the reference's size, and of the C++ target's
TOKENS = {"reference": [5, 0, 36, 11, 11, 2, 30, 7, 19], "cpu": [(5 * i * i + 3 * i) % 37 for i in range(37)]}
TOKENS["cuda"] = TOKENS["cpu"]
# four blocks of 64 positions of the C++ attention, the last one not full
LONG = [(5 * i * i + 3 * i) % 37 for i in range(200)]
# the reference runs in float64. float32: 24 bits, and errors of sums of tens of products grow over up to four layers
LIMITS = {"float64": 1e-10, "float32": 1e-5}
NMSE_LIMIT = 5e-4


def check(
    spec: ModelSpec,
    target: str,
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16),
    tokens: Sequence[int] = (),
    chunks: tuple[int, ...] = (64, 4, 1),
    factor: int = 1,
) -> None:
    """Fused and unfused plans, whole and in chunks, against the naive transformer in float64 with the same weights."""
    tokens = tokens or TOKENS[target]
    for dtype in dtypes if target != "reference" else (torch.float64,):
        name = str(dtype).removeprefix("torch.")
        model = random_model(spec, dtype)
        expected = torch.from_numpy(naive.logits(spec, as_arrays(random_weights(spec, dtype)), tokens))
        for graph in (build(spec), fuse(build(spec))):
            plan = lower(graph, model, dtype=name, target=target)
            slim = any(attention.cached is not Cached.KEYS_VALUES for _, attention in spec.attentions())
            assert {step.implementation.target for step in plan.steps} == {target, *(("reference",) if slim else ())}
            for chunk in chunks:
                (found,) = all_logits(plan, [tokens], chunk)
                if dtype is torch.bfloat16:
                    assert nmse(found, expected) < NMSE_LIMIT
                else:
                    assert relative_error(found, expected) < factor * LIMITS[name]


targets = pytest.mark.parametrize("target", TARGETS)


@targets
@pytest.mark.parametrize("name", ATTENTIONS)
def test_attention(name: str, target: str) -> None:
    check(
        model_of([(ATTENTION, PLAIN_MLP, False), (ATTENTIONS[name], PLAIN_MLP, False), (ATTENTION, None, False)]),
        target,
    )


@targets
@pytest.mark.parametrize("name", ATTENTIONS)
def test_last_attention_and_so_the_tail(name: str, target: str) -> None:
    check(model_of([(ATTENTION, PLAIN_MLP, False), (ATTENTIONS[name], PLAIN_MLP, False)]), target)


@targets
@pytest.mark.parametrize("tail", [True, False], ids=["last", "not last"])
@pytest.mark.parametrize("name", SLIM_ATTENTIONS)
def test_slim_attention(name: str, tail: bool, target: str) -> None:
    slim = (SLIM_ATTENTIONS[name], PLAIN_MLP, False)
    check(model_of([slim, (ATTENTION, None, False)] if not tail else [(ATTENTION, None, False), slim]), target)


@targets
@pytest.mark.parametrize("name", MLPS)
def test_mlp(name: str, target: str) -> None:
    check(model_of([(ATTENTION, MLPS[name], False), (None, MLPS[name], False), (None, PLAIN_MLP, False)]), target)


@targets
@pytest.mark.parametrize("dropped", ["nothing", "attention", "mlp", "last attention"])
def test_parallel_layers(dropped: str, target: str) -> None:
    layer = (replace(ATTENTION, pre=LAYER_NORM), replace(PLAIN_MLP, pre=LAYER_NORM, gate=None), True)
    spec = model_of([layer, layer, layer])
    plans = {
        "nothing": DropPlan(),
        "attention": DropPlan((1,)),
        "mlp": DropPlan((), (1,)),
        "last attention": DropPlan((2,)),
    }
    check(drop_sublayers(spec, plans[dropped]), target)


@targets
@pytest.mark.parametrize("merged", [True, False])
@pytest.mark.parametrize("normed", [True, False])
def test_parallel_layers_without_a_residual(normed: bool, merged: bool, target: str) -> None:
    norm = rms() if normed else None
    attention = replace(ATTENTIONS["query merged" if merged else "biases"], residual=False, pre=norm)
    attention = replace(attention, o=None) if merged else attention
    layer = (attention, replace(PLAIN_MLP, residual=False, pre=norm), True)
    dtypes = (torch.float32, torch.bfloat16) if normed else (torch.float32,)
    check(model_of([layer, layer, layer]), target, dtypes)
    # one sublayer alone is what the layer gives
    check(model_of([layer, (None, layer[1], True), (attention, None, True)]), target, dtypes)


@targets
def test_a_norm_free_skipless_model_whose_first_attention_is_a_table(target: str) -> None:
    plain = {"residual": False, "pre": None}
    attention = replace(ATTENTION, o=None, **plain)
    first = replace(attention, q=None, k=None, v=None, table=True)
    mlp = replace(PLAIN_MLP, **plain)
    layers = [(first, mlp, False), (pivoted(attention), mlp, False), (replace(attention, q=None), mlp, False)]
    check(model_of(layers, final_norm=None), target, (torch.float32,))


@targets
@pytest.mark.parametrize("name", ["table", "pivoted", "shaped", "alibi", "triangular query and output", "shortcut"])
def test_neighbours_of_a_dropped_sublayer(name: str, target: str) -> None:
    spec = model_of(
        [(ATTENTION, PLAIN_MLP, False), (ATTENTIONS[name], PLAIN_MLP, False), (ATTENTION, PLAIN_MLP, False)]
    )
    for plan in (DropPlan((0, 2), ()), DropPlan((), (0, 1)), DropPlan((2,), (2,))):
        check(drop_sublayers(spec, plan), target, chunks=(64, 1))


@targets
@pytest.mark.parametrize("tied", [True, False])
def test_learned_positions(tied: bool, target: str) -> None:
    embedding = Embedding(vocab_size=VOCAB, size=D, scale=1.7, positions=300)
    attention = replace(ATTENTION, rope=None, pre=LAYER_NORM)
    spec = model_of(
        [(attention, PLAIN_MLP, False), (attention, None, False)],
        embedding=embedding,
        head=Head(linear=lin(D, VOCAB), tied=tied),
    )
    check(spec, target)
    # the tail may begin with the embedding itself
    check(drop_sublayers(spec, DropPlan((0, 1))), target, chunks=(64, 1))


@targets
def test_shortcuts_that_change_the_width(target: str) -> None:
    narrow = replace(ATTENTION, o=lin(24, 20), shortcut=lin(D, 20))
    wide = mlp_of(20, 40, shortcut=lin(20, 28, bias=True))
    wide = replace(wide, down=lin(40, 28), post=rms(28))
    replaced = Replacement(linear=lin(28, D), shortcut=lin(28, D))
    check(model_of([(narrow, wide, False), (None, replaced, False), (ATTENTION, PLAIN_MLP, False)]), target)


@targets
@pytest.mark.parametrize("heads", [1, 2, 3, 6, 12])
def test_alibi_of_any_number_of_heads(heads: int, target: str) -> None:
    alibi = attention_of(D, heads, 1, 6, rope=None, alibi=True)
    check(model_of([(alibi, PLAIN_MLP, False), (alibi, None, False)]), target)


@targets
@pytest.mark.parametrize("size", [16, 63, 64, 65, 130])
def test_triangular_maps_that_fill_no_panel(size: int, target: str) -> None:
    attention = attention_of(size, 1, 1, size, q=tri(size), o=tri(size, True), rope=None)
    mlp = mlp_of(size, size, sub=rms(size))
    layers = [(attention, replace(mlp, gate=tri(size), up=tri(size), down=tri(size)), False)]
    layers.append((replace(attention, v=tri(size)), replace(mlp, gate=None, up=tri(size)), False))
    ends = {"final_norm": rms(size), "head": Head(linear=lin(size, VOCAB), tied=False)}
    check(model_of(layers, embedding=Embedding(vocab_size=VOCAB, size=size), **ends), target)


@targets
def test_layers_that_differ_in_heads_and_widths(target: str) -> None:
    narrow = replace(
        ATTENTION, num_heads=2, num_kv_heads=1, head_dim=10, q=lin(D, 20), k=lin(D, 10), v=lin(D, 10), o=lin(20, D)
    )
    slim = replace(PLAIN_MLP, gate=lin(D, 8), up=lin(D, 8), down=lin(8, D))
    spec = model_of(
        [(ATTENTION, slim, False), (narrow, PLAIN_MLP, False), (REPLACEMENT, slim, False), (narrow, None, True)]
    )
    check(spec, target)


@targets
@pytest.mark.parametrize(
    "changes",
    [
        {"final_norm": None},
        {"final_norm": LAYER_NORM},
        {"head": Head(linear=lin(D, VOCAB), tied=True)},
        {"head": Head(linear=lin(D, VOCAB, bias=True), tied=False, softcap=2.0)},
    ],
    ids=["no final norm", "layer norm", "tied", "bias and softcap"],
)
def test_ends(changes: dict[str, Any], target: str) -> None:
    check(model_of([(ATTENTION, PLAIN_MLP, False)], **changes), target)


@targets
@pytest.mark.parametrize("normed", [True, False])
def test_a_skipless_model_whose_stream_changes_width(normed: bool, target: str) -> None:
    widening = replace(PLAIN_MLP, residual=False, pre=rms() if normed else None, down=lin(40, 30))
    last = replace(ATTENTION, residual=False, pre=None, q=lin(30, 24), k=lin(30, 12), v=lin(30, 12), o=lin(24, D))
    # without a norm the scores are so large that the rounding to bfloat16 chooses the greatest one
    dtypes = (torch.float32, torch.bfloat16) if normed else (torch.float32,)
    check(model_of([(ATTENTION, widening, False), (last, PLAIN_MLP, False)]), target, dtypes)


@targets
@pytest.mark.parametrize("head_dim", [6, 10, 24, 80])
@pytest.mark.parametrize("heads", [(1, 1), (6, 2), (5, 1)], ids=str)
def test_head_sizes(heads: tuple[int, int], head_dim: int, target: str) -> None:
    wide = attention_of(D, *heads, head_dim)
    partly = replace(wide, rope=replace(ROPE, dim=head_dim // 2 // 2 * 2 or 2), q_norm=rms(head_dim))
    check(model_of([(wide, None, False), (partly, PLAIN_MLP, False)]), target)


@targets
@pytest.mark.parametrize("hidden", [1, 63, 100, 1000])
@pytest.mark.parametrize("size", [1, 63, 100])
def test_widths_that_fill_no_panel(size: int, hidden: int, target: str) -> None:
    layers = [(attention_of(size, 3, 1, 10, pre=rms(size)), mlp_of(size, hidden), False) for _ in range(2)]
    embedding = Embedding(vocab_size=61, size=size, scale=1.0)
    spec = model_of(layers, embedding=embedding, final_norm=rms(size), head=Head(linear=lin(size, 61), tied=False))
    # a stream of one value: each rounding is all of it, none is averaged out
    check(spec, target, factor=2 if size == 1 else 1)


@targets
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("vocab_size", [37, 61, 1000])
@pytest.mark.parametrize("size", [D, 33])
def test_vocabularies(size: int, vocab_size: int, tied: bool, target: str) -> None:
    layers = [(attention_of(size, 2, 1, 8), mlp_of(size, 40), False)]
    head = Head(linear=lin(size, vocab_size), tied=tied, softcap=3.0)
    embedding = Embedding(vocab_size=vocab_size, size=size, scale=1.7)
    check(model_of(layers, embedding=embedding, final_norm=rms(size), head=head), target)


@pytest.mark.parametrize("isa", _native.load().module.isa_available())
@pytest.mark.parametrize("name", ODD_MODELS)
def test_every_cpu_path(name: str, isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYRUNTIME_CPU_ISA", isa)
    check(ODD_MODELS[name], "cpu")


@pytest.mark.parametrize("isa", _native.load().module.isa_available())
@pytest.mark.parametrize("name", ODD_MODELS)
def test_every_cpu_path_over_several_blocks(name: str, isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache is of the plan's dtype: float32 and bfloat16."""
    monkeypatch.setenv("PYRUNTIME_CPU_ISA", isa)
    check(ODD_MODELS[name], "cpu", tokens=LONG, chunks=(256, 65, 9))
