"""The residual stream of a running model: what each sublayer reads and adds, layer by layer.

Both ways of running look at the unfused graph, in which every residual add is a node of its own. One lowers the whole
model for any target; the other lowers one layer at a time on PyTorch, so that no more than its weights are in memory.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import torch

from pyruntime.checkpoint import InMemory, Model
from pyruntime.errors import UsageError
from pyruntime.graph import Graph, Node, build
from pyruntime.ops.step import Rows, SequenceSlice, View, make_step
from pyruntime.plan import Plan, PlanStep, lower
from pyruntime.spec import Embedding, Head, Layer, Linear, ModelSpec, sublayer_prefix, weight_shapes

_PAGE_SIZE: Final = 64
# rows of a step: hidden states of all layers are held for so many tokens
_CHUNK: Final = 512


@dataclass(frozen=True, slots=True)
class Added:
    """What one sublayer did to a chunk of rows: the stream it read before its norm, and what was added to it."""

    kind: str
    x: torch.Tensor  # [rows, hidden]
    added: torch.Tensor  # [rows, hidden]


@dataclass(frozen=True, slots=True)
class Passage:
    """A chunk of rows on its way through one layer.

    `boundaries` are the streams before this layer and those before it, oldest first, and behind it: the last two are
    its input and output. `ends` says that the last row is the last token of its sequence.
    """

    layer: int
    sublayers: tuple[Added, ...]
    boundaries: Sequence[torch.Tensor]
    ends: bool


Observe = Callable[[Passage], None]


@dataclass(frozen=True, slots=True)
class Tap:
    """Names of one layer's buffers: its input, its output, and (kind, what is read, what is added) of its sublayers."""

    entry: str
    exit: str
    sublayers: tuple[tuple[str, str, str], ...]

    def needed(self) -> frozenset[str]:
        """All of these buffers."""
        return frozenset((self.entry, self.exit, *(name for _, *pair in self.sublayers for name in pair)))


def taps(graph: Graph, spec: ModelSpec) -> tuple[Tap, ...]:
    """Where to look in the unfused graph of `spec`, layer by layer. Sublayers without residual have no tap."""
    adds = {node.name: node for node in graph.nodes if node.op == "add"}
    outputs: dict[int, str] = {}
    stream = ""
    for node in graph.nodes:
        owner = _layer_of(node)
        if owner is None and not outputs and node.rows is Rows.ALL:
            stream = node.outputs[0]
        elif owner is not None and node.outputs:
            outputs[owner] = node.outputs[0]
    found = []
    for layer in spec.layers:
        entry, stream = stream, outputs.get(layer.index, stream)
        seen = [
            # both sublayers of a parallel layer read its input
            (kind, entry if layer.parallel else add.inputs[0], add.inputs[1])
            for kind, _ in layer.sublayers()
            if (add := adds.get(sublayer_prefix(layer.index, kind) + "add")) is not None
        ]
        found.append(Tap(entry, stream, tuple(seen)))
    return tuple(found)


def _passage(
    layer: int, tap: Tap, buffers: Mapping[str, torch.Tensor], history: Sequence[torch.Tensor], ends: bool
) -> Passage:
    sublayers = tuple(Added(kind, buffers[x], buffers[added]) for kind, x, added in tap.sublayers)
    return Passage(layer, sublayers, history, ends)


