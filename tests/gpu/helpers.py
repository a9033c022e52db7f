"""Guarded tensors, views and frames for tests of single launches."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pyruntime.ops import rope
from pyruntime.ops.cache import KvCache, KvLayout, KvShape
from pyruntime.ops.gpu.choose import DEFAULT, Backend, Choice, Choices
from pyruntime.ops.gpu.frame import Frame, GpuInfo, GpuNode, GpuView
from pyruntime.ops.gpu.workspace import Workspace
from pyruntime.spec import Rope

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
# law 3: outputs rounded to 16 bit; sums in float32 of exact products
NMSE_LIMITS = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 5e-4}
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
GUARD = 64


def info() -> GpuInfo:
    """The device of the tests; four processors where it is interpreted, so that splits are few and still there."""
    if INTERPRETED:
        return GpuInfo("interpreter", 0, 4)
    properties = torch.cuda.get_device_properties(DEVICE)
    return GpuInfo(properties.name, 10 * properties.major + properties.minor, properties.multi_processor_count)


@dataclass
class Guarded:
    """A tensor poisoned with NaN inside a larger one of NaN: `intact` says whether its surroundings still are."""

    shape: Sequence[int]
    dtype: torch.dtype
    whole: Tensor = field(init=False)
    inside: Tensor = field(init=False)

    def __post_init__(self) -> None:
        size = int(torch.Size(self.shape).numel())
        self.whole = torch.full((size + 2 * GUARD,), torch.nan, dtype=self.dtype, device=DEVICE)
        self.inside = self.whole[GUARD : GUARD + size].view(tuple(self.shape))

    @property
    def intact(self) -> bool:
        """Whether nothing was written beside it."""
        return bool(self.whole[:GUARD].isnan().all() and self.whole[-GUARD:].isnan().all())


def guarded(values: Tensor) -> Tensor:
    """A copy of `values` between NaN: reading beyond it shows."""
    made = Guarded(values.shape, values.dtype)
    made.inside.copy_(values)
    return made.inside


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 1.0) -> Tensor:
    """Normal values between NaN."""
    generator = torch.Generator().manual_seed(seed)
    return guarded((torch.randn(*shape, generator=generator) * scale).to(dtype))


def nmse(found: Tensor, expected: Tensor) -> float:
    """Mean square of the differences over that of the expected values; NaN where something was not written."""
    found, expected = found.double().cpu(), expected.double().cpu()
    return float((found - expected).square().mean() / expected.square().mean())


def view_of(
    lengths: Sequence[int], contexts: Sequence[int], pages: Sequence[Sequence[int]], *, decode: bool = False
) -> GpuView:
    """The view of a step that computes the last `lengths[i]` of `contexts[i]` positions of each sequence i."""
    rows = [(i, c - n + j) for i, (n, c) in enumerate(zip(lengths, contexts, strict=True)) for j in range(n)]
    width = max(map(len, pages))
    table = [[*own, *[-(10**6)] * (width - len(own))] for own in pages]
    starts = [sum(lengths[:i]) for i in range(len(lengths) + 1)]

    def ints(values: object) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=DEVICE)

    return GpuView(
        num_rows=len(rows),
        num_sequences=len(lengths),
        longest=max(lengths),
        decode=decode,
        token_ids=ints([7 * i % 31 for i in range(len(rows))]),
        positions=ints([position for _, position in rows]),
        sequences=ints([sequence for sequence, _ in rows]),
        starts=ints(starts),
        contexts=ints(list(contexts)),
        page_table=ints(table),
        index=ints(list(range(len(rows)))),
    )


class Tables:
    """Angles in float64, rounded once."""

    def tables(self, spec: Rope) -> tuple[Tensor, Tensor]:
        """For the first 512 positions."""
        made = rope.rotary(spec, torch.arange(512))
        return made.cos.float().to(DEVICE), made.sin.float().to(DEVICE)


def cache_of(shapes: Sequence[KvShape], num_pages: int, page_size: int, dtype: torch.dtype) -> KvCache:
    """A cache as the GPU lays it out."""
    return KvCache(tuple(shapes), num_pages, page_size, dtype, DEVICE, KvLayout.TOKENS)


def node_of(weights: dict[str, Tensor], dtype: torch.dtype, backend: Backend | None = None) -> GpuNode:
    """A node with arranged `weights`; `backend` runs any number of rows, None: as by default."""
    choices = DEFAULT if backend is None else Choices((Choice(None, backend, "asked for"),))
    return GpuNode("node", weights, dtype, DEVICE, info(), choices)


def frame_of(view: GpuView, inputs: Sequence[Tensor], outputs: Sequence[Tensor], cache: KvCache | None = None) -> Frame:
    """One node in one step."""
    held = cache_of((), 1, 16, torch.float32) if cache is None else cache
    return Frame(view, tuple(inputs), tuple(outputs), held, info(), Workspace(DEVICE), Tables())
