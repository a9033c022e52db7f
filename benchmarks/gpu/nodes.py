"""Single nodes of a plan on their own: checked, repeated, and captured to be timed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from benchmarks.gpu.gate import LIMITS, check
from benchmarks.gpu.runner import PAGE_SIZE, filled_cache, gpu_of, num_pages
from pyruntime.checkpoint import Model
from pyruntime.errors import RunError
from pyruntime.graph import Cost, SequenceWork, cost_of
from pyruntime.ops.cache import KvCache, KvLayout
from pyruntime.ops.gpu.choose import Backend
from pyruntime.ops.gpu.frame import Frame, GpuView, Launch, launch_kernel
from pyruntime.ops.gpu.rotary import RotaryCache
from pyruntime.ops.gpu.workspace import Workspace
from pyruntime.ops.mlp_chain import MlpChainAttrs
from pyruntime.ops.qkv_rope import QkvRopeAttrs
from pyruntime.ops.step import SequenceSlice, Step, make_step
from pyruntime.ops.table import OPS
from pyruntime.plan import Plan, PlanStep
from pyruntime.plan.lower_gpu import GpuTarget


class NodeRun:
    """`steps` of a plan one after the other, each over the same `rows` sequences of `context` tokens, newest included.

    `backend` is what computes, however the plan chose; inputs are normal values.
    """

    def __init__(self, plan: Plan, steps: Sequence[PlanStep], backend: Backend, rows: int, context: int) -> None:
        self.backend = backend
        self._plan, self._steps, self._rows, self._context = plan, steps, rows, context
        each = num_pages(context)
        self._pages = [range(i * each, (i + 1) * each) for i in range(rows)]
        self._cache = filled_cache(plan, rows * each)
        self._inputs = self._made(steps[0].node.inputs, steps[0].node.attrs.in_widths())
        self.outputs = self._made(steps[0].node.outputs, steps[0].node.attrs.out_widths())
        workspace, rotaries = Workspace(plan.device), RotaryCache(plan.device, context + 1)
        info, view = gpu_of(plan).info, self._view()
        frame = Frame(view, self._inputs, self.outputs, self._cache, info, workspace, rotaries)
        self._frame = frame
        self._launches = [self._bound(step, backend) for step in steps]

    def run(self) -> None:
        """Launch all of them."""
        for launch in self._launches:
            self._launch(launch)

    def triton_kernels(self) -> tuple[str, ...]:
        """Names of the Triton kernels that the first node launches; those of other backends are not seen."""
        names: list[str] = []

        def launcher(kernel: Any, *launch: Any) -> None:
            names.append(kernel.fn.__name__)
            launch_kernel(kernel, *launch)

        self._frame.workspace.begin()
        self._launches[0](replace(self._frame, launcher=launcher))
        return tuple(names)

    def cost(self) -> Cost:
        """Bytes and operations of all of them."""
        nodes = [step.node for step in self._steps]
        work = [SequenceWork(self._context - 1, 1)]
        return sum(cost_of(nodes, work, self._plan.dtype.itemsize, copies=self._rows).values(), Cost())

    def check(self, what: str, model: Model) -> float:
        """The largest NMSE of what the first node leaves, against its reference in float64, or RunError NUMERICS."""
        node = self._steps[0].node
        expected_cache = _as_float64(self._cache)
        for output in self.outputs:
            output.fill_(torch.nan)
        self._launch(self._launches[0])
        (reference,) = (each.run for each in OPS[node.op] if each.target == "reference")
        assert reference is not None
        weights = {role: model.weights[name].read().double() for role, name in node.weights}
        inputs = [each.double() for each in self._inputs]
        view = self._step(expected_cache).view(node.rows)
        expected = list(reference(node.attrs, weights, inputs, view))
        found = list(self.outputs)
        if isinstance(node.attrs, MlpChainAttrs) or getattr(node.attrs, "residual", False):
            # the stream may be far larger than what is added to it, and would hide it
            found, expected = ([each.double() - inputs[-1] for each in own] for own in (found, expected))
        if isinstance(node.attrs, QkvRopeAttrs):
            # what was written: the rest of the cache would hide it
            page = torch.tensor([pages[-1] for pages in self._pages], device=self._plan.device)
            offset = (self._context - 1) % PAGE_SIZE
            found += [pool[page, offset] for pool in self._cache.pools(node.attrs.slot)]
            expected += [pool[page, offset] for pool in expected_cache.pools(node.attrs.slot)]
        limit = LIMITS[self._plan.dtype]
        return max(check(what, a, b, limit) for a, b in zip(found, expected, strict=True))

    def check_repeats(self, what: str, repeats: int) -> None:
        """Raise RunError NUMERICS where the first node does not leave the same bits every time."""
        attrs = self._steps[0].node.attrs
        left = [*self.outputs, *(self._cache.pools(attrs.slot) if isinstance(attrs, QkvRopeAttrs) else ())]
        first: list[torch.Tensor] = []
        for i in range(repeats):
            for output in self.outputs:
                output.fill_(torch.nan)
            self._launch(self._launches[0])
            if not first:
                first = [each.clone() for each in left]
            elif not all(torch.equal(_bits(a), _bits(b)) for a, b in zip(left, first, strict=True)):
                raise RunError("NUMERICS", f"{what}: run {i + 1} left other bits than the first; a race is likely")

    def _launch(self, launch: Launch) -> None:
        self._frame.workspace.begin()
        launch(self._frame)

    def _bound(self, step: PlanStep, backend: Backend) -> Launch:
        launch = replace(_target(self._plan), kernels=backend).bound(step).launch
        assert launch is not None
        return launch

    def _made(self, names: Sequence[str], widths: Sequence[int]) -> tuple[torch.Tensor, ...]:
        """A buffer for each name, the same one for the same name."""
        generator = torch.Generator(self._plan.device).manual_seed(1)
        dtypes = gpu_of(self._plan).steps.dtypes
        found: dict[str, torch.Tensor] = {}
        for name, width in zip(names, widths, strict=True):
            values = torch.empty((self._rows, width), dtype=dtypes[name], device=self._plan.device)
            found.setdefault(name, values.normal_(generator=generator))
        return tuple(found[name] for name in names)

    def _step(self, cache: KvCache) -> Step:
        slices = [SequenceSlice([7], self._context - 1, pages, [0]) for pages in self._pages]
        return make_step(slices, cache, self._plan.device)

    def _view(self) -> GpuView:
        rows, device = self._rows, self._plan.device

        def ints(values: object) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.int32, device=device)

        numbers = ints(list(range(rows + 1)))
        return GpuView(
            num_rows=rows,
            num_sequences=rows,
            longest=1,
            decode=True,
            token_ids=ints([7] * rows),
            positions=ints([self._context - 1] * rows),
            sequences=numbers[:rows],
            starts=numbers,
            contexts=ints([self._context] * rows),
            page_table=ints([list(pages) for pages in self._pages]),
            index=numbers[:rows],
        )


def distinct_runs(plan: Plan, steps: Sequence[PlanStep], rows: int, context: int) -> Iterator[NodeRun]:
    """The nodes by each backend that has kernels of its own for them; one that has none launches another's."""
    seen: set[tuple[str, ...]] = set()
    for backend in Backend:
        if backend is Backend.CUDA and _target(plan).compiled is None:
            continue
        node = NodeRun(plan, steps, backend, rows, context)
        with torch.inference_mode():
            kernels = node.triton_kernels()
        if kernels not in seen:
            seen.add(kernels)
            yield node


def _target(plan: Plan) -> GpuTarget:
    return GpuTarget.of(plan.device, plan.dtype)


def _as_float64(cache: KvCache) -> KvCache:
    shapes, pages = cache.shapes, cache.num_pages
    found = KvCache(shapes, pages, PAGE_SIZE, torch.float64, cache.device, KvLayout.TOKENS)
    for slot in range(cache.num_slots):
        for wide, narrow in zip(found.pools(slot), cache.pools(slot), strict=True):
            wide.copy_(narrow)
    return found


def _bits(values: torch.Tensor) -> torch.Tensor:
    return values.view(torch.int32 if values.dtype is torch.float32 else torch.int16)
