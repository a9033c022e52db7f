"""The figures of docs/rewrites.md are those of the reports."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from pyruntime.bench.random_model import random_model
from pyruntime.bench.shapes import shape_spec
from pyruntime.checkpoint import Model
from pyruntime.passes import drop
from pyruntime.passes.fold import (
    centre_layer_norms,
    fold_biases,
    fold_mlp_prefix,
    fold_norms,
    fold_reports,
    slim,
    tabulate_first_layer,
)
from pyruntime.spec import Cached, DropPlan

DOCS = Path(__file__).parents[2] / "docs" / "rewrites.md"

ROWS: dict[tuple[str, str], tuple[str, Callable[[Model], Model]]] = {
    ("`fold_norms`", "Llama-3-8B"): ("llama-3-8b", fold_norms),
    ("`fold_norms`", "Llama-3.2-1B (tied)"): ("llama-3.2-1b", fold_norms),
    ("`centre_layer_norms`", "Pythia-6.9B"): ("pythia-6.9b", centre_layer_norms),
    ("`fold_norms` behind it", "Pythia-6.9B"): ("pythia-6.9b", lambda model: fold_norms(centre_layer_norms(model))),
    ("`fold_biases`", "Pythia-6.9B"): ("pythia-6.9b", fold_biases),
    ("`tabulate_first_layer`", "Mistral-7B"): ("mistral-7b", tabulate_first_layer),
    ("`tabulate_first_layer`", "Pythia-6.9B"): ("pythia-6.9b", tabulate_first_layer),
    ("`fold_mlp_prefix`", "Llama-2-7B without attention 0"): (
        "llama-2-7b",
        lambda model: fold_mlp_prefix(drop(model, DropPlan(attention=(0,)))),
    ),
    ("`slim` inputs", "Llama-2-7B"): ("llama-2-7b", lambda model: slim(model, Cached.INPUTS)),
}


def row(name: str, model: str, shape: str, rewrite: Callable[[Model], Model]) -> str:
    report = fold_reports(rewrite(random_model(shape_spec(shape), "bfloat16")))[-1]
    saved = (report.num_weights, report.weight_bytes, report.flops_per_token, 2 * report.kv_values_per_token)
    return f"| {name} | {model} | {' | '.join(f'{count:,}' for count in saved)} |"


@pytest.mark.parametrize("key", ROWS)
def test_docs_show_what_reports_say(key: tuple[str, str]) -> None:
    assert row(*key, *ROWS[key]) in DOCS.read_text().splitlines()
