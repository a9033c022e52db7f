"""No speed without a green gate."""

from __future__ import annotations

import dataclasses
import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pyruntime.bench import (
    ForwardLoad,
    RequestLoad,
    bench_forward,
    bench_latency,
    bench_throughput,
    ceilings,
    check_plan,
    nmse_of,
    run,
)
from pyruntime.bench.gate import LIMITS
from pyruntime.cli import bench as cli_bench
from pyruntime.cli.main import run as run_command
from pyruntime.engine.load import Loaded
from pyruntime.errors import RunError
from pyruntime.plan import Plan
from pyruntime.spec import DropPlan
from tests.helpers import all_logits, hf_logits, make_plan, pruned_model, without

MakeLlama = Callable[..., tuple[Path, Any]]
PATTERN = DropPlan(attention=(0, 2), mlp=(1,))
# what the gate runs, spread over a vocabulary of 61: as much of 70 tokens as the model holds, and 5 tokens
GATE_SEQUENCES = [[k * 7919 % 61 for k in range(64)], [k * 7919 % 61 for k in range(1, 6)]]


def spoil(plan: Plan, place: int, factor: float) -> Plan:
    """`plan` with every weight of one step multiplied."""
    steps = list(plan.steps)
    weights = {role: weight * factor for role, weight in steps[place].weights.items()}
    steps[place] = dataclasses.replace(steps[place], weights=weights)
    return dataclasses.replace(plan, steps=tuple(steps))


def loaded_with(folder: Path, plan: Plan) -> Loaded:
    model = pruned_model(folder, PATTERN)
    return Loaded(model=model, plan=plan, tokenizer=None, generation_config={}, eos_token_ids=())


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
def test_an_honest_plan_passes_with_its_distance_from_transformers(make_llama: MakeLlama, dtype: str) -> None:
    folder, hf_model = make_llama()
    result = check_plan(make_plan(folder, PATTERN, dtype), pruned_model(folder, PATTERN))
    assert result.nmse <= result.limit == LIMITS[getattr(torch, dtype)]
    # the same figure from transformers in float64, over the tokens that the gate runs
    found = torch.cat(all_logits(make_plan(folder, PATTERN, dtype), GATE_SEQUENCES, 64))
    oracle = without(hf_model, PATTERN).double()
    expected = torch.cat([hf_logits(oracle, sequence) for sequence in GATE_SEQUENCES])
    theirs = float((found.double() - expected).square().sum() / expected.square().sum())
    assert result.nmse == pytest.approx(theirs, rel=0.05, abs=1e-12)


def test_nmse_is_the_squared_error_over_the_squared_values() -> None:
    expected = torch.tensor([3.0, -4.0, 0.0, 12.0])
    found = torch.tensor([3.0, -4.5, 1.0, 12.0])
    assert nmse_of(found, expected) == pytest.approx((0.25 + 1.0) / (9 + 16 + 144))
    assert nmse_of(expected, expected) == 0


def test_any_spoilt_step_fails_the_gate(make_llama: MakeLlama) -> None:
    folder, _ = make_llama()
    plan, model = make_plan(folder, PATTERN), pruned_model(folder, PATTERN)
    spoilt_steps = [i for i, step in enumerate(plan.steps) if step.weights]
    assert len(spoilt_steps) > 5
    for place in spoilt_steps:
        with pytest.raises(RunError, match="NMSE") as failure:
            check_plan(spoil(plan, place, 1.01), model)
        assert (failure.value.code, failure.value.exit_code) == ("NUMERICS", 4)


def test_nan_and_another_drop_pattern_fail_the_gate(make_llama: MakeLlama) -> None:
    folder, _ = make_llama()
    model = pruned_model(folder, PATTERN)
    for wrong in (
        spoil(make_plan(folder, PATTERN), 0, torch.nan),
        make_plan(folder),
        make_plan(folder, DropPlan((0,))),
    ):
        with pytest.raises(RunError, match="NMSE"):
            check_plan(wrong, model)


