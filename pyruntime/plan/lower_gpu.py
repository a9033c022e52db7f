"""A graph lowered for GPUs: its steps for any rows and for decoding, over the same weights and the same memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import torch

from pyruntime import env
from pyruntime.errors import UsageError
from pyruntime.graph import LOGITS, Graph, Node, verify, without_tail
from pyruntime.ops.gpu import compiled
from pyruntime.ops.gpu.choose import DEFAULT, Backend, Measured, choices_of, forced, load_table
from pyruntime.ops.gpu.compiled_node import refused
from pyruntime.ops.gpu.device import gpu_info
from pyruntime.ops.gpu.frame import GpuInfo, GpuNode
from pyruntime.ops.step import Rows
from pyruntime.plan.gpu import GpuRunner, GpuSteps
from pyruntime.plan.sampler import DeviceSampler
from pyruntime.plan.step import PlanStep

# their outputs are only read by products, or by attention; the stream itself is float32
_NARROW_OPS: Final = ("qkv_rope", "attention")

# (graph) -> its nodes bound to implementations and weights, with places for buffers
Bind = Callable[[Graph], tuple[PlanStep, ...]]


@dataclass(frozen=True, slots=True)
class GpuTarget:
    """What launches are made for, and of what.

    `compiled` is the module of CUDA C++ kernels, or None; `kernels` what was asked for instead of the measured choice.
    """

    info: GpuInfo
    device: torch.device
    dtype: torch.dtype
    table: tuple[Measured, ...] = ()
    compiled: Any = None
    kernels: Backend | None = None

    @staticmethod
    def of(device: torch.device, dtype: torch.dtype) -> GpuTarget:
        """Raises UsageError TARGET for a device that target cuda cannot run on."""
        info = gpu_info(device)
        asked = env.gpu_kernels()
        module = compiled.load(info.interpreted)
        if asked == Backend.CUDA and module is None:
            raise UsageError(
                "ENV",
                "PYRUNTIME_GPU_KERNELS is cuda, but pyruntime._C_cuda is not built; install with PYRUNTIME_CUDA=1, or "
                "unset it",
            )
        return GpuTarget(info, device, dtype, load_table(info), module, None if asked is None else Backend(asked))

    def bound(self, step: PlanStep) -> PlanStep:
        """The step with its launch, where it has one, and with the kernels that it chooses from in its reason."""
        on_gpu = step.implementation.on_gpu
        if on_gpu is None:
            return step
        num_weights = sum(weight.numel() for weight in step.weights.values())
        choices = (
            choices_of(step.node.op, num_weights, self.info, self.table)
            if self.kernels is None
            else forced(step.node.op, self.kernels)
        )
        if choices is not None and choices.uses(Backend.CUDA):
            why_not = refused(step.node.attrs, step.weights, self.dtype, self.compiled)
            choices = choices if why_not is None else choices.without_cuda(why_not)
        reason = step.reason if choices is None else f"{step.reason}; {choices}"
        node = GpuNode(
            step.node.name, step.weights, self.dtype, self.device, self.info, choices or DEFAULT, self.compiled
        )
        return replace(step, launch=on_gpu(step.node.attrs, node), reason=reason)


def make_runner(
    graph: Graph, target: GpuTarget, bind: Bind, *, vocab_size: int, max_position: int, trusts_sampler: bool
) -> GpuRunner:
    """The runner of `graph`, whose decode form is made here. `bind` is asked for the decode form first.

    That one has the whole matrices, of which the tail's halves are views.
    """
    decode_graph = without_tail(graph)
    verify(decode_graph, wanted=Rows.ALL)
    decode, prefill = (tuple(target.bound(step) for step in bind(each)) for each in (decode_graph, graph))
    dtypes = _dtypes((*graph.nodes, *decode_graph.nodes), target.dtype)
    steps = GpuSteps(prefill=prefill, decode=decode, dtypes=dtypes, row_bytes=_row_bytes((*prefill, *decode), dtypes))
    return GpuRunner(
        steps,
        info=target.info,
        device=target.device,
        vocab_size=vocab_size,
        max_position=max_position,
        sampler=DeviceSampler() if trusts_sampler else None,
    )


def _dtypes(nodes: Iterable[Node], narrow: torch.dtype) -> Mapping[str, torch.dtype]:
    found: dict[str, torch.dtype] = {}
    for node in nodes:
        for buffer in node.outputs:
            if node.op == "gather":
                found[buffer] = found[node.inputs[0]]
            else:
                found[buffer] = narrow if node.op in _NARROW_OPS else torch.float32
    return found


def _row_bytes(steps: Sequence[PlanStep], dtypes: Mapping[str, torch.dtype]) -> tuple[tuple[int, int], ...]:
    """What a row takes in each place, of all rows and of wanted ones. Logits have memory of their own."""
    count = 1 + max((place for step in steps for place in step.outputs), default=-1)
    found = [[0, 0] for _ in range(count)]
    for step in steps:
        for place, buffer, width in zip(step.outputs, step.node.outputs, step.node.attrs.out_widths(), strict=True):
            if buffer != LOGITS:
                view = int(step.node.rows is Rows.WANTED)
                found[place][view] = max(found[place][view], width * dtypes[buffer].itemsize)
    return tuple((all_rows, wanted) for all_rows, wanted in found)
