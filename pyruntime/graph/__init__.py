"""The static graph, in which dropped sublayers do not exist."""

from pyruntime.graph.build import build
from pyruntime.graph.cost import Cost, SequenceWork, cost_of
from pyruntime.graph.fuse import fuse
from pyruntime.graph.node import LOGITS, Graph, Node
from pyruntime.graph.tail import without_tail
from pyruntime.graph.verify import verify

__all__ = ["LOGITS", "Cost", "Graph", "Node", "SequenceWork", "build", "cost_of", "fuse", "verify", "without_tail"]
