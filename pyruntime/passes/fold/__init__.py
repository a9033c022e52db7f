"""Exact rewrites of ordinary models: the same logits from fewer weights, norms, biases, sublayers or cached values."""

from pyruntime.checkpoint.computed import stored_as
from pyruntime.passes.fold.biases import fold_biases
from pyruntime.passes.fold.cancel import cancel_norms
from pyruntime.passes.fold.draft import FoldReport, fold_reports
from pyruntime.passes.fold.norms import centre_layer_norms, fold_norms
from pyruntime.passes.fold.shrink import identity_blocks, shrink_values
from pyruntime.passes.fold.slim import slim
from pyruntime.passes.fold.tables import fold_mlp_prefix, tabulate_first_layer
from pyruntime.passes.fold.zeros import drop_zero_sublayers

__all__ = [
    "FoldReport",
    "cancel_norms",
    "centre_layer_norms",
    "drop_zero_sublayers",
    "fold_biases",
    "fold_mlp_prefix",
    "fold_norms",
    "fold_reports",
    "identity_blocks",
    "shrink_values",
    "slim",
    "stored_as",
    "tabulate_first_layer",
]
