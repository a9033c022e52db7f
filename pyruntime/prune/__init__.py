"""Choosing what to drop: scores of sublayers, and the plans that come of them."""

from pyruntime.prune.calibration import Calibration, CalibrationOptions, read_calibration
from pyruntime.prune.greedy import select_for_speedup, select_iteratively
from pyruntime.prune.identity import model_identity
from pyruntime.prune.plot import check_plot, save_plot
from pyruntime.prune.prune import Pruned, check_drops, choose, made_of, prune
from pyruntime.prune.score import ScoreOptions, forget, score
from pyruntime.prune.scores import METRICS, Scores
from pyruntime.prune.select import METHODS, RULES, TARGETS, Pick, Selection, decode_context, select
from pyruntime.prune.speed import Machine, decode_cost, decode_seconds, kv_bytes

__all__ = [
    "METHODS",
    "METRICS",
    "RULES",
    "TARGETS",
    "Calibration",
    "CalibrationOptions",
    "Machine",
    "Pick",
    "Pruned",
    "ScoreOptions",
    "Scores",
    "Selection",
    "check_drops",
    "check_plot",
    "choose",
    "decode_context",
    "decode_cost",
    "decode_seconds",
    "forget",
    "kv_bytes",
    "made_of",
    "model_identity",
    "prune",
    "read_calibration",
    "save_plot",
    "score",
    "select",
    "select_for_speedup",
    "select_iteratively",
]
