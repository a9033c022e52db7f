"""The embedding on a GPU against look-ups in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from pyruntime.ops.embed import EmbedAttrs
from pyruntime.ops.gpu.embed import layouts, on_gpu, refuses
from pyruntime.ops.layout import arrange, row_layouts
from pyruntime.spec import Embedding, Linear
from tests.gpu.helpers import DTYPES, NMSE_LIMITS, Guarded, frame_of, guarded, nmse, node_of, random, view_of

VOCAB = 37


def run(attrs: EmbedAttrs, dtype: torch.dtype, rows: int) -> tuple[Tensor, Tensor, bool]:
    """What is found, what is expected, and whether nothing else was written."""
    embedding = attrs.embedding
    stored = {
        role: random(*shape, dtype=dtype, seed=i) for i, (role, shape) in enumerate(attrs.weight_shapes().items())
    }
    weights = {
        name: guarded(arrange(layout, [stored[str(role)] for role in layout.sources]))
        for name, layout in layouts(attrs).items()
    }
    # two sequences, the second one later in its context
    view = view_of([rows, 2], [rows, 9], [[0], [1]])
    out = Guarded((rows + 2, embedding.size), torch.float32)
    on_gpu(attrs, node_of(weights, dtype))(frame_of(view, (), (out.inside,)))
    expected = torch.stack([stored["weight"][int(token)].double() * embedding.scale for token in view.token_ids])
    if embedding.positions is not None:
        places = [int(position) for position in view.positions]
        expected += torch.stack([stored["position.weight"][place].double() for place in places])
    return out.inside, expected, out.intact


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("positions", [None, 20])
@pytest.mark.parametrize(("size", "rows"), [(24, 1), (63, 5), (100, 17), (1100, 3)])
def test_rows_are_scaled_entries_plus_learned_positions(
    dtype: torch.dtype, positions: int | None, size: int, rows: int
) -> None:
    attrs = EmbedAttrs(Embedding(vocab_size=VOCAB, size=size, scale=1.7, positions=positions))
    found, expected, intact = run(attrs, dtype, rows)
    assert intact
    assert nmse(found, expected) < NMSE_LIMITS[torch.float32]


def test_a_shared_table_lies_as_the_head_wants_it() -> None:
    attrs = EmbedAttrs(Embedding(vocab_size=VOCAB, size=24), shared=True)
    head = row_layouts("matrix", {"linear": Linear(in_features=24, out_features=VOCAB)})["matrix"]
    names = {"weight": "embedding.weight", "linear.weight": "embedding.weight"}
    assert layouts(attrs)["table"].named(names) == head.named(names)


def test_rows_beyond_the_step_are_neither_read_nor_written() -> None:
    attrs = EmbedAttrs(Embedding(vocab_size=VOCAB, size=24))
    table, out = random(VOCAB, 24), Guarded((4, 24), torch.float32)
    view = replace(view_of([4], [4], [[0]]), num_rows=2)
    view.token_ids[2:] = 10**6
    on_gpu(attrs, node_of({"table": table}, torch.float32))(frame_of(view, (), (out.inside,)))
    assert out.intact
    assert torch.equal(out.inside[:2], table[[0, 7]])
    assert bool(out.inside[2:].isnan().all())


def test_only_float64_is_refused() -> None:
    attrs = EmbedAttrs(Embedding(vocab_size=VOCAB, size=24))
    assert [refuses(attrs, dtype) for dtype in DTYPES] == [None] * 3
    assert refuses(attrs, torch.float64) is not None