@pytest.mark.parametrize(
    ("dtype", "bytes_per_weight", "oracle"),
    [
        ("float32", 16, "float64"),
        ("float32", 15, None),
        ("bfloat16", 16, "float64"),
        ("bfloat16", 15, "float32"),
        ("float16", 8, "float32"),
        ("bfloat16", 7, None),
    ],
)
def test_the_check_takes_the_best_reference_that_fits_or_none_is_made(
    make_llama: MakeLlama, monkeypatch: pytest.MonkeyPatch, dtype: str, bytes_per_weight: int, oracle: str | None
) -> None:
    folder, _ = make_llama()
    plan, model = make_plan(folder, PATTERN, dtype), pruned_model(folder, PATTERN)
    # the op with the most weights is an MLP: three matrices and the gains of its norm
    monkeypatch.setattr("pyruntime.bench.gate.available_memory", lambda: (3 * 32 * 56 + 32) * bytes_per_weight)
    if oracle is not None:
        result = check_plan(plan, model)
        assert result.line() == f"gate: NMSE {result.nmse:.1e} against {oracle} (limit {LIMITS[plan.dtype]:.0e})"
        with pytest.raises(RunError, match=f"NMSE of .* against {oracle}"):
            check_plan(spoil(plan, -1, 1.1), model)
    else:
        with pytest.raises(RunError, match=r"needs .* GiB.* no time is printed without") as refusal:
            check_plan(plan, model)
        assert (refusal.value.code, refusal.value.exit_code) == ("MEMORY", 7)


def test_logits_of_two_devices_are_compared() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found, expected = torch.ones(3, device=device), torch.full((3,), 2.0)
    assert nmse_of(found, expected) == nmse_of(found.cpu(), expected.to(device)) == 0.25


def test_nothing_is_timed_behind_a_red_gate(make_llama: MakeLlama, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = make_llama()
    loaded = loaded_with(folder, spoil(make_plan(folder, PATTERN), -1, 1.01))

    def forbidden(*_: Any, **__: Any) -> Any:
        raise AssertionError("something was timed")

    for name in ("interleaved", "sampled", "Ceilings", "_generate"):
        monkeypatch.setattr(run, name, forbidden)
    load = RequestLoad(num_prompts=1, input_len=2, output_len=2)
    for measure in (
        lambda: bench_latency(loaded, load, 1, 0),
        lambda: bench_throughput(loaded, load),
        lambda: bench_forward(loaded, ForwardLoad(prompt_lens=(4,), depth=4), 2),
    ):
        with pytest.raises(RunError, match="NMSE"):
            measure()


@pytest.mark.parametrize("command", ["latency", "throughput", "forward"])
def test_the_command_prints_no_time_behind_a_red_gate(
    make_llama: MakeLlama, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    folder, _ = make_llama()
    plan = make_plan(folder, PATTERN)
    sizes = ["-p", "4", "-d", "4", "-r", "2"] if command == "forward" else ["--input-len", "4", "--output-len", "2"]
    monkeypatch.setattr(ceilings, "_BUFFER_BYTES", 1 << 21)
    for each, code in ((plan, 0), (spoil(plan, -1, 1.01), 4)):
        loaded = loaded_with(folder, each)
        monkeypatch.setattr(cli_bench, "load", lambda *_, _loaded=loaded, **__: _loaded)
        assert run_command(["bench", command, str(folder), *sizes, "--json"]) == code
        out, err = capsys.readouterr()
        if code == 0:
            assert json.loads(out)
        else:
            assert out == ""
            assert err.startswith("error[NUMERICS]: ")


def test_the_reference_holds_the_weights_of_one_op_at_a_time(
    make_llama: MakeLlama, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = make_llama()
    plan, model = make_plan(folder, PATTERN), pruned_model(folder, PATTERN)
    alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
    most = 0
    honest = type(next(iter(model.weights.values()))).read

    def read(weight: Any) -> torch.Tensor:
        nonlocal most
        found = honest(weight).double()
        alive.add(found)
        most = max(most, sum(tensor.numel() for tensor in alive))
        return found

    monkeypatch.setattr(type(next(iter(model.weights.values()))), "read", read)
    check_plan(plan, model)
    # an MLP, and the op before it while its variables still stand
    assert 0 < most <= 2 * (3 * 32 * 56 + 32)
