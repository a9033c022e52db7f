"""From a specification to its graph. What is None in the specification has no node."""

from __future__ import annotations

from dataclasses import dataclass, field

from pyruntime.errors import UsageError
from pyruntime.graph.node import LOGITS, Graph, Node
from pyruntime.ops.add import AddAttrs
from pyruntime.ops.attention import AttentionAttrs
from pyruntime.ops.attrs import Attrs
from pyruntime.ops.embed import EmbedAttrs
from pyruntime.ops.gather import GatherAttrs
from pyruntime.ops.head import HeadAttrs
from pyruntime.ops.linear import LinearAttrs
from pyruntime.ops.mlp import MlpAttrs
from pyruntime.ops.norm import NormAttrs
from pyruntime.ops.qkv_rope import QkvRopeAttrs
from pyruntime.ops.step import Rows
from pyruntime.spec import MLP, Attention, Layer, ModelSpec, MoE, Norm, Replacement, Sublayer, sublayer_prefix


def build(spec: ModelSpec) -> Graph:
    """The graph of `spec`, nothing fused: one node per norm, projection group, attention, MLP and residual add.

    KV slots are numbered densely over the kept attentions.
    """
    builder = _Builder()
    embed = EmbedAttrs(spec.embedding, shared=spec.head.tied)
    stream = builder.add("embed", "embed", embed, (), {"weight": "embedding.weight"})
    for layer in spec.layers:
        stream = builder.layer(layer, stream)
    stream = builder.add("wanted", "gather", GatherAttrs(spec.head.linear.in_features), (stream,), rows=Rows.WANTED)
    stream = builder.norm("final_norm", spec.final_norm, "final_norm", stream, Rows.WANTED)
    roles = {"linear.weight": "embedding.weight" if spec.head.tied else "head.weight"}
    if spec.head.linear.bias:
        roles["linear.bias"] = "head.bias"
    builder.add("head", "head", HeadAttrs(spec.head), (stream,), roles, Rows.WANTED, out=LOGITS)
    return Graph(tuple(builder.nodes))


@dataclass(slots=True)
class _Builder:
    nodes: list[Node] = field(default_factory=list)
    num_slots: int = 0

    def add(
        self,
        name: str,
        op: str,
        attrs: Attrs,
        inputs: tuple[str, ...],
        weights: dict[str, str] | None = None,
        rows: Rows = Rows.ALL,
        out: str | None = None,
    ) -> str:
        """Append a node and give the name of its output."""
        output = out or f"%{len(self.nodes)}"
        found = tuple(sorted((weights or {}).items()))
        self.nodes.append(
            Node(name=name, op=op, attrs=attrs, inputs=inputs, outputs=(output,), weights=found, rows=rows)
        )
        return output

    def norm(self, name: str, norm: Norm | None, prefix: str, x: str, rows: Rows = Rows.ALL) -> str:
        if norm is None:
            return x
        attrs = NormAttrs(norm)
        return self.add(name, "norm", attrs, (x,), {role: f"{prefix}.{role}" for role in attrs.weight_shapes()}, rows)

    def layer(self, layer: Layer, stream: str) -> str:
        """Serial sublayers feed one into the other; parallel ones read the same stream and add to it in turn."""
        entry = stream
        for kind, sublayer in layer.sublayers():
            prefix = sublayer_prefix(layer.index, kind)
            x = self.norm(prefix + "pre", sublayer.pre, prefix + "pre", entry if layer.parallel else stream)
            y = self.body(prefix, sublayer, x)
            y = self.norm(prefix + "post", sublayer.post, prefix + "post", y)
            if sublayer.residual:
                y = self.add(prefix + "add", "add", AddAttrs(sublayer.out_size), (stream, y))
            stream = y
        return stream

    def body(self, prefix: str, sublayer: Sublayer, x: str) -> str:
        match sublayer:
            case Attention():
                return self.attention(prefix, sublayer, x)
            case MLP():
                mlp = MlpAttrs(sublayer)
                return self.add(prefix + "mlp", "mlp", mlp, (x,), {role: prefix + role for role in mlp.weight_shapes()})
            case MoE():
                raise UsageError("SPEC", f"{prefix} is a mixture of experts, which no target runs")
            case Replacement():
                linear = LinearAttrs(sublayer.linear)
                return self.add(prefix + "linear", "linear", linear, (x,), _own(linear, prefix))

    def attention(self, prefix: str, attention: Attention, x: str) -> str:
        slot = self.num_slots
        self.num_slots += 1
        qkv = QkvRopeAttrs(attention, slot)
        q = self.add(prefix + "qkv", "qkv_rope", qkv, (x,), {role: prefix + role for role in qkv.weight_shapes()})
        y = self.add(prefix + "attend", "attention", AttentionAttrs(attention, slot), (q,))
        y = self.norm(prefix + "sub", attention.sub, prefix + "sub", y)
        if attention.o is None:
            return y
        o = LinearAttrs(attention.o)
        return self.add(prefix + "o", "linear", o, (y,), _own(o, prefix, "o"))


def _own(attrs: LinearAttrs, prefix: str, name: str = "linear") -> dict[str, str]:
    return {role: prefix + role.replace("linear", name) for role in attrs.weight_shapes()}
