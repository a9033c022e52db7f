"""A plan's steps on one GPU: static memory, launches in order, and decode steps as captured CUDA graphs."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from pyruntime.errors import UsageError
from pyruntime.graph import LOGITS
from pyruntime.ops import memory
from pyruntime.ops.cache import KvCache
from pyruntime.ops.gpu.batch import BatchSizes, RowSampling, StaticBatch, sizes_of
from pyruntime.ops.gpu.frame import Frame, GpuInfo, GpuView, Launcher, launch_kernel
from pyruntime.ops.gpu.rotary import RotaryCache
from pyruntime.ops.gpu.workspace import Workspace
from pyruntime.ops.qkv_rope import QkvRopeAttrs
from pyruntime.ops.sample import SampleConfig, SampleResult
from pyruntime.ops.step import Rows, SequenceSlice, Step, make_step
from pyruntime.plan.step import PlanStep, Watch


class Sampler(Protocol):
    """What samples behind the logits of a decode step (see plan/sampler.py)."""

    def launch(self, logits: torch.Tensor, batch: StaticBatch, tokens: torch.Tensor, frame: Frame) -> None:
        """Fill `tokens` [rows] int32, and feed them back to the batch."""
        ...

    def serves(self, config: SampleConfig) -> bool:
        """Whether it can do what a request asks for."""
        ...

    def result(self, token: int) -> SampleResult:
        """What an entry of `tokens` says."""
        ...


@dataclass(frozen=True, slots=True)
class GpuSteps:
    """The steps of a plan in two forms, over the same weights: any rows, and one wanted row of every sequence.

    `dtypes` says what each buffer holds; `row_bytes` what a row takes in each place, of all rows and of wanted ones.
    """

    prefill: tuple[PlanStep, ...]
    decode: tuple[PlanStep, ...]
    dtypes: Mapping[str, torch.dtype]
    row_bytes: tuple[tuple[int, int], ...]

    @property
    def in_python(self) -> tuple[str, ...]:
        """Nodes that PyTorch runs: they read the step on the host, so that no graph can hold them."""
        return tuple(step.node.name for step in self.decode if step.launch is None)


@dataclass(slots=True)
class _Memory:
    """Everything whose address a captured graph holds, for one cache and steps of up to `sizes`.

    The cache is its owner's: whoever drops it gets its memory back, and this goes with it.
    """

    cache: weakref.ref[KvCache]
    sizes: BatchSizes
    prefill: StaticBatch
    decode: StaticBatch
    places: tuple[torch.Tensor, ...]
    logits: torch.Tensor  # [sequences, vocab]
    tokens: torch.Tensor  # [sequences] int32
    rotaries: RotaryCache
    graphs: dict[int, torch.cuda.CUDAGraph] = field(default_factory=dict)


class GpuRunner:
    """Runs the steps of one plan on the current stream. Not thread-safe: steps share their memory.

    Each cache has memory of its own, for the largest step that `prepare` was told of; a larger one gets it anew.
    """

    def __init__(
        self,
        steps: GpuSteps,
        *,
        info: GpuInfo,
        device: torch.device,
        vocab_size: int,
        max_position: int,
        sampler: Sampler | None,
        launcher: Launcher = launch_kernel,
    ) -> None:
        self.steps = steps
        self.info = info
        self.device = device
        self._vocab_size = vocab_size
        self._max_position = max_position
        self.sampler = sampler
        self.launcher = launcher
        self._workspace = Workspace(device)
        self._memories: weakref.WeakKeyDictionary[KvCache, _Memory] = weakref.WeakKeyDictionary()
        # of the cache that was prepared, run or decoded last
        self._memory: _Memory | None = None
        # torch's own capture stream belongs to the device of the first capture of the process
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @property
    def why_not_captured(self) -> str | None:
        """Why decode steps are launched one by one, or None where a graph can hold them."""
        if self.info.interpreted:
            return "Triton's interpreter has no graphs"
        names = self.steps.in_python
        return f"PyTorch runs {names[0]}{f' and {len(names) - 1} more' if names[1:] else ''}" if names else None

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        """Batch sizes with a captured graph, ascending."""
        return () if self._memory is None else tuple(sorted(self._memory.graphs))

    def explain(self) -> str:
        """Lines on how decode steps run."""
        steps = [each for each in self.steps.decode if each.launch is not None]
        how = "captured as one CUDA graph for each batch size"
        if (why_not := self.why_not_captured) is not None:
            how = f"launched one by one: {why_not}"
        return f"decode: {len(steps)} of {len(self.steps.decode)} nodes on {self.info.name}, {how}"

    @property
    def table_bytes(self) -> int:
        """Bytes of the tables of angles for the longest context that the model was made for."""
        attentions = [
            each.node.attrs.attention for each in self.steps.decode if isinstance(each.node.attrs, QkvRopeAttrs)
        ]
        ropes = {attention.rope for attention in attentions if attention.rope is not None}
        return sum(4 * rope.dim * self._max_position for rope in ropes)

    def prepare(self, cache: KvCache, sizes: BatchSizes) -> None:
        """Make room for steps of up to `sizes` over `cache`; graphs captured over smaller memory are gone."""
        held = self._memories.get(cache)
        if held is None or not held.sizes.holds(sizes):
            # the old one is given back before the new one is made
            self._memory = None
            if held is not None:
                sizes = sizes.union(held.sizes)
                del self._memories[cache], held
            with self._on_device():
                held = self._memories[cache] = self._new_memory(cache, sizes)
        self._memory = held

    def _new_memory(self, cache: KvCache, sizes: BatchSizes) -> _Memory:
        spare_page, count = cache.num_pages - 1, sizes.max_sequences
        # decoding has a row for each sequence, and all of them are all rows
        rows = max(sizes.max_rows, count)
        return _Memory(
            cache=weakref.ref(cache),
            sizes=sizes,
            prefill=StaticBatch(self.device, sizes, spare_page),
            decode=StaticBatch(self.device, BatchSizes(count, 0, count, sizes.max_pages), spare_page),
            places=tuple(
                memory.alloc((max(rows * of_all, sizes.max_wanted * of_wanted),), torch.uint8, self.device)
                for of_all, of_wanted in self.steps.row_bytes
            ),
            logits=memory.alloc((count, self._vocab_size), torch.float32, self.device),
            tokens=torch.zeros(count, dtype=torch.int32, device=self.device),
            rotaries=RotaryCache(self.device, min(self._max_position, cache.num_pages * cache.page_size)),
        )

    def run(self, step: Step, watch: Watch | None = None) -> torch.Tensor:
        """Launch one step of any form, one kernel after the other; logits [wanted, vocab] in memory of their own."""
        self.prepare(step.cache, sizes_of(step.slices))
        held = self._held()
        logits = memory.alloc((step.num_rows(Rows.WANTED), self._vocab_size), torch.float32, self.device)
        if not step.slices:
            return logits
        with self._on_device():
            held.prefill.load(step.slices)
            longest = {
                Rows.ALL: max(len(each.token_ids) for each in step.slices),
                Rows.WANTED: max(len(each.wanted) for each in step.slices),
            }
            views = {
                rows: held.prefill.view(rows, step.num_rows(rows), len(step.slices), longest[rows], decode=False)
                for rows in Rows
            }
            for each in self.steps.prefill:
                if views[each.node.rows].num_rows == 0:
                    break
                outputs = self._launch(each, views, logits, step)
                if watch is not None:
                    watch(each, outputs)
        return logits

    def decode(self, slices: Sequence[SequenceSlice], sampling: Sequence[RowSampling], cache: KvCache) -> torch.Tensor:
        """One row of each sequence, with its next token sampled: [sequences] int32, static, an error code below 0.

        Rows, tokens and random numbers of the next step stand ready on the device. Tell `fed_back` what was sampled.
        """
        self.prepare(cache, sizes_of(slices))
        held = self._held()
        count = len(slices)
        padded = next((size for size in self.batch_sizes if size >= count), count)
        with torch.inference_mode(), self._on_device():
            held.decode.load_decode(slices, padded, sampling)
            if padded in held.graphs:
                held.graphs[padded].replay()
            else:
                self._launch_decode(padded, make_step(slices, cache, self.device))
        return held.tokens[:count]

    def fed_back(self, token_ids: Sequence[int]) -> None:
        """Say which tokens the last `decode` gave, so that the next one sends only what differs."""
        self._held().decode.advanced(token_ids)

    def decoded_logits(self, count: int) -> torch.Tensor:
        """Logits [count, vocab] of the last `decode`, static."""
        return self._held().logits[:count]

    def capture(self, batch_sizes: Sequence[int], progress: Callable[[int], None] | None = None) -> None:
        """Capture a decode step for each batch size, after a launch of each that compiles kernels and sizes scratch.

        `progress` is called with each size that is done. Does nothing where `why_not_captured` gives a reason. Raises
        UsageError CONFIG for a size beyond what `prepare` made room for.
        """
        held = self._held()
        if self.why_not_captured is not None:
            return
        for size in sorted(batch_sizes, reverse=True):
            if size > held.sizes.max_sequences:
                raise UsageError(
                    "CONFIG", f"a graph for {size} sequences was asked for; room is made for {held.sizes.max_sequences}"
                )
            held.graphs[size] = self._captured(size)
            if progress is not None:
                progress(size)

    def replay(self, batch_size: int) -> None:
        """One more decode step of the captured graph over what the last one left on the device; for measurements.

        Nobody checks how far that goes: the pages last loaded must hold every position.
        """
        held = self._held()
        held.decode.forget()
        held.graphs[batch_size].replay()

    def _captured(self, size: int) -> torch.cuda.CUDAGraph:
        held = self._held()
        # tensors that were made in this mode are changed in it only
        with torch.inference_mode(), self._on_device():
            for _ in range(2):
                held.decode.load_decode((), size, ())
                self._launch_decode(size, None)
            torch.cuda.synchronize(self.device)
            graph = torch.cuda.CUDAGraph()
            # one pool: graphs run one after the other
            pool = next(iter(held.graphs.values())).pool() if held.graphs else None
            # other threads may load another model meanwhile
            with torch.cuda.graph(graph, pool=pool, stream=self._stream, capture_error_mode="thread_local"):
                self._launch_decode(size, None)
        return graph

    def _launch_decode(self, size: int, step: Step | None) -> None:
        held = self._held()
        view = held.decode.view(Rows.ALL, size, size, 1, decode=True)
        views = {Rows.ALL: view, Rows.WANTED: view}
        logits = held.logits[:size]
        for each in self.steps.decode:
            self._launch(each, views, logits, step)
        self._workspace.begin()
        if self.sampler is not None:
            self.sampler.launch(logits, held.decode, held.tokens[:size], self._frame(view, (), ()))

    def _launch(
        self, each: PlanStep, views: Mapping[Rows, GpuView], logits: torch.Tensor, step: Step | None
    ) -> tuple[torch.Tensor, ...]:
        """Start one node; its outputs."""
        attrs, node = each.node.attrs, each.node
        # what a gather reads has a row for each of the step's
        entry = Rows.ALL if node.op == "gather" else node.rows
        inputs = tuple(
            self._buffer(place, name, views[entry].num_rows, width)
            for place, name, width in zip(each.inputs, node.inputs, attrs.in_widths(), strict=True)
        )
        outputs = tuple(
            logits if name == LOGITS else self._buffer(place, name, views[node.rows].num_rows, width)
            for place, name, width in zip(each.outputs, node.outputs, attrs.out_widths(), strict=True)
        )
        self._workspace.begin()
        if each.launch is not None:
            each.launch(self._frame(views[node.rows], inputs, outputs))
            return outputs
        assert step is not None and each.implementation.run is not None
        # the reference sums in the dtype of its inputs
        wide = [buffer.float() for buffer in inputs]
        found = each.implementation.run(attrs, each.weights, wide, step.view(node.rows))
        for buffer, values in zip(outputs, found, strict=True):
            buffer.copy_(values)
        return outputs

    def _frame(self, view: GpuView, inputs: tuple[torch.Tensor, ...], outputs: tuple[torch.Tensor, ...]) -> Frame:
        held = self._held()
        cache = held.cache()
        assert cache is not None, "the cache is gone"
        return Frame(view, inputs, outputs, cache, self.info, self._workspace, held.rotaries, self.launcher)

    def _buffer(self, place: int, name: str, num_rows: int, width: int) -> torch.Tensor:
        dtype = self.steps.dtypes[name]
        return self._held().places[place][: num_rows * width * dtype.itemsize].view(dtype).view(num_rows, width)

    def _held(self) -> _Memory:
        assert self._memory is not None, "prepare was not called"
        return self._memory

    def _on_device(self) -> contextlib.AbstractContextManager[object]:
        # Triton launches on the current device
        return torch.cuda.device(self.device) if self.device.type == "cuda" else contextlib.nullcontext()
