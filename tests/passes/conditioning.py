"""The table of docs/merging.md: `python -m tests.passes.conditioning 512x128 1024x256`, widths of the stream and of K.

Gaussian weights, one layer behind an MLP, as `merge` measures it.
"""

from __future__ import annotations

import sys

from pyruntime.passes.merge import GateMode, Measured, MergeKind, MergeOptions, MergeReport, merge
from tests.passes.skipless import attention, mlp, model_of, skipless, weights_of

HEAD_DIM = 32


def measured(size: int, kv_size: int, kind: MergeKind, dtype: str, seed: int = 0) -> Measured:
    """What the gate finds for the Q of such a layer."""
    part = attention(d=size, heads=size // HEAD_DIM, kv=kv_size // HEAD_DIM, head_dim=HEAD_DIM)
    spec = skipless([(None, mlp(d=size, ffn=512)), (part, None)], vocab=64)
    options = MergeOptions(kind=kind, gate=GateMode.FORCE, dtype=dtype)
    report = merge(model_of(spec, weights_of(spec, seed)), options).reports[-1]
    assert isinstance(report, MergeReport)
    found = report.layers[1].entry_measured
    assert found is not None
    return found


def table_row(size: int, kv_size: int) -> str:
    """A row in Markdown."""
    cells = [f"{size}, {kv_size}"]
    for kind in (MergeKind.Q, MergeKind.PIVOTED):
        found = {dtype: measured(size, kv_size, kind, dtype) for dtype in ("bfloat16", "float16", "float32")}
        cells += [f"{found['bfloat16'].cond:.1e}", *(f"{each.nmse:.0e}" for each in found.values())]
    ratio = (found["bfloat16"].nmse / found["bfloat16"].unmerged) ** 0.5
    return f"| {' | '.join(cells)} | {ratio:.1f} |"


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        print(table_row(*map(int, argument.split("x"))), flush=True)
