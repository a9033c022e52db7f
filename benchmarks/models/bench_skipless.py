"""What merging Q and P away gains on a skipless, norm-free model of a published shape with random weights.

python benchmarks/models/bench_skipless.py --shape tinyllama-1.1b --shape mistral-7b --layers 3

Decode is predicted by the bytes that a step moves. Merged: the query is the stream itself, and no output projection is
left; pivoted: as many weights, and queries, keys and values scattered over the stream and the one projection. The
weights are random in every form, so the forms compute different functions: each is checked against its own reference.
Gates have a large bias: they are nearly constant, or every layer without a norm would square the size of what it reads
and the errors of half precision with it. One JSON per run in benchmarks/results/.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch

from pyruntime import PyruntimeError
from pyruntime.bench import (
    Ceilings,
    Comparison,
    check_plan,
    compare_plans,
    decode_case,
    random_model,
    save_results,
    shape_names,
    shape_spec,
)
from pyruntime.checkpoint import Model, Weight
from pyruntime.engine.memory import check_memory
from pyruntime.graph import build, fuse
from pyruntime.plan import Plan, lower
from pyruntime.spec import MLP, Attention, Layer, Linear, ModelSpec

RESULTS: Final = Path(__file__).parent.parent / "results"
FORMS: Final = ("merged", "pivoted")
# of random weights as they come (RandomWeight)
STD: Final = 0.02
GATE_BIAS: Final = 4.0


def main() -> int:
    """Run the benchmark; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", action="append", required=True, help=f"one of {', '.join(shape_names())}")
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--context", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=31, help="pairs of runs per case")
    parser.add_argument("--no-save", action="store_true", help="print only")
    arguments = parser.parse_args()
    try:
        rows = [row for shape in arguments.shape for row in run(arguments, shape)]
    except PyruntimeError as error:
        print(error.one_line(), file=sys.stderr)
        return error.exit_code
    if not arguments.no_save:
        print(f"written to {save_results(rows, RESULTS, f'skipless-{arguments.dtype}')}")
    return 0


def run(arguments: argparse.Namespace, shape: str) -> Iterator[dict[str, Any]]:
    """Measure every form of one shape against the unmerged model; rows for the result file."""
    spec = skipless(shape_spec(shape), arguments.layers)
    dense = sized_model(spec, arguments.dtype)
    check_memory(2 * dense.weight_bytes, f"two plans of {shape}")
    plan = checked_plan(dense)
    probe = Ceilings().probe(plan.dtype)
    case = decode_case(1, arguments.context)
    for form in FORMS:
        other = checked_plan(sized_model(merged(spec, form), arguments.dtype))
        (found,) = compare_plans(plan, other, [case], arguments.repeats, probe)
        low, high = found.measured_percentile(20), found.measured_percentile(80)
        print(
            f"{shape:<16} {form:<8} {case.name:<30} predicted {found.predicted:.4f}x  measured {found.measured:.4f}x "
            f"(p20 {low:.4f}, p80 {high:.4f})  best {best_of(found):.4f}x  "
            f"{found.measured / found.predicted:.1%} of the prediction, {best_of(found) / found.predicted:.1%} at best",
            flush=True,
        )
        yield as_row(found, other, shape, form, arguments)
        del other, found


def best_of(found: Comparison) -> float:
    """Ratio of the fastest runs: what else the machine does only ever slows one down."""
    return min(found.dense.seconds) / min(found.pruned.seconds)


def skipless(spec: ModelSpec, num_layers: int) -> ModelSpec:
    """The first layers of `spec` without residuals and norms."""
    bare: dict[str, Any] = {"residual": False, "pre": None, "post": None}
    layers = []
    for layer in spec.layers[:num_layers]:
        assert isinstance(layer.attention, Attention) and isinstance(layer.mlp, MLP)
        gate = None if layer.mlp.gate is None else replace(layer.mlp.gate, bias=True)
        mlp = replace(layer.mlp, gate=gate, **bare)
        layers.append(replace(layer, attention=replace(layer.attention, **bare), mlp=mlp))
    return replace(spec, layers=tuple(layers), final_norm=None)


def merged(spec: ModelSpec, form: str) -> ModelSpec:
    """Every layer without Q and P; pivoted ones read values from where a permutation says."""
    generator = torch.Generator().manual_seed(0)

    def attention_of(layer: Layer) -> Attention:
        attention = layer.attention
        assert isinstance(attention, Attention)
        bare = replace(attention, q=None, o=None)
        if form == "merged":
            return bare
        columns = torch.randperm(attention.q_size + 2 * attention.kv_size, generator=generator)
        rest = Linear(in_features=attention.in_size, out_features=2 * attention.kv_size)
        return replace(bare, k=None, v=None, columns=tuple(columns.tolist()), rest=rest)

    return replace(spec, layers=tuple(replace(layer, attention=attention_of(layer)) for layer in spec.layers))


@dataclass(frozen=True, slots=True)
class Sized:
    """A weight times a number, plus another."""

    weight: Weight
    factor: float
    centre: float = 0.0

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the tensor."""
        return self.weight.shape

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensor."""
        return self.weight.num_bytes

    def refs(self) -> Iterator[Weight]:
        """Itself."""
        yield self

    def read(self) -> torch.Tensor:
        """The tensor."""
        return self.weight.read() * self.factor + self.centre


def sized_model(spec: ModelSpec, dtype: str) -> Model:
    """Random weights under which a stream without norms keeps its size, but for what attention averages away."""
    model = random_model(spec, dtype)

    def sized(name: str, weight: Weight) -> Sized:
        if name == "embedding.weight":
            return Sized(weight, 1.0 / STD)
        if name.endswith("bias"):
            return Sized(weight, 1.0, GATE_BIAS)
        # a gate of 4 multiplies what down reads
        spread = 1.0 / math.sqrt(weight.shape[-1]) / (GATE_BIAS if name.endswith("down.weight") else 1.0)
        return Sized(weight, spread / STD)

    return replace(model, weights={name: sized(name, each) for name, each in model.weights.items()})


def checked_plan(model: Model) -> Plan:
    """The lowered plan, once its results passed the gate."""
    plan = lower(fuse(build(model.spec)), model, target="cpu")
    print(check_plan(plan, model).line(), flush=True)
    return plan


def as_row(each: Comparison, plan: Plan, shape: str, form: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """One comparison, JSON-ready."""
    return {
        "shape": shape,
        "form": form,
        "layers": arguments.layers,
        "dtype": arguments.dtype,
        "case": each.case.name,
        "threads": 1 if plan.program is None else plan.program.num_threads,
        "predicted": each.predicted,
        "measured": each.measured,
        "measured_p20": each.measured_percentile(20),
        "measured_p80": each.measured_percentile(80),
        "measured_best": best_of(each),
        "fraction_of_prediction": each.measured / each.predicted,
        "unmerged_bytes": each.dense_cost.num_bytes,
        "merged_bytes": each.pruned_cost.num_bytes,
        "unmerged_seconds": each.dense.seconds,
        "merged_seconds": each.pruned.seconds,
        "unmerged_fraction_of_read_bandwidth": each.dense.fractions_of_read(each.dense_cost.num_bytes),
        "merged_fraction_of_read_bandwidth": each.pruned.fractions_of_read(each.pruned_cost.num_bytes),
    }


if __name__ == "__main__":
    sys.exit(main())
