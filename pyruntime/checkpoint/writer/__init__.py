"""Writing checkpoints: a new folder that appears whole or not at all, made from one that is never touched."""

from pyruntime.checkpoint.writer.about import about
from pyruntime.checkpoint.writer.dialects import WRITE_DIALECTS
from pyruntime.checkpoint.writer.folder import check_target, recover
from pyruntime.checkpoint.writer.native import write_native
from pyruntime.checkpoint.writer.pruned import write_pruned
from pyruntime.checkpoint.writer.whole import Written

__all__ = ["WRITE_DIALECTS", "Written", "about", "check_target", "recover", "write_native", "write_pruned"]
