"""What dropping costs: perplexity, divergence from the dense model, multiple choice, long contexts."""

from pyruntime.evaluate.choices import (
    ChoiceResult,
    Continuation,
    continuations,
    multiple_choice,
    pair_window,
)
from pyruntime.evaluate.divergence import Divergence, divergence
from pyruntime.evaluate.identity import digest, model_sha256, plan_settings
from pyruntime.evaluate.items import Item, read_items
from pyruntime.evaluate.long_context import (
    CopyLoss,
    CopyProbe,
    PositionLoss,
    copies_json,
    copy_losses,
    copy_probe,
    losses_by_position,
    positions_json,
)
from pyruntime.evaluate.perplexity import Perplexity, TextQuality, change, perplexity, text_quality
from pyruntime.evaluate.reference import LogitsCache
from pyruntime.evaluate.report import Bars, Findings, Measures, compared, measure
from pyruntime.evaluate.statistics import Estimate, mean_of, ratio_of
from pyruntime.evaluate.texts import Corpus, TokenizedText, opening_token, read_corpus, tokenize
from pyruntime.evaluate.tradeoff import Point, TradeoffReport, gamma
from pyruntime.plan.likelihood import Window, strided_windows, windows

__all__ = [
    "Bars",
    "ChoiceResult",
    "Continuation",
    "CopyLoss",
    "CopyProbe",
    "Corpus",
    "Divergence",
    "Estimate",
    "Findings",
    "Item",
    "LogitsCache",
    "Measures",
    "Perplexity",
    "Point",
    "PositionLoss",
    "TextQuality",
    "TokenizedText",
    "TradeoffReport",
    "Window",
    "change",
    "compared",
    "continuations",
    "copies_json",
    "copy_losses",
    "copy_probe",
    "digest",
    "divergence",
    "gamma",
    "losses_by_position",
    "mean_of",
    "measure",
    "model_sha256",
    "multiple_choice",
    "opening_token",
    "pair_window",
    "perplexity",
    "plan_settings",
    "positions_json",
    "ratio_of",
    "read_corpus",
    "read_items",
    "strided_windows",
    "text_quality",
    "tokenize",
    "windows",
]
