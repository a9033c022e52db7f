"""From a graph to a plan: choose implementations, read and arrange the weights, place the buffers, fill the program."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

import torch

from pyruntime.checkpoint import Model
from pyruntime.checkpoint.weight import TensorRef, check_finite
from pyruntime.errors import CheckpointError, UsageError
from pyruntime.graph import LOGITS, Graph, Node, verify
from pyruntime.ops import _native
from pyruntime.ops.gpu.device import GpuInfo, has_gpu, interpreted
from pyruntime.ops.gpu.trust import failed_kernels
from pyruntime.ops.layout import Layout, LayoutKind, arrange
from pyruntime.ops.native_step import NativeNode, refused_dtype
from pyruntime.ops.program import Program
from pyruntime.ops.step import Rows
from pyruntime.ops.table import OPS, Implementation
from pyruntime.plan.plan import Plan
from pyruntime.plan.step import PlanStep

TARGETS: Final = ("reference", "cpu", "cuda")
DTYPES: Final = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
_LOGGER: Final = logging.getLogger("pyruntime")


def lower(
    graph: Graph,
    model: Model,
    *,
    target: str = "reference",
    dtype: str = "auto",
    device: str = "auto",
    check_weights: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Plan:
    """Bind `graph` to `target`: choose implementations, read the weights it needs and no other, place the buffers.

    `device` "auto" is the GPU where there is one and `target` can use it; `target` "auto" is the best that runs whole
    plans on `device`; `dtype` "auto" keeps the checkpoint's. `progress` is called with the bytes of each tensor read.
    Raises UsageError for an unknown target or dtype, and for a target that this machine or `device` does not have;
    CheckpointError DTYPE where "auto" has no one meaning, and NOT_FINITE where `check_weights` finds a NaN or an
    infinity.
    """
    verify(graph)
    name = model.dtype if dtype == "auto" else dtype
    if name not in DTYPES:
        raise UsageError("DTYPE", f"dtype {dtype!r} is not known; expected auto, {', '.join(DTYPES)}")
    if dtype == "auto" and model.dtype_conflict is not None:
        raise CheckpointError("DTYPE", model.dtype_conflict)
    torch_dtype = DTYPES[name]
    device = resolve_device(device, target)
    target, why = _target(target, torch_dtype, torch.device(device))
    weights = _Weights(model, torch_dtype, device, check_weights, progress)
    bind, gpu = _Binder(target, torch_dtype, why, weights), None
    if target == "cuda":
        # loads Triton and the kernels, which takes a second that nobody else should wait for
        from pyruntime.plan.lower_gpu import GpuTarget, make_runner

        made_for = GpuTarget.of(torch.device(device), torch_dtype)
        bind = replace(bind, distrusted=_distrusted(made_for.info))
        gpu = make_runner(
            graph,
            made_for,
            bind,
            vocab_size=model.spec.vocab_size,
            max_position=model.spec.max_position,
            trusts_sampler="sample" not in bind.distrusted,
        )
    steps = bind(graph) if gpu is None else gpu.steps.prefill
    plan = Plan(
        target=target,
        dtype=torch_dtype,
        device=torch.device(device),
        steps=steps,
        num_places=1 + max(place for step in steps for place in step.outputs),
        vocab_size=model.spec.vocab_size,
        max_position=model.spec.max_position,
        kv_shapes=graph.kv_shapes(),
        gpu=gpu,
    )
    return plan if all(step.implementation.emit is None for step in steps) else _with_program(plan, graph)


def _target(asked: str, dtype: torch.dtype, device: torch.device) -> tuple[str, str]:
    """The target and why it was chosen."""
    if asked not in ("auto", *TARGETS):
        raise UsageError("TARGET", f"target {asked!r} does not exist; expected one of auto, {', '.join(TARGETS)}")
    if asked == "cpu" and device.type != "cpu":
        raise UsageError("TARGET", f"target cpu cannot run on device {device}; choose device cpu or target reference")
    refused = refused_dtype(None, dtype)
    if asked == "cpu" and refused is not None:
        raise UsageError("TARGET", f"target cpu: {refused}; choose one of these dtypes, or target reference")
    if asked == "cuda" and dtype is torch.float64:
        raise UsageError(
            "TARGET", "target cuda computes in bfloat16, float16 or float32; for float64, target reference"
        )
    if asked != "auto":
        return asked, "asked for"
    if device.type == "cuda" and dtype is not torch.float64 and has_gpu(device):
        return "cuda", "auto"
    if device.type != "cpu":
        return "reference", f"auto: the one target that runs {dtype} on {device}"
    if refused is not None:
        # said, because it is many times slower
        _LOGGER.warning("PyTorch runs the plan, not the C++ target: %s; choose one of these dtypes for speed", refused)
        return "reference", f"auto: target cpu refused: {refused}"
    try:
        _native.load()
    except UsageError as error:
        if error.code != "NATIVE":
            raise
        _LOGGER.warning("the C++ target is missing, so PyTorch runs the plan: %s", error)
        return "reference", "auto: pyruntime._C is not built"
    return "cpu", "auto"


def resolve_device(device: str, target: str) -> str:
    """The device with its number, where "auto" is the GPU if there is one that target cuda can use.

    Raises UsageError DEVICE for one that cannot be used here.
    """
    if device == "auto":
        # interpreted kernels work on the CPU's memory
        here = torch.cuda.is_available() and not interpreted() if target == "cuda" else target == "auto" and has_gpu()
        device = "cuda" if here else "cpu"
    _check_device(device)
    # the current device is a thread's own
    return f"cuda:{torch.cuda.current_device()}" if device == "cuda" else device


def _check_device(device: str) -> None:
    try:
        torch.empty(0, device=device)
    # torch says the same thing with either, depending on how it was built
    except (RuntimeError, AssertionError) as error:
        why = str(error).partition("\n")[0]
        raise UsageError(
            "DEVICE", f"device {device!r} cannot be used here ({why}); expected auto, cpu, or cuda"
        ) from None


def _distrusted(info: GpuInfo) -> Mapping[str, str]:
    """Ops whose kernels failed their self-check on this device."""
    found = failed_kernels(info)
    for op, why in found.items():
        _LOGGER.warning("PyTorch runs every %s: its kernel failed its self-check on %s: %s", op, info.name, why)
    return found


def _choose(
    node: Node, target: str, dtype: torch.dtype, why: str, distrusted: Mapping[str, str]
) -> tuple[Implementation, str]:
    """The target's own implementation, else the reference with the reason of each refusal."""
    refusals: list[str] = []
    for implementation in OPS[node.op]:
        why_not = implementation.refuses(node.attrs, dtype)
        if implementation.on_gpu is not None and node.op in distrusted:
            why_not = f"it failed its self-check: {distrusted[node.op]}"
        if implementation.target == target and why_not is None:
            return implementation, why
        if implementation.target == target:
            refusals.append(f"{target} refused: {why_not}")
    reference = next(each for each in OPS[node.op] if each.target == "reference")
    return reference, "; ".join(refusals) or f"{target} has no {node.op}"


