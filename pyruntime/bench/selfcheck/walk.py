"""Plans walked step by step under a judge: C++ node by node, GPU launches on static memory as in an engine."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Final

import torch

from pyruntime.bench.selfcheck.judge import PAGE_SIZE, Found, Judge
from pyruntime.checkpoint import Model
from pyruntime.graph import Graph, without_tail
from pyruntime.ops import memory
from pyruntime.ops.cache import KvCache
from pyruntime.ops.gpu.batch import GREEDY, BatchSizes, StaticBatch, sizes_of
from pyruntime.ops.gpu.frame import Frame, GpuView
from pyruntime.ops.gpu.rotary import RotaryCache
from pyruntime.ops.gpu.workspace import Workspace
from pyruntime.ops.step import Rows, SequenceSlice, make_step
from pyruntime.plan import Plan, PlanStep

# tokens of each sequence that a run computes. A chunk of a prompt that large products run, with a page that is not
# full; a few rows, as the next chunk or a verified draft has them; then a token each
RUNS: Final = ((17, 3), (3, 2))
DECODED: Final = (1, 1)
_NUM_DECODED: Final = 2
_PAGES_EACH: Final = 2
_MAX_REASON: Final = 200


def slices_of(done: Sequence[int], counts: Sequence[int], vocab: int) -> list[SequenceSlice]:
    """The next `counts` tokens of sequences that have `done`; each wants its last one, the first sequence all."""
    return [
        SequenceSlice(
            token_ids=[(7 * i * i + 5 * i + number) % vocab for i in range(start, start + count)],
            start=start,
            pages=range(number * _PAGES_EACH, (number + 1) * _PAGES_EACH),
            wanted=range(count) if number == 0 else (count - 1,),
        )
        for number, (start, count) in enumerate(zip(done, counts, strict=True))
    ]


def check_plan(plan: Plan, graph: Graph, model: Model, found: Found) -> None:
    """Walk prefill and decode steps of `plan`, lowered from `graph` and `model`; `found` gets what was seen."""
    num_pages = _PAGES_EACH * len(DECODED)
    cache = plan.new_cache(num_pages, PAGE_SIZE)
    for slot in range(cache.num_slots):
        for pool in cache.pools(slot):
            # reading beyond a context must show
            pool.fill_(torch.nan)
    vocab = plan.vocab_size
    judge = Judge(graph, model, num_pages, plan.dtype, found)
    done = [0] * len(DECODED)
    for counts in RUNS:
        slices = slices_of(done, counts, vocab)
        judge.begin(slices, cache)
        _walk(plan, slices, cache, judge, decode=False)
        done = [a + b for a, b in zip(done, counts, strict=True)]
    if plan.gpu is not None:
        # these have a form of their own
        judge = judge.of(without_tail(graph))
    for _ in range(_NUM_DECODED):
        slices = slices_of(done, DECODED, vocab)
        judge.begin(slices, cache)
        _walk(plan, slices, cache, judge, decode=True)
        done = [a + b for a, b in zip(done, DECODED, strict=True)]


def _walk(plan: Plan, slices: Sequence[SequenceSlice], cache: KvCache, judge: Judge, *, decode: bool) -> None:
    if plan.gpu is None:
        _walk_native(plan, slices, cache, judge)
    else:
        _GpuWalk(plan, slices, cache, judge, decode=decode).run()


def _walk_native(plan: Plan, slices: Sequence[SequenceSlice], cache: KvCache, judge: Judge) -> None:
    buffers: dict[str, torch.Tensor] = {}
    waiting = [each.node for each in plan.steps]

    def watch(each: PlanStep, outputs: tuple[torch.Tensor, ...]) -> None:
        waiting.remove(each.node)
        inputs = [buffers[name] for name in each.node.inputs]
        right = None if each.native is None else judge.judge(each.node.name, inputs, outputs)
        for out, values in zip(outputs, right or (), strict=False):
            out.copy_(values)
        # later steps write over them
        buffers.update((name, out.clone()) for name, out in zip(each.node.outputs, outputs, strict=True))

    try:
        plan.run(make_step(slices, cache), watch)
    # whatever it may raise is a result of the check
    except Exception as error:
        judge.found.fail(waiting[0].op, f"{waiting[0].name}: {reason_of(error)}")


class _GpuWalk:
    """One step of a plan on a GPU, node by node, each launched twice, which must give the same bits."""

    def __init__(
        self, plan: Plan, slices: Sequence[SequenceSlice], cache: KvCache, judge: Judge, *, decode: bool
    ) -> None:
        assert plan.gpu is not None
        self._plan, self._gpu, self._judge, self._cache = plan, plan.gpu, judge, cache
        self._steps = plan.gpu.steps.decode if decode else plan.gpu.steps.prefill
        self._views = _decode_views(plan, slices, cache) if decode else _prefill_views(plan, slices, cache)
        self._workspace = Workspace(plan.device)
        self._rotaries = RotaryCache(plan.device, cache.num_pages * PAGE_SIZE)
        self._buffers: dict[str, torch.Tensor] = {}

    def run(self) -> None:
        """All steps. One that fails or raises leaves what was expected of it to the others."""
        for each in self._steps:
            if self._views[each.node.rows].num_rows == 0:
                return
            node = each.node
            inputs = tuple(self._buffers[name] for name in node.inputs)
            right: tuple[torch.Tensor, ...] | None
            if each.launch is None:
                outputs, right = self._fresh(each), self._judge.expected(node.name, inputs)
            else:
                outputs, right = self._launched(each, inputs)
            for out, values in zip(outputs, right or (), strict=False):
                out.copy_(values)
            self._buffers.update(zip(node.outputs, outputs, strict=True))

    def _launched(
        self, each: PlanStep, inputs: tuple[torch.Tensor, ...]
    ) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...] | None]:
        """What a node gives, and what was expected of one that is wrong."""
        node, found = each.node, self._judge.found
        try:
            first = self._launch(each, inputs)
            # the interpreter runs one program after the other: nothing can race
            again = first if self._gpu.info.interpreted else self._launch(each, inputs)
            if not all(torch.equal(_bits(a), _bits(b)) for a, b in zip(first, again, strict=True)):
                found.fail(node.op, f"{node.name}: a second launch gave other bits")
        # whatever a compiler or a driver may raise is a result of the check
        except Exception as error:
            found.fail(node.op, f"{node.name}: {reason_of(error)}")
            # these are wrong, so that the cache is mended too
            first = self._fresh(each)
        return first, self._judge.judge(node.name, inputs, first)

    def _launch(self, each: PlanStep, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        assert each.launch is not None
        outputs = self._fresh(each)
        self._workspace.begin()
        with torch.inference_mode(), on_device(self._plan.device):
            each.launch(
                Frame(
                    self._views[each.node.rows],
                    inputs,
                    outputs,
                    self._cache,
                    self._gpu.info,
                    self._workspace,
                    self._rotaries,
                )
            )
        if self._plan.device.type == "cuda":
            torch.cuda.synchronize(self._plan.device)
        return outputs

    def _fresh(self, each: PlanStep) -> tuple[torch.Tensor, ...]:
        """Outputs of NaN."""
        num_rows = self._views[each.node.rows].num_rows
        dtypes = self._gpu.steps.dtypes
        return tuple(
            memory.alloc((num_rows, width), dtypes[name], self._plan.device).fill_(torch.nan)
            for name, width in zip(each.node.outputs, each.node.attrs.out_widths(), strict=True)
        )


def reason_of(error: Exception) -> str:
    """The first line of an error, for a table."""
    line = (str(error).strip() or "no message").partition("\n")[0]
    return f"{type(error).__name__}: {line[:_MAX_REASON]}"


def on_device(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _bits(values: torch.Tensor) -> torch.Tensor:
    return values.view(torch.int16 if values.element_size() == 2 else torch.int32)


def _prefill_views(plan: Plan, slices: Sequence[SequenceSlice], cache: KvCache) -> dict[Rows, GpuView]:
    batch = StaticBatch(plan.device, sizes_of(slices), cache.num_pages - 1)
    batch.load(slices)
    counts = {rows: [len(each.token_ids if rows is Rows.ALL else each.wanted) for each in slices] for rows in Rows}
    return {rows: batch.view(rows, sum(each), len(slices), max(each), decode=False) for rows, each in counts.items()}


def _decode_views(plan: Plan, slices: Sequence[SequenceSlice], cache: KvCache) -> dict[Rows, GpuView]:
    count = len(slices)
    sizes = BatchSizes(count, 0, count, sizes_of(slices).max_pages)
    batch = StaticBatch(plan.device, sizes, cache.num_pages - 1)
    batch.load_decode(slices, count, [GREEDY] * count)
    view = batch.view(Rows.ALL, count, count, 1, decode=True)
    return {Rows.ALL: view, Rows.WANTED: view}
