"""What merges say that they save: the weights that a token reads, and the bytes of what is gone."""

from __future__ import annotations

from dataclasses import replace

from pyruntime.passes.merge import MergeOptions, merge, read_per_token
from pyruntime.spec import Activation, MoE
from tests.passes.skipless import attention, lin, mlp, model_of, skipless, weights_of
from tests.passes.test_merge import BASE, report_of


def test_weights_that_a_token_reads_leave_the_table_out() -> None:
    spec = skipless([(attention(), mlp())], positions=64)
    layer = 24 * 24 + 2 * 24 * 12 + 24 * 24 + 3 * 24 * 40
    assert read_per_token(spec) == layer + 24 + 61 * 24
    tied = replace(spec, head=replace(spec.head, tied=True))
    assert read_per_token(tied) == layer + 24 + 61 * 24


def test_weights_that_a_token_reads_are_those_of_the_experts_it_goes_to() -> None:
    experts = MoE(
        num_experts=8, top_k=2, router=lin(24, 8, True), gate=lin(24, 16), up=lin(24, 16, True), down=lin(16, 24),
        activation=Activation.SILU, residual=False, shared=mlp(ffn=10),
    )  # fmt: skip
    one = 3 * 24 * 16 + 16
    layer = 24 * 24 + 2 * 24 * 12 + 24 * 24 + (24 * 8 + 8) + 2 * one + 3 * 24 * 10
    assert read_per_token(skipless([(attention(), experts)])) == layer + 24 + 61 * 24


def test_weights_that_a_token_reads_leave_looked_up_queries_out() -> None:
    layer = 24 * 24 + 3 * 24 * 40
    spec = skipless([(attention(q=None, k=None, v=None, table=True), mlp())])
    assert read_per_token(spec) == layer + 24 + 61 * 24


def test_bytes_saved_are_those_of_the_weights_that_are_gone() -> None:
    spec = BASE["gqa, glu"]
    model = model_of(spec, weights_of(spec))
    report = report_of(merge(model, MergeOptions(dtype="float32", store_dtype="float32")))
    assert report.weight_bytes == 4 * 3 * 2 * 24 * 24
