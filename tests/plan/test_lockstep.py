"""The reference and the C++ target walk side by side: buffers and cache agree, and a fault is found by name."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from pyruntime.errors import UsageError
from pyruntime.graph import build, fuse
from pyruntime.ops.step import SequenceSlice
from pyruntime.plan import Plan, first_difference, lower
from pyruntime.spec import DropPlan, ModelSpec, drop_sublayers
from tests.specs import ATTENTION, ATTENTIONS, MLPS, ODD_MODELS, PLAIN_MLP, REPLACEMENT, model_of, random_model
from tests.stepwise import PAGE_SIZE, advancing, errors

LENGTHS = (37, 1, 16, 17)
LAYERS = [(ATTENTION, PLAIN_MLP, False) for _ in range(4)]
# float32 against float64; errors of a buffer over its root mean square
LIMIT = 1e-4


def runs(chunk: int) -> list[list[SequenceSlice]]:
    """Steps that advance all sequences by `chunk` tokens; each wants its first and last token of the step."""
    return advancing(LENGTHS, [chunk] * -(-max(LENGTHS) // chunk))


def plans(spec: ModelSpec, dtype: torch.dtype, fused: bool = True) -> tuple[Plan, Plan]:
    """The reference in float64 and the C++ plan, with the same weights, rounded to `dtype`."""
    model = random_model(spec, dtype)
    graph = fuse(build(spec)) if fused else build(spec)
    found = lower(graph, model, target="cpu")
    assert found.dtype is dtype
    assert all(step.native is not None for step in found.steps)
    return lower(graph, model, dtype="float64"), found


SPECS = {
    "plain": model_of(LAYERS),
    "first attention dropped": drop_sublayers(model_of(LAYERS), DropPlan((0,))),
    "last attentions dropped": drop_sublayers(model_of(LAYERS), DropPlan((2, 3))),
    "all attentions dropped": drop_sublayers(model_of(LAYERS), DropPlan((0, 1, 2, 3))),
    "mlps dropped": drop_sublayers(model_of(LAYERS), DropPlan((), (1, 2))),
    "parallel": model_of([(ATTENTION, PLAIN_MLP, True)] * 3),
    "replaced and merged": model_of(
        [(REPLACEMENT, PLAIN_MLP, False), (ATTENTIONS["all merged"], REPLACEMENT, False), (ATTENTION, None, False)]
    ),
    "parallel without residuals, shortcuts, a table": model_of(
        [
            (ATTENTIONS["table with norms"], MLPS["shortcut"], False),
            (replace(ATTENTION, residual=False), replace(PLAIN_MLP, residual=False), True),
            (ATTENTIONS["shortcut"], MLPS["gate alone triangular"], False),
        ]
    ),
    "pivoted, triangular, shaped": model_of(
        [
            (ATTENTIONS["pivoted with norms"], MLPS["triangular"], False),
            (ATTENTIONS["triangular query and output"], PLAIN_MLP, False),
            (ATTENTIONS["alibi with window, softcap and gains"], None, False),
        ]
    ),
    "norms, biases, window": model_of(
        [
            (replace(ATTENTIONS["norms per head"], window=19), MLPS["sub and post norm"], False),
            (replace(ATTENTIONS["biases"], softcap=1.5), MLPS["biases"], False),
        ]
    ),
}


both = pytest.mark.parametrize("fused", [True, False], ids=["fused", "unfused"])


@both
@pytest.mark.parametrize("name", SPECS)
def test_every_buffer_and_the_cache_equal_the_references(name: str, fused: bool) -> None:
    expected, found = plans(SPECS[name], torch.float32, fused)
    for chunk in (64, 5, 1):
        assert first_difference(expected, found, runs(chunk), page_size=PAGE_SIZE, limit=LIMIT) is None


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [*SPECS, *ODD_MODELS])
def test_every_step_alone_equals_the_reference_of_what_it_read(name: str, dtype: torch.dtype, fused: bool) -> None:
    """Errors of the steps before it are no excuse: its own are those of float32, and of one rounding to bfloat16."""
    expected, found = plans({**SPECS, **ODD_MODELS}[name], dtype, fused)
    for steps in (runs(64), runs(5), LONG_RUNS if name in ODD_MODELS else runs(1)):
        assert [each for each in errors(expected, found, steps) if each.wrong] == []


def test_a_wrong_step_of_a_bfloat16_plan_is_seen_and_no_other() -> None:
    expected, found = plans(SPECS["plain"], torch.bfloat16)
    # the exponent of one of some hundred weights
    weight_of("layers.2.attention.o", found).view(torch.int16)[0, 0, 0] ^= 1 << 9
    wrong = [each.step for each in errors(expected, found, runs(5)) if each.wrong]
    assert wrong == ["layers.2.attention.o"]


def weight_of(step_name: str, plan: Plan) -> torch.Tensor:
    """The matrix (or else the first weight) of a step, as float32 values that the kernels read."""
    (step,) = (step for step in plan.steps if step.node.name == step_name)
    names = sorted(step.weights, key=lambda name: not name.endswith(("matrix", "gate_up", "table")))
    weight = step.weights[names[0]]
    return weight if weight.dtype is torch.float32 else weight.view(torch.float32)


# around the borders of attention's blocks of 64 positions, and far behind a window of 70
LONG_RUNS = advancing((63, 64, 65, 129, 200), (63, 1, 1, 64, 50, 21))
STEPS = [step.node.name for step in plans(SPECS["last attentions dropped"], torch.float32)[1].steps if step.weights]


@pytest.mark.parametrize("name", STEPS)
def test_a_step_with_a_wrong_weight_is_named(name: str) -> None:
    expected, found = plans(SPECS["last attentions dropped"], torch.float32)
    weight = weight_of(name, found)
    # one value of a panel's first outputs, and of a token that occurs
    weight.flatten()[0] += 0.1
    difference = first_difference(expected, found, runs(5), page_size=PAGE_SIZE, limit=LIMIT)
    assert difference is not None
    assert difference.step == name
    assert difference.op in str(difference)
    assert difference.buffer in str(difference)


def test_a_wrong_value_projection_is_seen_in_the_cache() -> None:
    expected, found = plans(SPECS["plain"], torch.float32)
    # columns 0 to 23 are queries, 24 to 35 keys, 36 to 47 values: the third panel holds output 36 in lane 4
    weight_of("layers.1.attention.qkv", found)[2, 0, 4] += 0.1
    difference = first_difference(expected, found, runs(64), page_size=PAGE_SIZE, limit=LIMIT)
    assert difference is not None
    assert (difference.step, difference.buffer) == ("layers.1.attention.qkv", "values of cache slot 1")


def test_a_nan_is_a_difference() -> None:
    expected, found = plans(SPECS["plain"], torch.float32)
    weight_of("layers.2.mlp.mlp", found)[0, 0, 0, 0] = torch.nan
    difference = first_difference(expected, found, runs(64), page_size=PAGE_SIZE, limit=1e9)
    assert difference is not None
    assert (difference.step, difference.error) == ("layers.2.mlp.mlp", float("inf"))


def test_a_later_run_is_named() -> None:
    """Only tokens behind the first chunk have the id whose embedding is wrong."""
    expected, found = plans(SPECS["plain"], torch.float32)
    steps = runs(5)
    first = {token for each in steps[0] for token in each.token_ids}
    later = next(t for each in steps[1] for t in each.token_ids if t not in first)
    weight_of("embed", found)[later] += 1.0
    difference = first_difference(expected, found, steps, page_size=PAGE_SIZE, limit=LIMIT)
    assert difference is not None
    assert (difference.run, difference.step) == (1, "embed")


def test_plans_of_different_graphs_are_refused() -> None:
    one, other = (plans(SPECS[name], torch.float32)[0] for name in ("plain", "parallel"))
    with pytest.raises(UsageError, match="different steps"):
        first_difference(one, other, runs(64), page_size=PAGE_SIZE, limit=1.0)
