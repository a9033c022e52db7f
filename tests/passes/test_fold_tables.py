"""What depends on the token alone becomes a table, and the published savings are the ones reported."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from pyruntime.bench.random_model import random_model as shaped_model
from pyruntime.bench.shapes import shape_spec
from pyruntime.passes import drop
from pyruntime.passes.fold import fold_mlp_prefix, fold_norms, fold_reports, tabulate_first_layer
from pyruntime.spec import Attention, Cached, DropPlan, Embedding, Layer, Linear, ModelSpec
from tests.passes import folds
from tests.specs import ATTENTION, ATTENTIONS, MLPS, PLAIN_MLP, REPLACEMENT, VOCAB, D, lin, model_of, random_model, rms

# queries, keys and values as columns of the input and 20 values computed of it
PACKED = replace(
    ATTENTION,
    q=None,
    k=None,
    v=None,
    columns=(*range(28, 44), *range(24), *range(24, 28), *range(44, 48)),
    rest=lin(D, 24, True),
)


def tabulable(attention: object) -> bool:
    """Whether nothing forbids a table."""
    return isinstance(attention, Attention) and attention.cached is Cached.KEYS_VALUES and not attention.table


@pytest.mark.parametrize("name", folds.MODELS)
def test_table_changes_no_logit(name: str) -> None:
    model = random_model(folds.MODELS[name])
    folds.assert_same(tabulate_first_layer(model), model)
    folds.assert_same(tabulate_first_layer(fold_norms(model)), model)


@pytest.mark.parametrize("name", [name for name, each in ATTENTIONS.items() if tabulable(each)])
def test_every_kind_of_attention_may_have_a_table(name: str) -> None:
    model = random_model(model_of([(ATTENTIONS[name], PLAIN_MLP, False), (ATTENTION, PLAIN_MLP, False)]))
    tabulated = tabulate_first_layer(model)
    attention = tabulated.spec.layers[0].attention
    assert isinstance(attention, Attention) and attention.table
    folds.assert_same(tabulated, model)


def test_table_of_columns_holds_what_the_columns_name() -> None:
    model = random_model(model_of([(PACKED, None, False)]))
    table = tabulate_first_layer(model).weights["layers.0.attention.table.weight"].read()
    x = model.weights["embedding.weight"].read() * 1.7
    x = x / (x.square().mean(1, keepdim=True) + 1e-5).sqrt() * model.weights["layers.0.attention.pre.weight"].read()
    rest = x @ model.weights["layers.0.attention.rest.weight"].read().T
    rest = rest + model.weights["layers.0.attention.rest.bias"].read()
    assert PACKED.columns is not None
    for place, column in enumerate(PACKED.columns):
        expected = x[:, column] if column < D else rest[:, column - D]
        assert (table[:, place] - expected).abs().max() < 1e-12


@pytest.mark.parametrize(
    "spec, reason",
    [
        (model_of([(None, PLAIN_MLP, False), (ATTENTION, None, False)]), "mlp 0 reads the stream first"),
        (model_of([(REPLACEMENT, PLAIN_MLP, False)]), "attention 0 reads the stream first and is no attention"),
        (folds.MODELS["gpt2, learned positions"], "learned positions"),
        (model_of([(None, None, False)]), "no sublayer is left"),
        (model_of([(replace(ATTENTION, cached=Cached.INPUTS), None, False)]), "attention 0 caches inputs"),
        (
            model_of(
                [(replace(ATTENTION, residual=False, o=lin(24, 10)), None, False)],
                final_norm=rms(10),
                head=replace(folds.UNTIED, linear=lin(10, VOCAB)),
            ),
            "attention 0 gives 10 values from 24",
        ),
    ],
)
def test_what_cannot_have_a_table_says_why(spec: ModelSpec, reason: str) -> None:
    kept = tabulate_first_layer(random_model(spec))
    assert kept.spec == spec and kept.reports[-1].notes[0].startswith(reason)


def test_parallel_mlp_goes_into_the_embedding() -> None:
    model = random_model(folds.MODELS["gpt_neox, parallel"])
    tabulated = tabulate_first_layer(model)
    layer = tabulated.spec.layers[0]
    assert layer.mlp is None and isinstance(layer.attention, Attention) and layer.attention.table
    assert tabulated.reports[-1].removed == ("mlp 0",)
    assert not any(name.startswith("layers.0.mlp") for name in tabulated.weights)


# table 1 of arXiv 2402.13388: weights gone, values read for one token before and after, how many times less for 1, 16
# and 256 tokens, and the growth in memory
PUBLISHED = {
    "mistral-7b": (25_165_824, 25_169_920, 10_240, (2_458, 154, 10), 171e6),
    "pythia-6.9b": (184_549_376, 184_553_472, 16_384, (11_264, 704, 44), 435e6),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_report_gives_the_published_figures(name: str) -> None:
    *counts, factors, memory = PUBLISHED[name]
    spec = shape_spec(name)
    # what stands behind the first layer changes nothing
    model = shaped_model(replace(spec, layers=spec.layers[:2]))
    (report,) = fold_reports(tabulate_first_layer(model))
    found = [
        int(each.replace(",", ""))
        for each in re.findall(r"(\d[\d,]*)(?:x for| weights| values|[ ]\()", report.notes[-1])
    ]
    gone, now, before, *times = found
    assert [gone, before, now] == counts and tuple(times) == factors
    # the paper counts neither norms nor biases, and gives millions
    assert -report.num_weights == pytest.approx(memory, rel=0.003)
    assert report.weight_bytes == 2 * report.num_weights


PREFIXES: dict[str, ModelSpec] = {
    "one mlp": model_of([(None, PLAIN_MLP, False), (ATTENTION, PLAIN_MLP, False)]),
    "three, tied": model_of([(None, PLAIN_MLP, False)] * 3 + [(ATTENTION, PLAIN_MLP, False)], head=folds.TIED),
    "replacement, then mlp": model_of([(REPLACEMENT, PLAIN_MLP, False), (ATTENTION, PLAIN_MLP, False)]),
    "replacement before attention": model_of(
        [(REPLACEMENT, None, False), (None, None, False), (ATTENTION, PLAIN_MLP, False)]
    ),
    "parallel without attention": model_of(
        [(None, PLAIN_MLP, True), (REPLACEMENT, PLAIN_MLP, True), (ATTENTION, PLAIN_MLP, True)]
    ),
    "layer norms and sub norms": model_of(
        [(None, replace(folds.NEOX[1], sub=rms(40), post=rms()), False), (ATTENTION, None, False)]
    ),
    "no residual": model_of([(None, replace(PLAIN_MLP, residual=False), False), (ATTENTION, PLAIN_MLP, False)]),
    "no attention at all": model_of([(None, PLAIN_MLP, False)] * 2),
    "narrower behind": model_of(
        [(None, replace(PLAIN_MLP, down=lin(40, 10), residual=False), False)],
        final_norm=rms(10),
        head=replace(folds.UNTIED, linear=lin(10, VOCAB)),
    ),
    **{f"mlp {name}": model_of([(None, each, False), (ATTENTION, None, False)]) for name, each in MLPS.items()},
}  # fmt: skip


@pytest.mark.parametrize("name", PREFIXES)
def test_folding_the_prefix_changes_no_logit(name: str) -> None:
    model = random_model(PREFIXES[name])
    folded = fold_mlp_prefix(model)
    assert folded.reports[-1].removed
    folds.assert_same(folded, model)
    assert folded.spec.layers[0] == Layer(index=0, attention=None, mlp=None, parallel=model.spec.layers[0].parallel)


def test_prefix_and_table_follow_each_other() -> None:
    model = random_model(PREFIXES["three, tied"])
    both = tabulate_first_layer(fold_mlp_prefix(model))
    attention = both.spec.layers[3].attention
    assert isinstance(attention, Attention) and attention.table
    folds.assert_same(both, model)


def test_a_tied_head_keeps_the_old_table() -> None:
    model = random_model(PREFIXES["three, tied"])
    folded = fold_mlp_prefix(model)
    assert not folded.spec.head.tied
    assert folded.weights["head.weight"] is model.weights["embedding.weight"]
    mlp = 3 * (2 * 40 * D + 40 * D + D)
    assert folded.reports[-1].num_weights == mlp - VOCAB * D


@pytest.mark.parametrize(
    "spec, reason",
    [
        (model_of([(ATTENTION, PLAIN_MLP, False)]), "the prefix ends before attention 0, which is no plain MLP"),
        (model_of([(ATTENTION, PLAIN_MLP, True)]), "the prefix ends before attention 0, which is no plain MLP"),
        (folds.MODELS["gpt2, learned positions"], "the prefix ends before the first sublayer: learned positions"),
        (
            replace(model_of([(None, PLAIN_MLP, False)]), embedding=Embedding(vocab_size=VOCAB, size=D, positions=256)),
            "the prefix ends before the first sublayer: learned positions",
        ),
    ],
)
def test_no_prefix_says_why(spec: ModelSpec, reason: str) -> None:
    kept = fold_mlp_prefix(random_model(spec))
    assert kept.spec == spec and kept.reports[-1].notes[0].startswith(reason)


def test_dropped_attentions_make_a_prefix() -> None:
    """As it comes about: the attentions of the first two layers are dropped, and their MLPs cost nothing any more."""
    model = drop(random_model(folds.MODELS["llama"]), DropPlan(attention=(0, 1)))
    folded = fold_mlp_prefix(model)
    assert folded.reports[-1].removed == ("mlp 0", "mlp 1")
    folds.assert_same(folded, model)
    folds.assert_same_when_run(folded, model)


def test_rows_are_taken_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(PREFIXES["three, tied"])
    whole = tabulate_first_layer(fold_mlp_prefix(model))
    monkeypatch.setattr("pyruntime.passes.fold.tables._ROWS", 5)
    for name, weight in whole.weights.items():
        pieces = tabulate_first_layer(fold_mlp_prefix(model)).weights[name]
        assert (pieces.read() - weight.read()).abs().max() < 1e-13


def test_triangular_map_is_written_out() -> None:
    square = Linear(in_features=D, out_features=D, triangular=True)
    mlp = replace(PLAIN_MLP, gate=square, up=square, down=square)
    model = random_model(model_of([(None, mlp, False), (replace(ATTENTION, q=square), None, False)]))
    folds.assert_same(tabulate_first_layer(fold_mlp_prefix(model)), model)


def test_report_of_a_small_model_gives_no_zero() -> None:
    """1,152 weights of q, k, v; a step reads 24 values a token, and 24 + 48 with the table."""
    tabulated = tabulate_first_layer(random_model(folds.MODELS["llama"]))
    # (1152 + 24 n) / 72 n
    assert "less by tokens in a step: 16x for 1, 1.3x for 16, 0.4x for 256" in tabulated.reports[-1].notes[-1]
