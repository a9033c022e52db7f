"""ALiBi's slopes against transformers and the paper's own example."""

from __future__ import annotations

import pytest
import torch
from transformers.models.bloom.modeling_bloom import build_alibi_tensor

from pyruntime.ops.attention import slopes


def test_eight_heads_have_the_slopes_of_the_paper() -> None:
    assert slopes(8).tolist() == [1 / 2**i for i in range(1, 9)]


@pytest.mark.parametrize("heads", [1, 2, 3, 5, 12, 16, 40, 112])
def test_any_number_of_heads_has_the_slopes_of_transformers(heads: int) -> None:
    mask = torch.ones(1, 2, dtype=torch.int64)
    # the second position's bias is one slope
    theirs = build_alibi_tensor(mask, heads, torch.float32).view(heads, 2)[:, 1]
    # they compute the powers in float32
    assert float((slopes(heads) - theirs).abs().max()) < 1e-6
