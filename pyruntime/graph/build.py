"""From a specification to its graph. What is None in the specification has no node."""

from __future__ import annotations

from dataclasses import dataclass, field

from pyruntime.graph.node import LOGITS, Graph, Node
from pyruntime.ops.add import AddAttrs
from pyruntime.ops.attention import AttentionAttrs
from pyruntime.ops.attrs import Attrs
from pyruntime.ops.embed import EmbedAttrs
from pyruntime.ops.gather import GatherAttrs
from pyruntime.ops.head import HeadAttrs
from pyruntime.ops.linear import LinearAttrs
from pyruntime.ops.mlp import MlpAttrs
from pyruntime.ops.moe import MoeAttrs
from pyruntime.ops.norm import NormAttrs
from pyruntime.ops.qkv_rope import QkvRopeAttrs
from pyruntime.ops.step import Rows
from pyruntime.spec import (
    MLP,
    Attention,
    Embedding,
    Layer,
    Linear,
    ModelSpec,
    MoE,
    Norm,
    Replacement,
    Sublayer,
    sublayer_prefix,
)


def build(spec: ModelSpec) -> Graph:
    """The graph of `spec`, nothing fused: one node per norm, projection group, attention, MLP and residual add.

    KV slots are numbered densely over the kept attentions.
    """
    builder = _Builder(spec.vocab_size)
    embed = EmbedAttrs(spec.embedding, shared=spec.head.tied)
    tables = {role: f"embedding.{role}" for role in embed.weight_shapes()}
    stream = builder.add("embed", "embed", embed, (), tables)
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
    vocab_size: int
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
        """Serial sublayers feed one into the other; parallel ones read the same stream, and what they give is added."""
        entry = stream
        # what the next sublayer's output is added to, where something is
        total: str | None = None
        for kind, sublayer in layer.sublayers():
            prefix = sublayer_prefix(layer.index, kind)
            source = entry if layer.parallel else stream
            if sublayer.residual and total is None:
                total = self.linear(prefix + "shortcut", sublayer.shortcut, source)
            x = self.norm(prefix + "pre", sublayer.pre, prefix + "pre", source)
            y = self.body(prefix, sublayer, x)
            y = self.norm(prefix + "post", sublayer.post, prefix + "post", y)
            if total is not None:
                y = self.add(prefix + "add", "add", AddAttrs(sublayer.out_size), (total, y))
            total = y if layer.parallel else None
            stream = y
        return stream

    def linear(self, name: str, linear: Linear | None, x: str) -> str:
        """A linear map and its node by one name; one that is absent gives its input."""
        if linear is None:
            return x
        attrs = LinearAttrs(linear)
        weights = {role: role.replace("linear", name) for role in attrs.weight_shapes()}
        return self.add(name, "linear", attrs, (x,), weights)

    def body(self, prefix: str, sublayer: Sublayer, x: str) -> str:
        match sublayer:
            case Attention():
                return self.attention(prefix, sublayer, x)
            case MLP():
                mlp = MlpAttrs(sublayer)
                return self.add(prefix + "mlp", "mlp", mlp, (x,), {role: prefix + role for role in mlp.weight_shapes()})
            case MoE():
                moe = MoeAttrs(sublayer)
                return self.add(prefix + "moe", "moe", moe, (x,), {role: prefix + role for role in moe.weight_shapes()})
            case Replacement():
                return self.linear(prefix + "linear", sublayer.linear, x)

    def attention(self, prefix: str, attention: Attention, x: str) -> str:
        slot = self.num_slots
        self.num_slots += 1
        qkv = QkvRopeAttrs(attention, slot)
        if attention.table:
            rows = EmbedAttrs(Embedding(vocab_size=self.vocab_size, size=qkv.in_size))
            x = self.add(prefix + "table", "embed", rows, (), {"weight": f"{prefix}table.weight"})
        q = self.add(prefix + "qkv", "qkv_rope", qkv, (x,), {role: prefix + role for role in qkv.weight_shapes()})
        attend = AttentionAttrs(attention, slot)
        y = self.add(
            prefix + "attend", "attention", attend, (q,), {role: prefix + role for role in attend.weight_shapes()}
        )
        y = self.norm(prefix + "sub", attention.sub, prefix + "sub", y)
        return self.linear(prefix + "o", attention.o, y)