class _Weights:
    """Reads weights and arranges them; what two nodes want in the same layout is made once."""

    def __init__(
        self, model: Model, dtype: torch.dtype, device: str, check: bool, progress: Callable[[int], None] | None
    ) -> None:
        self._model = model
        self._dtype = dtype
        self._device = device
        self._check = check
        self._progress = progress
        self._made: dict[Layout, torch.Tensor] = {}
        self._seen: set[str] = set()

    def of(self, node: Node, implementation: Implementation) -> dict[str, torch.Tensor]:
        """The weights of a node, as its implementation wants them."""
        names = dict(node.weights)
        found = {}
        for role, layout in implementation.layouts(node.attrs).items():
            key = layout.named(names)
            if key not in self._made:
                part = self._part(key)
                self._made[key] = self._arranged(key) if part is None else part
            found[role] = self._made[key]
        return found

    def _arranged(self, key: Layout) -> torch.Tensor:
        return arrange(key, [None if name is None else self._read(name) for name in key.sources])

    def _part(self, key: Layout) -> torch.Tensor | None:
        """Rows of a matrix that was made before: the tail's halves of what decoding computes as one."""
        if key.kind not in (LayoutKind.ROWS, LayoutKind.ROW_VALUES) or key.rows is not None:
            return None
        for made, whole in self._made.items():
            begin = made.run_of(key)
            if begin is not None:
                return whole[begin : begin + sum(key.sizes)]
        return None

    def _read(self, name: str) -> torch.Tensor:
        weight = self._model.weights[name]
        stored = weight.read()
        tensor = stored.to(dtype=self._dtype)
        if name not in self._seen:
            self._seen.add(name)
            if self._check:
                self._check_values(name, stored, tensor)
            if self._progress is not None:
                self._progress(weight.num_bytes)
        return tensor.to(device=self._device)

    def _check_values(self, name: str, stored: torch.Tensor, tensor: torch.Tensor) -> None:
        refs = self._model.weights[name].refs()
        names = " and ".join(dict.fromkeys(ref.name for ref in refs if isinstance(ref, TensorRef))) or name
        check_finite(names, stored)
        if tensor.dtype != stored.dtype:
            dtype = str(self._dtype).removeprefix("torch.")
            check_finite(names, tensor, f" as {dtype}", "choose a dtype with a wider range (--dtype)")


