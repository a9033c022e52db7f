"""Mixtures of experts: which experts a row gets and what they count, beside float64 mathematics; what a step reads."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from pyruntime.graph import SequenceWork, build, cost_of, fuse
from pyruntime.ops.moe import MoeAttrs, reference
from pyruntime.plan import lower
from pyruntime.spec import MLP, Activation, DropPlan, MoE, drop_sublayers
from tests.helpers import all_logits, relative_error
from tests.specs import ATTENTION, PLAIN_MLP, D, lin, model_of, random_model, rms

WIDTH = 13
SHARED = MLP(gate=lin(D, 9), up=lin(D, 9), down=lin(9, D), activation=Activation.SILU)


def mixture(num_experts: int = 5, top_k: int = 2, **changes: Any) -> MoE:
    fields: dict[str, Any] = {
        "num_experts": num_experts,
        "top_k": top_k,
        "router": lin(D, num_experts),
        "gate": lin(D, WIDTH),
        "up": lin(D, WIDTH),
        "down": lin(WIDTH, D),
        "activation": Activation.SILU,
        "pre": rms(),
    }
    return MoE(**{**fields, **changes})


FORMS = {
    "two of five": mixture(),
    "one of five": mixture(top_k=1),
    "all of five": mixture(top_k=5),
    "one expert": mixture(1, 1),
    "not normalized": mixture(normalize=False),
    "scaled": mixture(normalize=False, routed_scale=2.5),
    "shared": mixture(shared=SHARED),
    "shared, gated": mixture(shared=SHARED, shared_gate=lin(D, 1)),
    "gelu": mixture(activation=Activation.GELU_TANH),
}


def random_weights(attrs: MoeAttrs, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        role: torch.randn(shape, generator=generator, dtype=torch.float64) * 0.4
        for role, shape in attrs.weight_shapes().items()
    }


def gated(kind: Activation, weights: dict[str, Any], prefix: str, x: Any) -> Any:
    gate = weights[f"{prefix}gate.weight"] @ x
    if kind is Activation.SILU:
        gate = gate / (1 + np.exp(-gate))
    else:
        gate = 0.5 * gate * (1 + np.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)))
    return weights[f"{prefix}down.weight"] @ (gate * (weights[f"{prefix}up.weight"] @ x))


def plainly(moe: MoE, tensors: dict[str, torch.Tensor], x: Any) -> Any:
    """One row, by the formulas: softmax of the router, the largest few, their weighted sum, the shared MLP."""
    weights = {role: tensor.numpy() for role, tensor in tensors.items()}
    scores = np.exp(weights["router.weight"] @ x)
    probabilities = scores / scores.sum()
    best = sorted(range(moe.num_experts), key=lambda expert: (-probabilities[expert], expert))[: moe.top_k]
    total = probabilities[best].sum() if moe.normalize else 1.0
    y = np.zeros(D)
    for expert in best:
        share = probabilities[expert] / total * moe.routed_scale
        y = y + share * gated(moe.activation, weights, f"experts.{expert}.", x)
    if moe.shared is not None:
        own = gated(moe.activation, weights, "shared.", x)
        y = y + (own / (1 + np.exp(-(weights["shared_gate.weight"] @ x))) if moe.shared_gate is not None else own)
    return y


@pytest.mark.parametrize("rows", [1, 2, 37])
@pytest.mark.parametrize("name", FORMS)
def test_rows_are_what_the_formulas_say(name: str, rows: int) -> None:
    attrs = MoeAttrs(FORMS[name])
    weights = random_weights(attrs)
    x = torch.randn(rows, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (found,) = reference(attrs, weights, (x,), None)  # type: ignore[arg-type]
    expected = np.stack([plainly(FORMS[name], weights, row) for row in x.numpy()])
    assert np.abs(found.numpy() - expected).max() < 1e-12 * np.abs(expected).max()


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_of_equal_experts_the_lower_numbers_are_chosen(top_k: int) -> None:
    attrs = MoeAttrs(mixture(top_k=top_k))
    weights = random_weights(attrs)
    # 0 is less probable, 1 to 4 are equally so
    weights["router.weight"] = torch.zeros(5, D, dtype=torch.float64)
    weights["router.weight"][0] = -1.0
    x = torch.ones(3, D, dtype=torch.float64)
    (found,) = reference(attrs, weights, (x,), None)  # type: ignore[arg-type]
    arrays = {role: tensor.numpy() for role, tensor in weights.items()}
    chosen = range(1, 1 + top_k)
    expected = sum(gated(Activation.SILU, arrays, f"experts.{expert}.", x[0].numpy()) for expert in chosen) / top_k
    assert np.abs(found.numpy() - expected).max() < 1e-12


def test_the_router_is_not_rounded_to_the_dtype_of_the_weights() -> None:
    """transformers takes the softmax in float32 whatever the weights are: 1 / 3 is not the nearest bfloat16."""
    attrs = MoeAttrs(mixture(3, 3))
    weights = {role: tensor.bfloat16() for role, tensor in random_weights(attrs).items()}
    weights["router.weight"].zero_()
    for expert in range(3):
        weights[f"experts.{expert}.down.weight"] = weights["experts.0.down.weight"]
        weights[f"experts.{expert}.gate.weight"] = weights["experts.0.gate.weight"]
        weights[f"experts.{expert}.up.weight"] = weights["experts.0.up.weight"]
    x = torch.randn(4, D, generator=torch.Generator().manual_seed(2))
    (found,) = reference(attrs, weights, (x,), None)  # type: ignore[arg-type]
    one = replace(attrs.moe, num_experts=1, top_k=1, router=lin(D, 1))
    alone = {role: each for role, each in weights.items() if role.startswith(("experts.0.", "router"))}
    (expected,) = reference(MoeAttrs(one), alone, (x,), None)  # type: ignore[arg-type]
    assert (found - expected).abs().max() < 1e-6


SPEC = model_of(
    [(ATTENTION, mixture(shared=SHARED), False), (ATTENTION, PLAIN_MLP, False), (ATTENTION, mixture(4, 1), False)]
)
TOKENS = [(5 * i * i + 3 * i) % 37 for i in range(21)]


def test_on_cpu_a_mixture_is_the_one_step_that_the_reference_runs() -> None:
    model = random_model(SPEC, torch.float32)
    plan = lower(fuse(build(SPEC)), model, target="cpu")
    assert {step.node.op for step in plan.steps if step.implementation.target == "reference"} == {"moe"}
    assert "cpu has no moe" in plan.explain()
    oracle = lower(build(SPEC), model, dtype="float64")
    (expected,) = all_logits(oracle, [TOKENS], 64)
    for chunk in (64, 1, 7):
        (found,) = all_logits(plan, [TOKENS], chunk)
        assert relative_error(found, expected) < 1e-5


def test_a_dropped_mixture_has_no_node() -> None:
    nodes = build(drop_sublayers(SPEC, DropPlan((), (0, 2)))).nodes
    assert not any(node.op == "moe" or node.name.startswith(("layers.0.mlp", "layers.2.mlp")) for node in nodes)


def values(moe: MoE) -> tuple[int, int]:
    """Weights of everything but the experts, and of one expert."""
    shared = 0 if moe.shared is None else 3 * D * 9
    return moe.num_experts * D + shared, 3 * D * WIDTH


@pytest.mark.parametrize("rows", [1, 2, 5, 1000])
def test_a_step_is_priced_by_the_experts_that_it_is_expected_to_read(rows: int) -> None:
    """By counting: 4000 draws of `rows` rows, each with two experts of five."""
    moe = mixture(shared=SHARED)
    spec = model_of([(ATTENTION, moe, False)])
    cost = cost_of(build(spec).nodes, [SequenceWork(0, rows, rows)], 2)["layers.0.mlp.moe"]
    rng = np.random.default_rng(0)
    draws = [len({int(e) for _ in range(min(rows, 60)) for e in rng.choice(5, 2, replace=False)}) for _ in range(4000)]
    rest, expert = values(moe)
    assert cost.weight_bytes == pytest.approx(2 * (rest + np.mean(draws) * expert), rel=0.01)
    assert cost.flops == rows * 2 * (rest + 2 * expert)


def test_one_row_reads_its_own_experts_and_no_more() -> None:
    moe = mixture(7, 3)
    rest, expert = values(moe)
    assert MoeAttrs(moe).values_read(1) == pytest.approx(rest + 3 * expert)
    assert MoeAttrs(mixture(7, 7)).values_read(9) == pytest.approx(rest + 7 * expert)
