"""K6 on a GPU: a run of MLPs, one after the other."""

from __future__ import annotations

from dataclasses import replace

from pyruntime.ops.gpu.choose import Backend
from pyruntime.ops.gpu.compiled_mlp_chain import most_rows, refused, run_chain
from pyruntime.ops.gpu.device import refused_dtype as refuses
from pyruntime.ops.gpu.frame import Frame, GpuNode, Launch
from pyruntime.ops.gpu.mlp import layouts as part_layouts
from pyruntime.ops.gpu.mlp import part_on_gpu
from pyruntime.ops.layout import Layout
from pyruntime.ops.mlp_chain import MlpChainAttrs

__all__ = ["layouts", "on_gpu", "refuses"]


def layouts(attrs: MlpChainAttrs) -> dict[str, Layout]:
    """Those of part i under "i."."""
    return {
        f"{i}.{name}": replace(layout, sources=tuple(role and f"{i}.{role}" for role in layout.sources))
        for i, part in enumerate(attrs.parts)
        for name, layout in part_layouts(part).items()
    }


def on_gpu(attrs: MlpChainAttrs, node: GpuNode) -> Launch:
    """One launch of few rows in CUDA C++, or those of each MLP; from the second on, the stream stays in its place."""
    parts = [part_on_gpu(part, _node_of(node, f"{i}.")) for i, part in enumerate(attrs.parts)]
    num_sms, at_once = node.info.num_sms, 0
    if node.compiled is not None and refused(node.compiled, attrs, node.dtype, num_sms) is None:
        at_once = most_rows(node.compiled, attrs, num_sms)

    def launch(frame: Frame) -> None:
        num_rows = frame.view.num_rows
        if num_rows <= at_once and node.choices.at(num_rows).backend is Backend.CUDA:
            run_chain(node.compiled, attrs, node, frame)
            return
        stream, out = frame.inputs[0], frame.outputs[0]
        for part in parts:
            # what the part before took is free
            frame.workspace.begin()
            part(frame, stream, out, stream)
            stream = out

    return launch


def _node_of(node: GpuNode, prefix: str) -> GpuNode:
    """The node as one part sees it."""
    own = {name.removeprefix(prefix): each for name, each in node.weights.items() if name.startswith(prefix)}
    return replace(node, name=f"{node.name}.{prefix[:-1]}", weights=own)
