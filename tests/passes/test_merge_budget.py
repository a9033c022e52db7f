"""The budget bounds what merging holds at a time, counted tensor by tensor."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pyruntime.checkpoint import read_model
from pyruntime.checkpoint.writer import write_native
from pyruntime.passes.merge import GateMode, MergeKind, MergeOptions, budget_bytes, merge
from pyruntime.spec import ModelSpec
from tests.passes.skipless import attention, lin, mlp, model_of, rms, skipless, weights_of


class Live(TorchDispatchMode):
    """Bytes of the tensors made inside that are still alive, and the most there were."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.sizes: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for each in found if isinstance(found, tuple | list) else (found,):
            if isinstance(each, torch.Tensor):
                self._add(each.untyped_storage())
        return found

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self.sizes:
            self.sizes[key] = storage.nbytes()
            weakref.finalize(storage, self.sizes.pop, key, None)
            self.peak = max(self.peak, sum(self.sizes.values()))


def block(d: int, heads: int, kv: int, ffn: int, **changes: Any) -> Any:
    return attention(d=d, heads=heads, kv=kv, head_dim=d // 4, rope=None, **changes), mlp(d=d, ffn=ffn)


# by what needs most
CASES: dict[str, tuple[ModelSpec, MergeKind]] = {
    "projections, pivoted": (skipless([block(96, 4, 4, 64)] * 3), MergeKind.PIVOTED),
    "projections, q+p": (skipless([block(96, 4, 1, 64)] * 3), MergeKind.Q_P),
    "parallel": (skipless([block(96, 4, 2, 64)] * 3, parallel=True), MergeKind.Q),
    "mlp": (skipless([block(48, 4, 2, 40000)]), MergeKind.Q_P),
    "table": (skipless([block(48, 4, 2, 64)] * 2, vocab=5000), MergeKind.Q_P),
    "table, wide queries": (skipless([block(48, 7, 1, 16, q=lin(48, 84, True))] * 2, vocab=5000), MergeKind.Q_P),
    "positions": (skipless([block(48, 4, 2, 64)] * 2, positions=5000), MergeKind.Q_P),
    "head": (skipless([block(48, 4, 2, 64)] * 2, vocab=5000, final_norm=False, parallel=True), MergeKind.P),
    "triangular": (
        skipless(
            [(
                attention(d=96, heads=4, kv=2, head_dim=24, rope=None, pre=rms(96)),
                mlp(d=96, ffn=200, pre=rms(96)),
            )] * 2
        ),
        MergeKind.TRIANGULAR,
    ),
    "biases": (skipless([block(64, 4, 2, 300, q=lin(64, 64, True))] * 2), MergeKind.AUTO),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_merging_and_reading_hold_no_more_than_the_budget(name: str, tmp_path: Path) -> None:
    spec, kind = CASES[name]
    write_native(model_of(spec, weights_of(spec)), tmp_path / "model", dtype="float32")
    model = read_model(tmp_path / "model")
    with Live() as live:
        merged = merge(model, MergeOptions(kind=kind, gate=GateMode.FORCE))
        for weight in merged.weights.values():
            weight.read()
    budget = budget_bytes(spec, torch.float32)
    assert live.peak <= budget
    # a bound that is far too large would refuse what fits
    assert budget <= 4 * live.peak
