"""The self-check of GPU kernels: what is right passes, and a launch that is wrong, unsteady or impossible is found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from pyruntime.bench.selfcheck.judge import Found
from pyruntime.bench.selfcheck.models import graphs, model_of
from pyruntime.bench.selfcheck.sampling import check_sampler
from pyruntime.bench.selfcheck.walk import check_plan
from pyruntime.graph import without_tail
from pyruntime.ops.gpu.frame import Frame, Launch
from pyruntime.plan import Plan, lower
from tests.gpu.helpers import DEVICE

SPEC, GRAPH = graphs()[2]
MODEL = model_of(SPEC, torch.float32)
# its prompt's steps and its decode steps
OPS = {node.op for graph in (GRAPH, without_tail(GRAPH)) for node in graph.nodes}


def plan_with(change: Callable[[Launch], Launch]) -> Plan:
    """The plan with the launches of its MLPs changed."""
    plan = lower(GRAPH, MODEL, target="cuda", device=str(DEVICE))
    assert plan.gpu is not None
    forms = {
        form: tuple(
            replace(step, launch=change(step.launch)) if step.node.op == "mlp" and step.launch else step
            for step in getattr(plan.gpu.steps, form)
        )
        for form in ("prefill", "decode")
    }
    plan.gpu.steps = replace(plan.gpu.steps, **forms)
    return plan


def found_in(plan: Plan) -> Found:
    found = Found()
    check_plan(plan, GRAPH, MODEL, found)
    return found


def test_kernels_and_sampler_pass() -> None:
    found = Found()
    plan = plan_with(lambda launch: launch)
    check_plan(plan, GRAPH, MODEL, found)
    check_sampler(plan, found)
    assert found.wrong == {}
    assert set(found.nmse) == OPS | {"sample"}


def test_a_wrong_value_fails_its_op_and_no_other() -> None:
    def off_by_one_value(launch: Launch) -> Launch:
        def wrong(frame: Frame) -> None:
            launch(frame)
            frame.outputs[0][-1, 3] += 0.5

        return wrong

    assert set(found_in(plan_with(off_by_one_value)).wrong) == {"mlp"}


def test_a_value_that_is_not_written_fails_its_op() -> None:
    assert set(found_in(plan_with(lambda launch: lambda frame: None)).wrong) == {"mlp"}


def test_a_launch_that_raises_fails_its_op_and_the_others_go_on() -> None:
    def raising(launch: Launch) -> Launch:
        def wrong(frame: Frame) -> None:
            raise RuntimeError("no kernel image is available\nfor execution")

        return wrong

    found = found_in(plan_with(raising))
    assert set(found.wrong) == {"mlp"}
    assert found.wrong["mlp"].endswith("RuntimeError: no kernel image is available")
    assert set(found.nmse) == OPS
    assert all(nmse < 1e-6 for op, nmse in found.nmse.items() if op != "mlp")


@pytest.mark.skipif(DEVICE.type == "cpu", reason="the interpreter launches once: nothing can race")
def test_other_bits_at_the_second_launch_fail_their_op() -> None:
    count = 0

    def unsteady(launch: Launch) -> Launch:
        def wrong(frame: Frame) -> None:
            nonlocal count
            launch(frame)
            count += 1
            frame.outputs[0].mul_(1 + 1e-6 * count)

        return wrong

    assert "other bits" in found_in(plan_with(unsteady)).wrong["mlp"]