@dataclass(frozen=True, slots=True)
class _Binder:
    """Binds the nodes of a graph to implementations, weights and places."""

    target: str
    dtype: torch.dtype
    why: str
    weights: _Weights
    distrusted: Mapping[str, str] = field(default_factory=dict)

    def __call__(self, graph: Graph) -> tuple[PlanStep, ...]:
        places = _place(graph)
        choices = [_choose(node, self.target, self.dtype, self.why, self.distrusted) for node in graph.nodes]
        return tuple(
            PlanStep(
                node=node,
                implementation=implementation,
                reason=reason,
                weights=self.weights.of(node, implementation),
                inputs=tuple(places[buffer] for buffer in node.inputs),
                outputs=tuple(places[buffer] for buffer in node.outputs),
            )
            for node, (implementation, reason) in zip(graph.nodes, choices, strict=True)
        )


def _place(graph: Graph) -> dict[str, int]:
    """A place for every buffer; a place is free again behind the last node that reads it. Logits have the last one."""
    consumers = graph.consumers()
    last_use = {buffer: nodes[-1].name for buffer, nodes in consumers.items()}
    places: dict[str, int] = {}
    free: list[int] = []
    count = 0
    for node in graph.nodes:
        # outputs first: an op may not write over what it still reads
        for buffer in node.outputs:
            if free and buffer != LOGITS:
                places[buffer] = free.pop()
            else:
                places[buffer] = count
                count += 1
        free.extend(places[b] for b in dict.fromkeys(node.inputs) if last_use[b] == node.name)
    return places


@dataclass(slots=True)
class _Emitter:
    """Fills a program with the steps of the nodes that C++ runs."""

    program: Program
    dtype: torch.dtype

    def emit(self, step: PlanStep) -> PlanStep:
        """The plan step with its place in the program."""
        if step.implementation.emit is None:
            return step
        wanted = step.node.rows is Rows.WANTED
        node = NativeNode(
            weights=step.weights,
            inputs=step.inputs,
            outputs=step.outputs,
            wanted=wanted,
            dtype=self.dtype,
            rotary=lambda rope: self.program.rotary(rope, wanted),
            keep=self.program.keep,
        )
        begin = self.program.num_steps
        for native in step.implementation.emit(step.node.attrs, node):
            self.program.add(native, list(step.weights.values()))
        return replace(step, native=(begin, self.program.num_steps))


def _with_program(plan: Plan, graph: Graph) -> Plan:
    """The plan with a program for the steps that C++ runs."""
    program = Program(
        _native.load(), vocab_size=plan.vocab_size, num_slots=len(plan.kv_shapes), widths=_widths(plan, graph)
    )
    emitter = _Emitter(program, plan.dtype)
    steps = tuple(emitter.emit(step) for step in plan.steps)
    return replace(plan, steps=steps, program=program, segments=tuple(_segments(steps)))


def _segments(steps: Sequence[PlanStep]) -> list[tuple[PlanStep, ...]]:
    found: list[tuple[PlanStep, ...]] = []
    for native, neighbours in itertools.groupby(steps, lambda step: step.native is not None):
        run = tuple(neighbours)
        found.extend([run] if native else [(step,) for step in run])
    return found


def _widths(plan: Plan, graph: Graph) -> list[tuple[int, int]]:
    """Values per row that each place must hold, for all rows and for wanted rows."""
    rows: Mapping[str, Rows] = {buffer: node.rows for node in graph.nodes for buffer in node.outputs}
    widths = graph.widths()
    found = [[0, 0] for _ in range(plan.num_places)]
    for step in plan.steps:
        for place, buffer in zip(step.outputs, step.node.outputs, strict=True):
            view = int(rows[buffer] is Rows.WANTED)
            found[place][view] = max(found[place][view], widths[buffer])
    # the logits' own memory comes with each run
    return [(all_rows, wanted) for all_rows, wanted in found]