class WholeModel:
    """A model lowered whole; `observe` sees each layer of each chunk of a sequence, in order.

    Raises the errors of `lower`.
    """

    def __init__(self, model: Model, *, dtype: str, target: str, device: str) -> None:
        graph = build(model.spec)
        self.plan: Plan = lower(graph, model, dtype=dtype, target=target, device=device)
        self._taps = taps(graph, model.spec)
        self._last = {layer: node.name for node in graph.nodes if (layer := _layer_of(node)) is not None}
        self._cache = self.plan.new_cache(1, _PAGE_SIZE)

    def run(self, sequence: Sequence[int], window: int, observe: Observe) -> None:
        """Show `observe` the passages of `sequence`, each with up to `window` + 1 boundaries."""
        num_pages = -(-len(sequence) // _PAGE_SIZE)
        if num_pages > self._cache.num_pages:
            self._cache = self.plan.new_cache(num_pages, _PAGE_SIZE)
        for start, end in _chunks(len(sequence)):
            # no logits are wanted, so the step stops before the head
            piece = SequenceSlice(sequence[start:end], start, range(num_pages), ())
            watch = _Watch(self._taps, self._last, window, end == len(sequence), observe)
            self.plan.run(make_step([piece], self._cache, self.plan.device), watch)
            watch.finish()


class _Watch:
    """Copies the buffers of the layer that runs, which later nodes write over, and passes them on at its end."""

    def __init__(
        self, layers: Sequence[Tap], last: Mapping[int, str], window: int, ends: bool, observe: Observe
    ) -> None:
        self._taps = layers
        self._last = last
        self._ends = ends
        self._observe = observe
        self._layer = 0
        self._buffers: dict[str, torch.Tensor] = {}
        self._history: deque[torch.Tensor] = deque(maxlen=window + 1)

    def __call__(self, step: PlanStep, outputs: tuple[torch.Tensor, ...]) -> None:
        self._skip_empty()
        if self._layer == len(self._taps):
            return
        needed = self._taps[self._layer].needed()
        for name, output in zip(step.node.outputs, outputs, strict=True):
            if name in needed:
                self._buffers[name] = output.clone()
        if step.node.name == self._last.get(self._layer):
            self._pass_on()

    def finish(self) -> None:
        """Pass on the empty layers at the end."""
        self._skip_empty()
        assert self._layer == len(self._taps)

    def _skip_empty(self) -> None:
        while self._layer < len(self._taps) and self._layer not in self._last and self._started():
            self._pass_on()

    def _started(self) -> bool:
        return self._taps[self._layer].entry in self._buffers

    def _pass_on(self) -> None:
        tap = self._taps[self._layer]
        if not self._history:
            self._history.append(self._buffers[tap.entry])
        self._history.append(self._buffers[tap.exit])
        self._observe(_passage(self._layer, tap, self._buffers, self._history, self._ends))
        self._buffers = {tap.exit: self._buffers[tap.exit]}
        self._layer += 1


def _layer_of(node: Node) -> int | None:
    room, _, rest = node.name.partition(".")
    return int(rest.partition(".")[0]) if room == "layers" else None


def _chunks(length: int) -> Iterator[tuple[int, int]]:
    return ((start, min(start + _CHUNK, length)) for start in range(0, length, _CHUNK))


class LayerByLayer:
    """A model of which one layer's weights are in memory at a time, and the hidden states of a group of sequences.

    Raises UsageError SCORES for a precomputed first layer, which lies in the embedding.
    """

    def __init__(self, model: Model, *, dtype: str, device: str) -> None:
        if any(attention.table for _, attention in model.spec.attentions()):
            raise UsageError(
                "SCORES", "the first layer was precomputed into the embedding; score the whole model, or its source"
            )
        self._model = model
        self._how: dict[str, Any] = {"target": "reference", "dtype": dtype, "device": device}

    def run(self, sequences: Sequence[Sequence[int]], window: int, observe: Observe) -> Iterator[int]:
        """Show `observe` the passages of all `sequences`, layer by layer; gives each layer's number when it is done."""
        histories = [deque([chunk], maxlen=window + 1) for chunk in self._embedded(sequences)]
        for layer in self._model.spec.layers:
            plan, tap = self._lowered(layer)
            place = 0
            for sequence in sequences:
                cache = plan.new_cache(-(-len(sequence) // _PAGE_SIZE), _PAGE_SIZE)
                for start, end in _chunks(len(sequence)):
                    history = histories[place]
                    piece = SequenceSlice(sequence[start:end], start, range(cache.num_pages), ())
                    view = make_step([piece], cache, plan.device).view(Rows.ALL)
                    buffers = _through(plan, view, history[-1])
                    history.append(buffers[tap.exit])
                    observe(_passage(layer.index, tap, buffers, history, end == len(sequence)))
                    place += 1
            # before the next layer's weights are read
            del plan
            yield layer.index

    def _embedded(self, sequences: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        """The stream before the first layer, by sequence and chunk."""
        spec = self._model.spec
        head = Head(linear=Linear(in_features=spec.embedding.size, out_features=spec.vocab_size), tied=True)
        empty = Layer(index=0, attention=None, mlp=None)
        small = replace(spec, layers=(empty,), final_norm=None, head=head)
        weights = {name: self._model.weights[name] for name in weight_shapes(small)}
        graph = build(small)
        plan = lower(graph, replace(self._model, spec=small, weights=weights), **self._how)
        entry = taps(graph, small)[0].entry
        cache = plan.new_cache(1, _PAGE_SIZE)
        found = []
        for sequence in sequences:
            for start, end in _chunks(len(sequence)):
                # nothing is cached: one page, named as often as positions ask for it
                piece = SequenceSlice(sequence[start:end], start, [0] * -(-end // _PAGE_SIZE), ())
                view = make_step([piece], cache, plan.device).view(Rows.ALL)
                found.append(_through(plan, view, None)[entry])
        return found

    def _lowered(self, layer: Layer) -> tuple[Plan, Tap]:
        """A plan of this layer alone; the embedding and the head around it are a row of zeros that nothing reads."""
        kept = list(layer.sublayers())
        first = kept[0][1].in_size if kept else self._model.spec.embedding.size
        last = kept[-1][1].out_size if kept else first
        spec = self._model.spec
        small = replace(
            spec,
            embedding=Embedding(vocab_size=1, size=first),
            layers=(replace(layer, index=0),),
            final_norm=None,
            head=Head(linear=Linear(in_features=last, out_features=1), tied=False),
        )
        weights = {
            name: self._model.weights[f"layers.{layer.index}.{name.removeprefix('layers.0.')}"]
            if name.startswith("layers.0.")
            else InMemory(torch.zeros(shape))
            for name, shape in weight_shapes(small).items()
        }
        graph = build(small)
        plan = lower(graph, replace(self._model, spec=small, weights=weights), **self._how)
        return plan, taps(graph, small)[0]


def _through(plan: Plan, view: View, stream: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """The buffers of all rows that the steps of a plan write, from `stream` on, or from the token ids of `view`."""
    buffers: dict[str, torch.Tensor] = {}
    with torch.inference_mode():
        for step in plan.steps:
            if step.node.rows is not Rows.ALL:
                break
            if step.node.op == "embed" and stream is not None:
                buffers[step.node.outputs[0]] = stream
                continue
            assert step.implementation.run is not None
            inputs = [buffers[name] for name in step.node.inputs]
            outputs = step.implementation.run(step.node.attrs, step.weights, inputs, view)
            buffers |= dict(zip(step.node.outputs, outputs, strict=True))
    return buffers
